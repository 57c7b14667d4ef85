"""How much of everything a size of the study does: YAML beside this file, each key a field here."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from problems import Level
from pydantic import ConfigDict, TypeAdapter

HERE = Path(__file__).parent
SIZES = ("tiny", "small", "full")


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A model's shape."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int

    def overrides(self) -> list[str]:
        """Keys of a run's config."""
        names = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads")
        return [
            *(f"model.{name}={getattr(self, name)}" for name in names),
            f"model.num_query_groups={self.num_attention_heads}",
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class AbilitySettings:
    """Part 3: its made sets, and the models that learn all of them."""

    seeds: list[int]
    """Of models; the same for both directions. Every one is reported."""
    model: str
    """Name of their shape."""
    num: dict[str, int]
    """By set: facts, problems, worlds or texts that are made; a set that is not named is not made."""
    repeats: dict[str, int]
    """By set: how often its texts stand in the corpus, so that a small set is read more often than a large one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """One size of the study."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    seeds: list[int]
    """Of models; the same for both directions. Every one is reported."""
    models: dict[str, Model]
    """By name; the last one answers and scores in parts 2 and 4."""
    text_kilobytes: dict[str, int]
    """Of prose of this machine, and as much of its code: train, and held out."""
    vocab_size: dict[str, int]
    """Of the tokenizer of each corpus: `text`, `maths` and `abilities`."""
    train_iters: dict[str, int]
    """By corpus."""
    levels: list[Level]
    """Of difficulty of the problems, easiest first; all are trained on in equal numbers."""
    num_problems: dict[str, int]
    """A level, by part: calibration, development, test, valid, train."""
    num_samples: int
    """Candidates of a question."""
    temperature: float
    abilities: AbilitySettings
    beams: tuple[int, int]
    """Beams and expansions of the step-level search."""
    problems_seed: int = 1


def load_settings(size: str, overrides: list[str]) -> Settings:
    """The YAML of a size, with `key=value` changes."""
    merged = OmegaConf.merge(OmegaConf.load(HERE / f"{size}.yaml"), OmegaConf.from_dotlist(overrides))
    content: Any = OmegaConf.to_container(merged, resolve=True)
    return TypeAdapter(Settings).validate_python(content)

"""How much of everything a size of the study does: YAML beside this file, each key a field here."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from problems import Level
from pydantic import ConfigDict, TypeAdapter, ValidationError

from megatron_ledom.errors import UsageError
from megatron_ledom.evaluation.synthetic.generators import GENERATORS

HERE = Path(__file__).parent
CORPORA = ("text", "maths", "gsm", "abilities")
PROBLEM_PARTS = ("calibration", "development", "test", "valid", "train")


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
    num_gsm_symbolic: int
    """Problems drawn from reasoning-gym for the corpus `gsm`, before the calculator refuses some."""
    num_gsm_held_out: int
    """Of the problems of GSM8K, and as many of reasoning-gym's."""
    vocab_size: dict[str, int]
    """Of the tokenizer of each corpus: text, maths, gsm, abilities."""
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
    backward: tuple[int, int, int]
    """Results from which problems are written, the first and the last, and problems each."""
    gsm8k: str | None = None
    """File of GSM8K's training part; without it `gsm` is reasoning-gym's problems alone."""
    problems_seed: int = 1


def load_settings(size: str, overrides: list[str], gsm8k: str | None = None) -> Settings:
    """The YAML of a size, with `key=value` changes. Raises UsageError for what no field is, and for what cannot be made."""
    merged = OmegaConf.merge(OmegaConf.load(HERE / f"{size}.yaml"), OmegaConf.from_dotlist(overrides))
    content: Any = OmegaConf.to_container(merged, resolve=True)
    try:
        settings = TypeAdapter(Settings).validate_python(content | ({} if gsm8k is None else {"gsm8k": gsm8k}))
    except ValidationError as error:
        told = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
        raise UsageError(f"{told}; the settings are those of {HERE / f'{size}.yaml'}") from error
    _check(settings)
    return settings


def _check(settings: Settings) -> None:
    for name, found, wanted in (
        ("vocab_size", settings.vocab_size, CORPORA),
        ("train_iters", settings.train_iters, CORPORA),
        ("num_problems", settings.num_problems, PROBLEM_PARTS),
    ):
        if set(found) != set(wanted):
            raise UsageError(f"{name} has {', '.join(found)}; it needs {', '.join(wanted)}")
    if not settings.seeds or not settings.models or not settings.levels:
        raise UsageError("seeds, models and levels must each have an entry")
    abilities = settings.abilities
    if abilities.model not in settings.models:
        raise UsageError(f"abilities.model is {abilities.model}; it must be one of models: {', '.join(settings.models)}")
    if not abilities.num or set(abilities.num) != set(abilities.repeats):
        told = f"{', '.join(abilities.num)} and {', '.join(abilities.repeats)}"
        raise UsageError(f"abilities.num and abilities.repeats name {told}; both need the same sets, and at least one")
    if unknown := set(abilities.num) - set(GENERATORS):
        raise UsageError(f"abilities.num names {', '.join(sorted(unknown))}; there are {', '.join(GENERATORS)}")
    for name, seeds in (("seeds", settings.seeds), ("abilities.seeds", abilities.seeds)):
        if not seeds or len(set(seeds)) != len(seeds):
            raise UsageError(f"{name} is {seeds}; each seed stands once, and there is at least one")
    if min(settings.num_problems.values()) < 2:
        raise UsageError(f"num_problems is {settings.num_problems}; each part needs at least 2 problems a level")
    low, high, num = settings.backward
    if not 0 <= low <= high or num < 1:
        raise UsageError(
            f"backward is {list(settings.backward)}; it needs a first result, a last one not below it, and at least 1 each"
        )
    if settings.gsm8k is not None and not Path(settings.gsm8k).is_file():
        raise UsageError(f"{settings.gsm8k} is no file; give GSM8K's training part as JSON lines or Parquet, or leave it out")

"""The settings of a size of the study, from a YAML file in this folder. Each key is a field here."""

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
PROBLEM_PARTS = ("calibration", "development", "test", "valid", "train", "reinforcement")


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """The shape of a model."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int

    def overrides(self) -> list[str]:
        """Return the shape as overrides of a run's config."""
        names = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads")
        return [
            *(f"model.{name}={getattr(self, name)}" for name in names),
            f"model.num_query_groups={self.num_attention_heads}",
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class AbilitySettings:
    """Settings of part 3: its synthetic sets, and the models that learn all of them."""

    seeds: list[int]
    """Seeds of the models, the same for both directions. All are reported."""
    model: str
    """Name of the models' shape."""
    num: dict[str, int]
    """By set: the number of facts, problems, worlds or texts. Only sets that are named are generated."""
    repeats: dict[str, int]
    """By set: the number of copies of its texts in the corpus. A small set needs more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReinforcementSettings:
    """Settings of part 5: training with TRL's GRPO. The other settings are TRL's defaults."""

    seeds: list[int]
    """Seeds of the models and of the training. All are reported. Models of other seeds than those of the study are trained too."""
    steps: int
    """Optimizer steps of each arm."""
    num_questions: int
    """Questions per step, each used once."""
    num_generations: int
    """Answers to each question of a step."""
    learning_rate: float
    """The same for every arm; chosen with the right-answer reward on the development part of seed 1."""
    num_samples: int
    """Sampled answers to each test question."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ContaminationSettings:
    """Settings of part 6: twins that learn test problems."""

    seeds: list[int]
    """Seeds of the twins. All are reported. Clean twins of other seeds than those of the study are trained too."""
    model: str
    """Name of the twins' shape. If it is the one of part 2, the clean twins and their candidates are those of part 2."""
    reads: list[int]
    """Mean number of times that a training reads each problem of a group of planted ones. One more group is not planted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """One size of the study."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    seeds: list[int]
    """Seeds of the models, the same for both directions. All are reported."""
    models: dict[str, Model]
    """Shapes by name. The last one answers and scores in parts 2 and 4."""
    text_kilobytes: dict[str, int]
    """Kilobytes of prose of this machine, and of its code, by part: train, held_out."""
    num_gsm_symbolic: int
    """Problems drawn from reasoning-gym for the corpus `gsm`, including those that the calculator rejects."""
    num_gsm_held_out: int
    """Held-out problems of each source of the corpus `gsm`."""
    vocab_size: dict[str, int]
    """Vocabulary size by corpus: text, maths, gsm, abilities."""
    train_iters: dict[str, int]
    """Iterations by corpus."""
    levels: list[Level]
    """Levels of difficulty, easiest first. All are trained, with equally many problems."""
    num_problems: dict[str, int]
    """Problems per level by part: calibration, development, test, valid, train, reinforcement."""
    num_samples: int
    """Candidates per question."""
    temperature: float
    abilities: AbilitySettings
    reinforcement: ReinforcementSettings
    contamination: ContaminationSettings
    beams: tuple[int, int]
    """Beams and expansions of the step-level search."""
    backward: tuple[int, int, int]
    """The first and the last result for which problems are written, and the number of problems for each."""
    gsm8k: str | None = None
    """File of GSM8K's training part. Without it, `gsm` consists of reasoning-gym's problems."""
    problems_seed: int = 1


def load_settings(size: str, overrides: list[str], gsm8k: str | None = None) -> Settings:
    """Return the settings of a size with `key=value` changes. Raises UsageError for unknown keys and invalid values."""
    merged = OmegaConf.merge(OmegaConf.load(HERE / f"{size}.yaml"), OmegaConf.from_dotlist(overrides))
    content: Any = OmegaConf.to_container(merged, resolve=True)
    try:
        settings = TypeAdapter(Settings).validate_python(content | ({} if gsm8k is None else {"gsm8k": gsm8k}))
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
        raise UsageError(f"{problems}; the settings are those of {HERE / f'{size}.yaml'}") from error
    _check(settings)
    return settings


def _check(settings: Settings) -> None:
    for name, found, expected in (
        ("vocab_size", settings.vocab_size, CORPORA),
        ("train_iters", settings.train_iters, CORPORA),
        ("num_problems", settings.num_problems, PROBLEM_PARTS),
    ):
        if set(found) != set(expected):
            raise UsageError(f"{name} has {', '.join(found)}; it needs {', '.join(expected)}")
    if not settings.seeds or not settings.models or not settings.levels:
        raise UsageError("seeds, models and levels must have at least one entry each")
    abilities = settings.abilities
    if abilities.model not in settings.models:
        raise UsageError(f"abilities.model is {abilities.model}; it must be one of models: {', '.join(settings.models)}")
    if not abilities.num or set(abilities.num) != set(abilities.repeats):
        names = f"{', '.join(abilities.num)} and {', '.join(abilities.repeats)}"
        raise UsageError(f"abilities.num and abilities.repeats name {names}; both need the same sets, and at least one")
    if unknown := set(abilities.num) - set(GENERATORS):
        raise UsageError(f"abilities.num names {', '.join(sorted(unknown))}; the sets are {', '.join(GENERATORS)}")
    by_part = {"seeds": settings.seeds, "abilities.seeds": abilities.seeds, "reinforcement.seeds": settings.reinforcement.seeds}
    by_part["contamination.seeds"] = settings.contamination.seeds
    for name, seeds in by_part.items():
        if not seeds or len(set(seeds)) != len(seeds):
            raise UsageError(f"{name} is {seeds}; it needs at least one seed, and each only once")
    if min(settings.num_problems.values()) < 2:
        raise UsageError(f"num_problems is {settings.num_problems}; each part needs at least 2 problems per level")
    _check_reinforcement(settings)
    _check_contamination(settings)
    low, high, num = settings.backward
    if not 0 <= low <= high or num < 1:
        raise UsageError(
            f"backward is {list(settings.backward)}; it needs the first and the last result, in order, and at least 1 problem for each"
        )
    if settings.gsm8k is not None and not Path(settings.gsm8k).is_file():
        raise UsageError(f"{settings.gsm8k} is not a file; give GSM8K's training part as JSON lines or Parquet, or omit it")


def _check_reinforcement(settings: Settings) -> None:
    found = settings.reinforcement
    if min(found.steps, found.num_questions, found.num_samples) < 1 or found.num_generations < 2:
        raise UsageError("reinforcement needs at least 1 step, question and sample, and at least 2 num_generations")
    needed, problems = found.steps * found.num_questions, settings.num_problems["reinforcement"]
    if problems < needed:
        raise UsageError(
            f"num_problems.reinforcement={problems} is too small: {found.steps} steps of {found.num_questions} questions need {needed}"
        )


def _check_contamination(settings: Settings) -> None:
    found = settings.contamination
    if found.model not in settings.models:
        raise UsageError(f"contamination.model is {found.model}; it must be one of models: {', '.join(settings.models)}")
    if not found.reads or min(found.reads) < 1 or len(set(found.reads)) != len(found.reads):
        raise UsageError(f"contamination.reads is {found.reads}; it needs different numbers of 1 or more")

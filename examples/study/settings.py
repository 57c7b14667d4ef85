"""The settings of a size of the study, from a YAML file in this folder. Each key is a field here."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from plan_tasks import TASKS, Siblings, Star
from problems import Level
from pydantic import ConfigDict, TypeAdapter, ValidationError

from megatron_ledom.errors import UsageError
from megatron_ledom.evaluation.synthetic.generators import GENERATORS

HERE = Path(__file__).parent
CORPORA = ("text", "maths", "gsm", "abilities")
ALONE_PARTS = ("reinforcement", "contamination", "controls", "loss_gap", "infill", "two_way", "teacher")
"""Parts that can run alone."""
TWO_WAY_PARTS = ("development", "test", "held_out", "train")
CONTROL_PARTS = ("labelled", "development", "test", "planted", "train")
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
class ControlSettings:
    """Settings of part 7: scorers of equal training, beside the reverse model."""

    seeds: list[int]
    """Seeds of the models and of their training problems. All are reported."""
    model: str
    """Name of the shape of every model."""
    levels: list[Level]
    """Levels of the problems. All are trained and tested, with equally many problems."""
    num: dict[str, int]
    """Problems per level by part: labelled (trains the verifier), development, test, planted, train (for each seed)."""
    vocab_size: int
    train_iters: int
    """Iterations of every model; the verifier reads as many tokens."""
    batch_size: int
    """Samples of a step, of 256 tokens each."""
    num_samples: int
    """Answers to each question."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LossGapSettings:
    """Settings of part 8: the gap of the losses over contexts and sizes, with two controls."""

    seeds: list[int]
    """Seeds of the models, the same for both directions. All are reported."""
    models: list[str]
    """Names of the shapes, the smallest first."""
    contexts: list[int]
    """Tokens of a sample, the shortest first."""
    corpora: list[str]
    """Corpora of part 1, of text and gsm."""
    tokens: int
    """Tokens that each model reads, the same for all contexts and sizes."""
    batch_tokens: int
    """Tokens of a step, the same for all contexts."""
    control_model: str
    """Name of the shape of the models of both controls."""
    control_context: int
    """Tokens of a sample of both controls."""
    control_tokens: int
    """Tokens that each model of a control reads."""
    num_lines: int
    """Products of primes, and walks of the Markov chain, in the training part of each control."""
    largest_prime: int
    num_states: int
    """States of the Markov chain."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InfillSettings:
    """Settings of part 9: infilling by models that meet, beside a model trained to fill in the middle."""

    seeds: list[int]
    """Seeds of the models, the same for all methods. All are reported."""
    model: str
    """Name of the shape of every model."""
    vocab_size: int
    train_iters: int
    """Iterations of every model."""
    batch_size: int
    """Samples of a step, of 256 tokens each."""
    num_items: int
    """Most gaps in code, and as many in prose."""
    num_samples: int
    """Texts of each direction."""
    two_way: bool
    """Also train and test one model that reads both ways."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TwoWaySettings:
    """Settings of part 10: two-way models, twins, and a forward model alone."""

    seeds: list[int]
    """Seeds of the models. All are reported."""
    model: str
    """Name of the shape of every model."""
    levels: list[Level]
    """Levels of the problems, with equally many problems."""
    num: dict[str, int]
    """Problems per level by part: development, test, held_out (losses), train."""
    repeats: int
    """Copies of the facts of part 3's set `reversal` in the corpus."""
    vocab_size: int
    train_iters: int
    """Iterations of the twins and of the two-way model of equal tokens. The others have twice as many."""
    batch_size: int
    """Samples of a step, of 256 tokens each."""
    num_samples: int
    """Answers to each question."""
    units: list[str]
    """Units of further two-way models, whose reverse documents have them: some of word, entity, segment."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherSettings:
    """Settings of the part `teacher`: a reverse model as a teacher of forward models."""

    tasks: list[str]
    """Some of TASKS."""
    seeds: list[int]
    """Seeds of the models. All are reported."""
    shape: Model
    """The shape of every model."""
    star: Star
    siblings: Siblings
    num: dict[str, int]
    """Texts of a task by part: train, and test, which is also the number of samples of sibling discovery."""
    train_iters: int
    """Iterations of every model."""
    batch_texts: int
    """Texts of a step."""
    lr: float
    """Peak learning rate, the same for every model."""
    weight: float
    """Factor of the loss of multi-token prediction, and of that of the teacher's states."""


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
    controls: ControlSettings
    loss_gap: LossGapSettings
    infill: InfillSettings
    two_way: TwoWaySettings
    teacher: TeacherSettings
    parts: list[str]
    """Those of ALONE_PARTS that run unless `--parts` names others; the report says of the rest that they were not run."""
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


def named_parts(text: str) -> list[str]:
    """Return the parts that a list with commas names. Raises UsageError for a name that is none of ALONE_PARTS."""
    names = text.split(",")
    if unknown := [name for name in names if name not in ALONE_PARTS]:
        raise UsageError(f"--parts names {', '.join(map(repr, unknown))}; it can name {', '.join(ALONE_PARTS)}")
    return names


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
    parts = ("contamination", "controls", "loss_gap", "infill", "two_way", "teacher")
    by_part |= {f"{name}.seeds": getattr(settings, name).seeds for name in parts}
    for name, seeds in by_part.items():
        if not seeds or len(set(seeds)) != len(seeds):
            raise UsageError(f"{name} is {seeds}; it needs at least one seed, and each only once")
    if min(settings.num_problems.values()) < 2:
        raise UsageError(f"num_problems is {settings.num_problems}; each part needs at least 2 problems per level")
    _check_reinforcement(settings)
    _check_contamination(settings)
    _check_controls(settings)
    _check_two_way(settings)
    _check_teacher(settings.teacher)
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


def _check_two_way(settings: Settings) -> None:
    found = settings.two_way
    if found.model not in settings.models:
        raise UsageError(f"two_way.model is {found.model}; it must be one of models: {', '.join(settings.models)}")
    if set(found.num) != set(TWO_WAY_PARTS) or min(found.num.values()) < 2:
        raise UsageError(f"two_way.num is {found.num}; it needs {', '.join(TWO_WAY_PARTS)}, with at least 2 problems each")
    if not found.levels or min(found.repeats, found.train_iters, found.batch_size, found.num_samples) < 1:
        raise UsageError("two_way needs at least one level, and at least 1 as repeats, train_iters, batch_size and num_samples")
    if unknown := set(found.units) - {"word", "entity", "segment"}:
        raise UsageError(f"two_way.units names {', '.join(sorted(unknown))}; it can name word, entity, segment")
    if "reversal" not in settings.abilities.num:
        raise UsageError("two_way uses the facts of part 3, so abilities.num needs the set reversal")


def _check_controls(settings: Settings) -> None:
    """Check the settings of parts 7 and 8, and the names of the parts."""
    controls, gap = settings.controls, settings.loss_gap
    if unknown := set(settings.parts) - set(ALONE_PARTS):
        raise UsageError(f"parts names {', '.join(sorted(unknown))}; it can name {', '.join(ALONE_PARTS)}")
    models = {"controls.model": [controls.model], "loss_gap.models": gap.models, "loss_gap.control_model": [gap.control_model]}
    models["infill.model"] = [settings.infill.model]
    for name, found in models.items():
        if not found or not set(found) <= set(settings.models):
            raise UsageError(
                f"{name} is {', '.join(found) or 'empty'}; it must name some of models: {', '.join(settings.models)}"
            )
    if set(controls.num) != set(CONTROL_PARTS) or min(controls.num.values()) < 2:
        raise UsageError(f"controls.num is {controls.num}; it needs {', '.join(CONTROL_PARTS)}, with at least 2 problems each")
    if not controls.levels or min(controls.num_samples, controls.train_iters, controls.batch_size) < 1:
        raise UsageError("controls needs at least one level, and at least 1 as num_samples, train_iters and batch_size")
    if not gap.corpora or not set(gap.corpora) <= {"text", "gsm"}:
        raise UsageError(f"loss_gap.corpora is {gap.corpora}; it must name some of text, gsm")
    if not gap.contexts or gap.contexts != sorted(set(gap.contexts)):
        raise UsageError(f"loss_gap.contexts is {gap.contexts}; it needs different numbers, in order")
    if wrong := [one for one in (*gap.contexts, gap.control_context) if one < 8 or gap.batch_tokens % one]:
        raise UsageError(
            f"loss_gap has the contexts {wrong}; each must be 8 or more and divide batch_tokens={gap.batch_tokens}"
        )


def _check_teacher(found: TeacherSettings) -> None:
    """Check the sizes of both tasks."""
    star, siblings = found.star, found.siblings
    if not found.tasks or not set(found.tasks) <= set(TASKS) or len(set(found.tasks)) != len(found.tasks):
        raise UsageError(f"teacher.tasks is {found.tasks}; it must name some of {', '.join(TASKS)}, each only once")
    needed = 1 + star.degree * (star.length - 1)
    if star.degree < 2 or star.length < 3 or star.nodes < needed:
        raise UsageError(
            f"teacher.star has degree={star.degree}, length={star.length} and nodes={star.nodes}; it needs at least 2 arms of 3 nodes, and"
            f" {needed} names for these arms"
        )
    if siblings.parents < 2 or siblings.children < 3:
        raise UsageError("teacher.siblings needs at least 2 parents and 3 children of each")
    if set(found.num) != {"train", "test"} or min(found.num.values()) < 2:
        raise UsageError(f"teacher.num is {found.num}; it needs train and test, with at least 2 texts each")

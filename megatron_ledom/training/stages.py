"""A stage file: runs that follow each other, each from the last weights of the one before.

The stage to train follows from the run folders alone, so the same command resumes in it. When a stage is complete, each rank
replaces its process by a new one for the next stage: memory of the device and state of libraries start afresh.
"""

import json
import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, NoReturn

from pydantic import ConfigDict, TypeAdapter, ValidationError

from megatron_ledom.checkpoint.folder import checkpoint_name, latest_checkpoint, saved_iteration
from megatron_ledom.checkpoint.manifest import load_manifest
from megatron_ledom.config.checks import check_config
from megatron_ledom.config.derived import checkpoint_folder
from megatron_ledom.config.load import load_config, merged_values
from megatron_ledom.config.schema import STRICT, RunConfig
from megatron_ledom.config.shipped import config_path
from megatron_ledom.errors import ConfigError, MismatchError
from megatron_ledom.training.origin import check_continues, check_follows, check_same_origin
from megatron_ledom.training.resilience import STOP_SIGNALS, StopRequest

log = logging.getLogger(__name__)

FORM = (
    "expected `stages:`, a list in which each stage has `config: FILE` and, optionally, `overrides: [section.key=value, ...]` and"
    " `name: TEXT`"
)


FOLLOWS = "LEDOM_STAGE"
"""Environment variable from the process of a stage to that of the next one; `take_place` removes it."""


@dataclass(frozen=True, slots=True)
class Place:
    """The place of a process in its launch. stage: its number; None in the first process, which finds it by itself."""

    stage: int | None
    since: float
    """time.monotonic() at the start of the launch."""
    replacements: int
    """Number of processes of this rank before it."""


def take_place() -> Place:
    """Return the place of this process, which it can ask for once."""
    found = os.environ.pop(FOLLOWS, None)
    return Place(None, time.monotonic(), 0) if found is None else Place(**json.loads(found))


@dataclass(kw_only=True, slots=True)
class _Entry:
    """One stage as the file has it."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    config: str
    overrides: list[str] = field(default_factory=list)
    name: str | None = None


@dataclass(kw_only=True, slots=True)
class _Content:
    """The content of a stage file."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    stages: list[_Entry]


_ADAPTER: TypeAdapter[_Content] = TypeAdapter(_Content)


@dataclass(frozen=True, slots=True)
class Stage:
    """One of the runs that a command trains."""

    number: int
    """From 1."""
    count: int
    """Number of stages; 1 for a run without a stage file."""
    name: str
    config: RunConfig

    @property
    def title(self) -> str:
        """A text such as `stage 2 of 3 (anneal)`."""
        return f"stage {self.number} of {self.count} ({self.name})"

    @property
    def last_checkpoint(self) -> str:
        """The checkpoint that the stage writes at its end."""
        return os.path.join(checkpoint_folder(self.config), checkpoint_name(self.config.train.train_iters))

    def is_complete(self) -> bool:
        """Return True if the latest checkpoint is that of the last iteration. A run that was stopped is not complete."""
        return saved_iteration(checkpoint_folder(self.config)) == self.config.train.train_iters


def only_stage(config: RunConfig) -> list[Stage]:
    """Return a run without a stage file as its only stage."""
    return [Stage(1, 1, os.path.basename(config.run_dir), config)]


def load_stages(path: str, overrides: Sequence[str] = ()) -> list[Stage]:
    """Return the stages of a file in order; `overrides` are applied last to each of them.

    A config is a path relative to the stage file, or the name of a config that comes with the package. A stage without
    `init_from` starts from the last checkpoint of the stage before it. Raises ConfigError.
    """
    values = merged_values(Path(path))
    try:
        entries = _ADAPTER.validate_json(json.dumps(values), strict=True).stages
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{path}: {place}: {first['msg']}; {FORM}") from error
    if not entries:
        raise ConfigError(f"{path} has no stages; {FORM}")
    stages: list[Stage] = []
    for number, entry in enumerate(entries, 1):
        beside = Path(path).parent / entry.config
        given = str(beside if beside.is_file() else config_path(entry.config))
        config = load_config(given, [*entry.overrides, *overrides])
        is_chosen = any(override.startswith("init_from=") for override in entry.overrides)
        if (earlier := _stage_of(config.init_from, stages)) is not None:
            config.init_from = earlier.last_checkpoint
        elif stages and not is_chosen:
            if config.init_from is not None:
                raise ConfigError(
                    f"{path}: stage {number} has init_from={config.init_from} from {given} or the command line, so it would not start from"
                    f" {stages[-1].title}; write init_from into the overrides of the stages that begin elsewhere, and only there"
                )
            config.init_from = stages[-1].last_checkpoint
        stages.append(Stage(number, len(entries), entry.name or os.path.basename(os.path.normpath(config.run_dir)), config))
    _refuse_shared_folders(path, stages)
    return stages


def _stage_of(folder: str | None, stages: Sequence[Stage]) -> Stage | None:
    """Return the stage whose run folder, or whose last checkpoint, `folder` is."""
    for stage in stages:
        if folder is not None and os.path.realpath(folder) in map(
            os.path.realpath, (stage.config.run_dir, stage.last_checkpoint)
        ):
            return stage
    return None


def stage_before(stage: Stage, stages: Sequence[Stage]) -> Stage | None:
    """Return the earlier stage from which a stage starts; None if it starts from scratch or from another run."""
    return _stage_of(stage.config.init_from, stages[: stage.number - 1])


def _refuse_shared_folders(path: str, stages: Sequence[Stage]) -> None:
    """Refuse two stages with one run folder or one mirror, of which each belongs to one run."""
    first: dict[tuple[str, str], Stage] = {}
    for stage in stages:
        places = {"run_dir": os.path.realpath(stage.config.run_dir), "checkpoint.mirror": stage.config.checkpoint.mirror}
        for key, place in places.items():
            other = stage if place is None else first.setdefault((key, place.rstrip("/")), stage)
            if other is not stage:
                raise ConfigError(
                    f"{path}: {other.title} and {stage.title} have the same {key}={place}; set another in the overrides of one of them"
                )


def check_stages(stages: Sequence[Stage], world_size: int) -> None:
    """Check the config of each stage for this number of ranks, and that each fits the stage from which it starts."""
    for stage in stages:
        try:
            check_config(stage.config, world_size)
            earlier = stage_before(stage, stages)
            if earlier is not None:
                check_follows(earlier.config, stage.config, earlier.title)
                check_continues(earlier.config.train.train_iters, stage.config, earlier.title)
        except (ConfigError, MismatchError) as error:
            raise type(error)(f"{stage.title}: {error}" if stage.count > 1 else str(error)) from error


def current_stage(stages: Sequence[Stage]) -> Stage | None:
    """Return the stage to train next; None if all are complete.

    It is the last one that has a checkpoint, or the one after it if that is complete: the checkpoints of stages before may have
    been deleted, if a later stage has started from them. Raises MismatchError if a run did not start from the checkpoint that the file
    names, or if an earlier stage is not complete.
    """
    reached, done = 1, set[str]()
    for stage in stages:
        checkpoint = latest_checkpoint(checkpoint_folder(stage.config))
        check_same_origin(stage.config, checkpoint)
        if checkpoint is not None:
            reached = stage.number + stage.is_complete()
            done |= {os.path.realpath(record["path"]) for record in load_manifest(checkpoint).started_from}
    for stage in stages[: reached - 1]:
        if not stage.is_complete() and os.path.realpath(stage.last_checkpoint) not in done:
            raise MismatchError(
                f"{stage.title} is not complete, but {stages[min(reached, len(stages)) - 1].title} has begun or is next, and did not start"
                f" from it: train run_dir={stage.config.run_dir} to its end with its own config, or name that stage after the others"
            )
    return stages[reached - 1] if reached <= len(stages) else None


def progress(stages: Sequence[Stage]) -> tuple[int, int]:
    """Return the saved iterations of all stages, and the iterations of all stages. A stage before the current one counts fully."""
    current = current_stage(stages)
    lengths = [stage.config.train.train_iters for stage in stages]
    if current is None:
        return sum(lengths), sum(lengths)
    return sum(lengths[: current.number - 1]) + saved_iteration(checkpoint_folder(current.config)), sum(lengths)


def replace_process(stage: Stage, since: float, replacements: int, stop: StopRequest) -> NoReturn:
    """Replace this process by one of the same command that trains `stage`. Call on every rank.

    since: time.monotonic() at the start of the launch. replacements: their number in this launch, with this one. Stop signals are blocked
    until the new process has its `StopRequest`, and one that has been received is sent again. Files and sockets of the old process are
    closed: libraries leave some open for its successor, which would keep ports and device memory.
    """
    log.info("%s begins in a new process", stage.title)
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    for number in map(int, os.listdir("/proc/self/fd")):
        if number > 2:
            with suppress(OSError):  # the one of listdir is closed
                os.set_inheritable(number, False)
    environment = {**os.environ, FOLLOWS: json.dumps({"stage": stage.number, "since": since, "replacements": replacements})}
    if stop.received is not None:
        signal.raise_signal(stop.received)  # to this thread, which blocks it: os.kill could give it to another one
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)

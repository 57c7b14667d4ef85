"""The history of a run in its folder, written by rank 0: its launches, its steps, and the iterations to skip.

`launches.jsonl` has one line per launch: command, versions and config. `steps.jsonl` has one line per iteration. A resumed
run reads it to score its steps against the same window as an uninterrupted run, and a replay compares its loss and gradient norm
with it. A resume drops the lines after the checkpoint. `bad_steps.jsonl` is never shortened. `skip_iterations.json` lists the
iterations that the run skips after returns to a checkpoint.
"""

import json
import os
import platform
import shlex
import socket
import subprocess
import sys
from bisect import bisect_right
from collections import deque
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import torch
import torch.distributed as dist

import megatron_ledom
from megatron_ledom.config.load import to_dict
from megatron_ledom.config.schema import RunConfig
from megatron_ledom.errors import DataError, cannot_write
from megatron_ledom.parallel.collectives import from_first_rank
from megatron_ledom.platform.launch import Launch
from megatron_ledom.platform.slurm import job_id
from megatron_ledom.storage.files import write_json
from megatron_ledom.storage.records import (
    BAD_STEPS,
    LAUNCHES,
    METRICS,
    SAVES,
    STEPS,
    Record,
    append_record,
    has_iteration,
    iteration_of,
    plain,
    read_records,
)
from megatron_ledom.training.log_guard import GuardedLog, RecordLog
from megatron_ledom.training.step_policy import PastStep

PACKAGES = ("megatron-core", "numpy", "transformers", "transformer-engine")
SKIPPED_FILE = "skip_iterations.json"
REPLAYABLE = 2
"""Number of newest bad steps for which the checkpoint before them is kept."""


def write_launch(config: RunConfig, launch: Launch, iteration: int, checkpoint: str | None) -> None:
    """Append this launch, which resumes from `iteration` of the checkpoint. Call on one rank.

    Raises the error that `cannot_write` returns if the file cannot be written.
    """
    path = os.path.join(config.run_dir, LAUNCHES)
    try:
        append_record(path, describe_launch(config, launch, iteration, checkpoint))
    except OSError as error:
        raise cannot_write(error, path) from error


def read_launches(run_dir: str) -> list[Record]:
    """Return every launch of a run folder, oldest first. Raises DataError with file and line of a damaged record."""
    return read_records(os.path.join(run_dir, LAUNCHES), _as_launch)


def _as_launch(record: Record) -> Record:
    """Return the record. Raises TypeError if a value that this package uses has the wrong type."""
    settings = record.get("config", {})
    checkpoint = settings.get("checkpoint", {}) if isinstance(settings, dict) else None
    if not isinstance(checkpoint, dict):
        raise TypeError("its config is not that of a run")
    numbers = {
        "from_iteration": record.get("from_iteration", 0),
        "world_size": record.get("world_size", 1),
        "config.checkpoint.save_interval": checkpoint.get("save_interval", 0),
    }
    for name, number in numbers.items():
        if type(number) is not int:
            raise TypeError(f"its {name} is {number!r}")
    return record


def describe_launch(config: RunConfig, launch: Launch, iteration: int, checkpoint: str | None) -> Record:
    """Return the record of a launch: time, command, position, machine, versions, git state and config."""
    cuda = torch.cuda.is_available()
    return {
        "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(sys.orig_argv),
        "folder": os.getcwd(),
        "world_size": launch.world_size,
        "from_iteration": iteration,
        "from_checkpoint": checkpoint and os.path.basename(checkpoint),
        "host": socket.gethostname(),
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
        "slurm_job_id": job_id(os.environ),
        "versions": {
            "megatron_ledom": megatron_ledom.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "nccl": ".".join(map(str, torch.cuda.nccl.version())) if cuda else None,  # type: ignore[no-untyped-call]
            **{name: _version(name) for name in PACKAGES},
        },
        "git": git_state(Path(megatron_ledom.__file__).parent),
        "config": to_dict(config),
    }


def git_state(folder: Path) -> Record | None:
    """Return the commit and the files that differ from it; None outside a git repository, or without git."""
    commit = _git(folder, "rev-parse", "HEAD")
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    if commit is None or changes is None:
        return None
    return {"commit": commit, "dirty": bool(changes), "changed": [line[2:].strip() for line in changes.splitlines()]}


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.rstrip() if done.returncode == 0 else None


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


@dataclass(slots=True)
class SkippedIterations:
    """The iterations that a run skips after returns to a checkpoint, and the number of returns to each checkpoint."""

    iterations: list[int] = field(default_factory=list)
    roll_backs: dict[str, int] = field(default_factory=dict)
    """Number of returns by the iteration of the checkpoint."""


class RunHistory:
    """The steps of one run folder. Call every method on every rank; only rank 0 reads and writes files."""

    def __init__(self, run_dir: str, skip_iterations: Iterable[int]) -> None:
        self.run_dir = run_dir
        self._configured = frozenset(skip_iterations)
        self.skip_iterations = self._configured
        """Iterations that are not computed: those of the config, and those added after returns to a checkpoint."""
        self._set_skipped(SkippedIterations())
        self.launch = 0
        """Number of this launch; set on rank 0."""
        self.newest_bad_steps: deque[int] | None = None
        """Iterations of the newest bad steps; set on rank 0, which reads their file once per launch."""
        self._skipped_updates = 0
        self._steps: RecordLog | None = None
        self._bad = GuardedLog(os.path.join(run_dir, BAD_STEPS))

    def resume_from(self, iteration: int, num_steps: int) -> list[PastStep]:
        """Drop the steps after `iteration`. Returns the last `num_steps` steps up to it, the same on every rank."""

        def read() -> tuple[list[PastStep], int, SkippedIterations]:
            """Read the files, on rank 0."""
            past = [step for step in read_steps(self.run_dir) if step.iteration <= iteration]
            if self.newest_bad_steps is None:
                self.newest_bad_steps = deque(map(iteration_of, read_bad_steps(self.run_dir)), maxlen=REPLAYABLE)
                self.launch = len(read_records(os.path.join(self.run_dir, LAUNCHES)))
            lost = 0 if self._steps is None else self._steps.lost
            self._close_steps()
            self._steps = RecordLog(os.path.join(self.run_dir, STEPS), iteration, lost)
            return past[-num_steps:], sum(step.skipped for step in past), load_skipped_iterations(self.run_dir)

        steps, self._skipped_updates, skipped = from_first_rank(read)
        self._set_skipped(skipped)
        return steps

    def num_skipped(self, iteration: int) -> int:
        """Return the number of iterations up to this one without an update."""
        return self._skipped_updates + bisect_right(self._in_order, iteration)

    def _set_skipped(self, skipped: SkippedIterations) -> None:
        self.skipped = skipped
        self.skip_iterations = self._configured.union(skipped.iterations)
        self._in_order = sorted(self.skip_iterations)

    def write_step(self, step: PastStep) -> None:
        """Write an accepted step, with or without an update."""
        self._skipped_updates += step.skipped
        if self._steps is not None:
            self._steps.write({**asdict(step), "lm_loss": plain(step.lm_loss), "grad_norm": plain(step.grad_norm)})

    def write_bad_step(self, record: Record) -> None:
        """Write a bad step to disk, for diagnosis and replay."""
        if dist.get_rank() == 0:
            self._bad.attempt(lambda: append_record(self._bad.where, record))
            if self.newest_bad_steps is not None:
                self.newest_bad_steps.append(iteration_of(record))

    def add_skips(self, iterations: Iterable[int], checkpoint: int) -> None:
        """Skip these iterations from now on, and count one more return to the checkpoint of the given iteration.

        Raises the error that `cannot_write` returns on every rank: the next start would otherwise train on these iterations.
        """
        returns = {**self.skipped.roll_backs, str(checkpoint): self.num_roll_backs(checkpoint) + 1}
        self._set_skipped(SkippedIterations(sorted({*self.skipped.iterations, *iterations}), returns))
        from_first_rank(self._write_skipped)

    def _write_skipped(self) -> None:
        write_json(os.path.join(self.run_dir, SKIPPED_FILE), asdict(self.skipped), indent=None)

    def num_roll_backs(self, checkpoint: int) -> int:
        """Return how often the run returned to the checkpoint of this iteration."""
        return self.skipped.roll_backs.get(str(checkpoint), 0)

    def lost(self) -> dict[str, int]:
        """Return the number of records that could not be written, by file, on rank 0."""
        logs = [log for log in (self._steps, self._bad) if log is not None]
        return {log.where: log.lost for log in logs if log.lost}

    def sync(self) -> None:
        """Force the steps to disk, before a checkpoint that depends on them."""
        if self._steps is not None:
            self._steps.sync()

    def close(self) -> None:
        """Close the file of steps, and log how many records could not be written."""
        self._close_steps()
        for log in (self._steps, self._bad):
            if log is not None:
                log.report_lost()

    def _close_steps(self) -> None:
        if self._steps is not None:
            self._steps.close()


def read_steps(run_dir: str) -> list[PastStep]:
    """Return every step of a run folder, in order."""
    return read_records(os.path.join(run_dir, STEPS), _as_step)


def _as_step(record: Record) -> PastStep:
    step = PastStep(**{**record, "lm_loss": float(record["lm_loss"]), "grad_norm": float(record["grad_norm"])})
    iteration_of(record)
    if type(step.skipped) is not bool or type(step.score) not in (int, float, type(None)):
        raise TypeError(f"its skipped is {step.skipped!r}, its score {step.score!r}")
    return step


def read_bad_steps(run_dir: str) -> list[Record]:
    """Return every bad step of a run folder, oldest first, including those undone by a return to a checkpoint."""
    return read_records(os.path.join(run_dir, BAD_STEPS), has_iteration)


def load_skipped_iterations(run_dir: str) -> SkippedIterations:
    """Return the iterations to skip after returns to a checkpoint. Raises DataError for a damaged file."""
    path = os.path.join(run_dir, SKIPPED_FILE)
    try:
        with open(path, encoding="utf-8") as file:
            skipped = SkippedIterations(**json.load(file))
        if any(type(number) is not int for number in [*skipped.iterations, *skipped.roll_backs.values()]):
            raise TypeError("an iteration or a count is not a whole number")
        return skipped
    except FileNotFoundError:
        return SkippedIterations()
    except (TypeError, ValueError, AttributeError, RecursionError, IsADirectoryError) as error:
        raise DataError(
            f"{path} is damaged ({error}). It lists the iterations that are skipped after returns to a checkpoint: restore it, or"
            " delete it and list them in train.skip_iterations"
        ) from error


def check_history(config: RunConfig, checkpoint: str | None, first_iteration: int = 0) -> None:
    """Refuse a run folder whose history is damaged, or whose checkpoints are gone. Call on one rank.

    `checkpoint` is the one to resume from, or None to start, at `first_iteration`. Raises DataError for a damaged file, and if
    `checkpoint` is None although the run had checkpoints.
    """
    run_dir = config.run_dir
    steps, launches = read_steps(run_dir), read_launches(run_dir)
    metrics = read_records(os.path.join(run_dir, METRICS), iteration_of)
    saved = read_records(os.path.join(run_dir, SAVES), iteration_of)
    read_bad_steps(run_dir)
    load_skipped_iterations(run_dir)
    if checkpoint is not None:
        return
    last = max([step.iteration for step in steps[-1:]] + metrics[-1:] + saved, default=0)
    intervals = [launch.get("config", {}).get("checkpoint", {}).get("save_interval", 0) for launch in launches]
    had_some = saved or any(launch.get("from_iteration", 0) > 0 or launch.get("from_checkpoint") for launch in launches)
    # runs of versions without `saves.jsonl`: their second save waited for the first
    if had_some or last - first_iteration > 2 * max([*intervals, config.checkpoint.save_interval]):
        raise DataError(
            f"{run_dir} is the folder of a run that reached iteration {last} and had checkpoints, but {run_dir}/checkpoints has none:"
            " restore them (is their disk mounted?), or set another run_dir for a new run"
        )

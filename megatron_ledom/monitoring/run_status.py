"""The status of a run, read from its folder: state, progress, loss, speed, spikes, last checkpoint, slowest ranks, disk.

Nothing is written, and no file is read whole, so months of records take milliseconds. The folder may be written at the same time,
damaged or gone: each part that cannot be read becomes one of `problems`.
"""

import math
import os
import shutil
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import yaml

from megatron_ledom.checkpoint.folder import finished_checkpoints, latest_checkpoint
from megatron_ledom.errors import LedomError
from megatron_ledom.monitoring.heartbeat import HEARTBEAT, Heartbeat, read_heartbeat
from megatron_ledom.monitoring.state import State, StateOfRun, judge
from megatron_ledom.storage.records import BAD_STEPS, LAUNCHES, METRICS, SAVES, STEPS, Record
from megatron_ledom.storage.tail import count_lines, last_records, spread_records

RECENT = 20
"""Number of last records that loss, speed and slowest rank are taken from."""
CURVE_POINTS = 160
MOST_TEXT = 600
"""Longest reason or problem that is shown, in characters."""
GIB = 2**30
Result = TypeVar("Result")
NOTHING: tuple[list[Record], int] = ([], 0)


@dataclass(slots=True)
class RunStatus:
    """The status of one run folder. Numbers that are not known are None; the fields are those of `ledom status --json`."""

    run: str
    """The folder, as it was given."""
    state: str = State.UNREADABLE
    is_healthy: bool = False
    reason: str = ""
    iteration: int | None = None
    train_iters: int | None = None
    eta_seconds: float | None = None
    """Seconds of training until the last iteration, without validations and saves; None unless the run is running."""
    lm_loss: float | None = None
    """Mean of the last finite losses."""
    valid_loss: float | None = None
    """Mean loss over the sets of the last validation among the last records."""
    tokens_per_second: float | None = None
    seconds_per_iteration: float | None = None
    mfu: float | None = None
    bad_steps: int = 0
    """Number of steps that were not finite or a spike."""
    last_bad_step: dict[str, Any] | None = None
    checkpoint_iteration: int | None = None
    checkpoint_age_seconds: float | None = None
    slowest_rank: int | None = None
    """The rank that was slowest in most of the last records."""
    slowest_ratio: float | None = None
    """Its step time in relation to the mean of all ranks."""
    heartbeat_age_seconds: float | None = None
    activity: str = ""
    idle_seconds: float | None = None
    host: str = ""
    world_size: int | None = None
    slurm_job_id: str | None = None
    slurm_state: str | None = None
    launches: int = 0
    disk_free_bytes: int | None = None
    disk_needed_bytes: int | None = None
    """Free space below which the run is not healthy."""
    alerted: bool = False
    """True if the run itself has delivered the alert of its end."""
    problems: list[str] = field(default_factory=list)
    curve: list[tuple[int, float]] = field(default_factory=list)
    """Iterations and losses over the whole run, for a plot."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Times and sizes beyond which a run is not healthy."""

    stale_seconds: float = 120.0
    """Age of a heartbeat from which its process counts as gone."""
    stall_seconds: float | None = None
    """Seconds without progress from which a run counts as stalled. Default: alerts.stall_seconds of the run."""
    min_free_disk_gib: float | None = None
    """Default: alerts.min_free_disk_gib of the run."""
    ended_with: int | None = None
    """Exit code of the launch, if it is known to have ended."""


def read_status(
    run_dir: str, limits: Limits, job_states: Callable[[list[str]], Mapping[str, str]], *, now: float | None = None
) -> RunStatus:
    """Return the status of a run folder. Raises nothing but errors of this program."""
    status = RunStatus(run_dir)
    if not os.path.isdir(run_dir):
        status.reason = "the folder does not exist (or its disk is not mounted)"
        return status
    at = time.time() if now is None else now
    settings = _Reader(status)(lambda: _read_settings(run_dir)) or {}
    heartbeat = _Reader(status)(lambda: read_heartbeat(run_dir))
    _read_metrics(status, run_dir)
    _read_history(status, run_dir, at)
    _read_disk(status, run_dir, settings, limits)
    _take_heartbeat(status, heartbeat, at)
    if status.slurm_job_id is not None:
        status.slurm_state = job_states([status.slurm_job_id]).get(status.slurm_job_id)
    found = _judge(status, run_dir, settings, heartbeat, limits, at)
    status.state, status.reason, status.is_healthy = found.state, found.reason[:MOST_TEXT], found.is_healthy
    if status.disk_free_bytes is not None and status.disk_free_bytes < (status.disk_needed_bytes or 0):
        status.problems.append(
            f"disk low: {status.disk_free_bytes / GIB:.1f} GiB are free, fewer than {(status.disk_needed_bytes or 0) / GIB:.1f}"
        )
        status.is_healthy = False
    if status.state != State.RUNNING:
        status.eta_seconds = None
    return status


class _Reader:
    """Reads one part of a run; an error becomes a problem of its status."""

    def __init__(self, status: RunStatus) -> None:
        self._status = status

    def __call__(self, read: Callable[[], Result]) -> Result | None:
        try:
            return read()
        except LedomError as error:
            self._status.problems.append(str(error)[:MOST_TEXT])
        except OSError as error:
            self._status.problems.append(f"{error.filename or self._status.run}: {error.strerror or error}"[:MOST_TEXT])
        except (yaml.YAMLError, ValueError, TypeError, KeyError, RecursionError) as error:
            self._status.problems.append(f"{type(error).__name__}: {' '.join(str(error).split())}"[:MOST_TEXT])
        return None


def _read_settings(run_dir: str) -> dict[str, Any]:
    """Return config.yaml as plain values; {} without the file. The config of any version will do."""
    try:
        values = yaml.load(Path(run_dir, "config.yaml").read_bytes(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except FileNotFoundError:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"{run_dir}/config.yaml has no sections")
    return values


def setting(settings: Mapping[str, Any], section: str, key: str) -> float | None:
    """Return a number of a config; None if it is missing or no number."""
    keys = settings.get(section)
    value = keys.get(key) if isinstance(keys, dict) else None
    return _number(value)


def _number(value: Any) -> float | None:
    """Return a finite number; None for everything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 2**63:
        return None
    return value


def _numbers(records: list[Record], key: str) -> list[float]:
    return [value for value in (_number(record.get(key)) for record in records) if value is not None]


def _last(records: list[Record], key: str) -> float | None:
    return next(iter(reversed(_numbers(records, key))), None)


def _read_metrics(status: RunStatus, run_dir: str) -> None:
    """Fill in what metrics.jsonl says."""
    path = os.path.join(run_dir, METRICS)
    records, damaged = _Reader(status)(lambda: last_records(path, RECENT)) or NOTHING
    if damaged:
        status.problems.append(f"{path}: {damaged} of its last {damaged + len(records)} lines are damaged")
    losses, rates = _numbers(records, "lm_loss"), _numbers(records, "tokens_per_second")
    seconds, mfu = _numbers(records, "seconds_per_iteration"), _numbers(records, "mfu")
    status.lm_loss = statistics.mean(losses) if losses else None
    status.tokens_per_second = statistics.median(rates) if rates else None
    status.seconds_per_iteration = statistics.median(seconds) if seconds else None
    status.mfu = statistics.median(mfu) if mfu else None
    iteration = _last(records, "iteration")
    status.iteration = None if iteration is None else int(iteration)
    for record in records:
        sets = record.get("validation")
        values = (
            [_number(found.get("lm_loss")) for found in sets.values() if isinstance(found, dict)]
            if isinstance(sets, dict)
            else []
        )
        if values and None not in values:
            status.valid_loss = statistics.mean(value for value in values if value is not None)
    ranks = Counter(int(rank) for rank in _numbers(records, "slowest_rank"))
    if ranks:
        status.slowest_rank = ranks.most_common(1)[0][0]
        ratios = [_ratio(record) for record in records if record.get("slowest_rank") == status.slowest_rank]
        status.slowest_ratio = next((ratio for ratio in reversed(ratios) if ratio is not None), None)
    points = [*(_Reader(status)(lambda: spread_records(path, CURVE_POINTS)) or []), *records[-1:]]
    pairs = {_number(point.get("iteration")): _number(point.get("lm_loss")) for point in points}
    status.curve = sorted((int(x), y) for x, y in pairs.items() if x is not None and y is not None and math.isfinite(y))


def _ratio(record: Record) -> float | None:
    most, mean = _number(record.get("rank_seconds_max")), _number(record.get("rank_seconds_mean"))
    return most / mean if most is not None and mean else None


def _read_history(status: RunStatus, run_dir: str, now: float) -> None:
    """Fill in what the other files of records and the checkpoints say."""
    read = _Reader(status)
    steps, _ = read(lambda: last_records(os.path.join(run_dir, STEPS), 1)) or NOTHING
    step = _last(steps, "iteration")
    if step is not None:
        status.iteration = max(status.iteration or 0, int(step))
    bad = os.path.join(run_dir, BAD_STEPS)
    status.bad_steps = read(lambda: count_lines(bad)) or 0
    if status.bad_steps:
        newest, _ = read(lambda: last_records(bad, 1)) or NOTHING
        names = ("iteration", "action", "reason", "lm_loss", "grad_norm", "score")
        status.last_bad_step = {name: newest[-1].get(name) for name in names} if newest else None
    launches = os.path.join(run_dir, LAUNCHES)
    status.launches = read(lambda: count_lines(launches)) or 0
    newest, _ = read(lambda: last_records(launches, 1)) or NOTHING
    for launch in newest:
        ranks = _number(launch.get("world_size"))
        status.world_size = None if ranks is None else int(ranks)
        status.host = str(launch.get("host") or "")
        status.slurm_job_id = str(launch["slurm_job_id"]) if launch.get("slurm_job_id") else None
    checkpoints = os.path.join(run_dir, "checkpoints")
    latest = read(lambda: latest_checkpoint(checkpoints))
    if latest is not None:
        status.checkpoint_iteration = int(os.path.basename(latest).removeprefix("iter_"))
        saves, _ = read(lambda: last_records(os.path.join(run_dir, SAVES), 1)) or NOTHING
        saved = [save.get("saved_at") for save in saves if save.get("iteration") == status.checkpoint_iteration]
        saved_at = read(lambda: datetime.fromisoformat(str(saved[-1])).timestamp()) if saved else None
        if saved_at is None:
            saved_at = read(lambda: os.stat(latest).st_mtime)
        status.checkpoint_age_seconds = None if saved_at is None else max(0.0, now - saved_at)


def _read_disk(status: RunStatus, run_dir: str, settings: Mapping[str, Any], limits: Limits) -> None:
    free = _Reader(status)(lambda: shutil.disk_usage(run_dir).free)
    status.disk_free_bytes = free
    configured = limits.min_free_disk_gib
    if configured is None:
        configured = setting(settings, "alerts", "min_free_disk_gib")
    needed = int(configured * GIB) if configured is not None else _Reader(status)(lambda: needed_disk_bytes(run_dir))
    status.disk_needed_bytes = needed


def needed_disk_bytes(run_dir: str) -> int:
    """Return twice the size of the newest checkpoint. Raise OSError."""
    folder = os.path.join(run_dir, "checkpoints")
    newest = next(reversed(finished_checkpoints(folder).values()), None)
    if newest is None:
        return 0
    with os.scandir(os.path.join(folder, newest)) as entries:
        return 2 * sum(entry.stat().st_size for entry in entries if entry.is_file())


def _take_heartbeat(status: RunStatus, heartbeat: Heartbeat | None, now: float) -> None:
    if heartbeat is None:
        return
    status.heartbeat_age_seconds = max(0.0, now - heartbeat.at)
    status.activity, status.idle_seconds = heartbeat.activity, heartbeat.idle_seconds
    status.host, status.world_size = heartbeat.host, heartbeat.world_size
    status.slurm_job_id = heartbeat.slurm_job_id
    status.alerted = heartbeat.alerted
    if status.iteration is None:
        status.iteration = heartbeat.iteration


def _judge(
    status: RunStatus,
    run_dir: str,
    settings: Mapping[str, Any],
    heartbeat: Heartbeat | None,
    limits: Limits,
    now: float,
) -> StateOfRun:
    """Judge the state, and fill in the estimates that depend on the length of the run."""
    length = setting(settings, "train", "train_iters")
    status.train_iters = None if length is None else int(length)
    if status.train_iters and status.iteration is not None and status.seconds_per_iteration is not None:
        status.eta_seconds = max(0, status.train_iters - status.iteration) * status.seconds_per_iteration
    stall = limits.stall_seconds
    if stall is None:
        stall = setting(settings, "alerts", "stall_seconds")
    has_files = any(os.path.exists(os.path.join(run_dir, name)) for name in ("config.yaml", HEARTBEAT, METRICS, STEPS))
    return judge(
        heartbeat,
        age_seconds=status.heartbeat_age_seconds,
        slurm_state=status.slurm_state,
        ended_with=limits.ended_with,
        stale_seconds=limits.stale_seconds,
        stall_seconds=120.0 if stall is None else stall,
        is_complete=bool(status.train_iters and status.checkpoint_iteration == status.train_iters),
        is_run=has_files,
        silent_seconds=_Reader(status)(lambda: _seconds_since_last_step(run_dir, now)),
        step_seconds=status.seconds_per_iteration or 0.0,
    )


def _seconds_since_last_step(run_dir: str, now: float) -> float | None:
    """Return the age of the newest file of records, for runs without a heartbeat; None without such a file."""
    ages = []
    for name in (STEPS, METRICS):
        try:
            ages.append(now - os.stat(os.path.join(run_dir, name)).st_mtime)
        except FileNotFoundError:
            continue
    return min(ages) if ages else None

"""Read the files of a run folder into a status: records, launches, checkpoints, config, heartbeat, disk."""

import math
import os
import shutil
import statistics
from collections import Counter
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import yaml

from megatron_ledom.checkpoint.folder import checkpoint_name, latest_checkpoint
from megatron_ledom.errors import LedomError
from megatron_ledom.monitoring.fields import GIB, Limits, RunStatus
from megatron_ledom.monitoring.heartbeat import HEARTBEAT, RUNNING, Heartbeat, read_heartbeat
from megatron_ledom.monitoring.problems import ProblemKind
from megatron_ledom.monitoring.state import CLOCK_SECONDS, Evidence
from megatron_ledom.storage.records import BAD_STEPS, LAUNCHES, METRICS, SAVES, STEPS, Record, numbers_only
from megatron_ledom.storage.tail import count_lines, last_records, spread_records

RECENT = 20
"""Number of last records that loss, speed and slowest ranks are taken from."""
SEARCHED = 400
"""Number of last records in which the last validation is searched."""
RECENT_STEPS = 100
"""Number of last iterations whose bad steps are a problem."""
MOST_COUNTED_BYTES = 1 << 26
"""Longest file whose lines are counted."""
MOST_BAD_BYTES = 1 << 22
"""Most bytes that are read of the bad steps, whose lines name every sample."""
CURVE_POINTS = 160
NAMED_RANKS = 3
MOST_WORDS = 200
Result = TypeVar("Result")
NOTHING: tuple[list[Record], int] = ([], 0)


def read_files(run_dir: str, limits: Limits, now: float) -> tuple[RunStatus, Evidence | None]:
    """Return the status of a run folder without its state, and the facts for `judge`; None if there is no such folder."""
    status = RunStatus(run_dir, read_at=now)
    status.reason = _reason_against(run_dir)
    if status.reason:
        return status, None
    read = _Reader(status)
    settings = read(lambda: _read_settings(run_dir)) or {}
    heartbeat = read(lambda: read_heartbeat(run_dir))
    _read_metrics(status, run_dir, settings)
    _read_bad_steps(status, run_dir)
    from_iteration = _read_launches(status, run_dir)
    _read_checkpoints(status, run_dir, now)
    _read_disk(status, run_dir, limits)
    status.record_age_seconds = read(lambda: _age_of_records(run_dir, now))
    if heartbeat is not None:
        _take_heartbeat(status, run_dir, heartbeat, now, from_iteration)
    return status, _evidence(status, run_dir, heartbeat, limits)


def _reason_against(run_dir: str) -> str:
    """Return the reason why a folder cannot be read; empty if it can."""
    try:
        os.listdir(run_dir)
    except FileNotFoundError:
        return "the folder does not exist (or its disk is not mounted)"
    except OSError as error:
        return f"the folder cannot be read ({error.strerror})"
    return ""


class _Reader:
    """Reads one part of a run; an error becomes a problem of its status."""

    def __init__(self, status: RunStatus, kind: ProblemKind = ProblemKind.DAMAGED) -> None:
        self._status, self._kind = status, kind

    def __call__(self, read: Callable[[], Result]) -> Result | None:
        try:
            return read()
        except LedomError as error:
            text = str(error)
        except OSError as error:
            text = f"{error.filename or self._status.run}: {error.strerror or error}"
        except (yaml.YAMLError, ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
            text = f"{type(error).__name__}: {error}"
        self._status.add(self._kind, text)
        return None


def _read_settings(run_dir: str) -> dict[str, Any]:
    """Return config.yaml as plain values; {} without the file. The config of any version will do."""
    path = Path(run_dir, "config.yaml")
    try:
        values = yaml.load(path.read_bytes(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except FileNotFoundError:
        return {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} has no sections")
    return values


def setting(settings: Mapping[str, Any], section: str, key: str) -> float | None:
    """Return a number of a config; None if it is missing or no number."""
    keys = settings.get(section)
    return _number(keys.get(key)) if isinstance(keys, dict) else None


def _number(value: Any) -> float | None:
    """Return a finite number; None for everything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 2**53:
        return None
    return value


def _whole(value: Any) -> int | None:
    found = _number(value)
    return None if found is None else int(found)


def _numbers(records: list[Record], key: str) -> list[float]:
    return [value for value in (_number(record.get(key)) for record in records) if value is not None]


def _last(records: list[Record], key: str) -> int | None:
    return next((int(value) for value in reversed(_numbers(records, key))), None)


def _median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None


def _read_metrics(status: RunStatus, run_dir: str, settings: Mapping[str, Any]) -> None:
    """Fill in what metrics.jsonl and the last step say."""
    path, read = os.path.join(run_dir, METRICS), _Reader(status)
    records, damaged = read(lambda: last_records(path, SEARCHED)) or NOTHING
    if damaged:
        status.add(ProblemKind.DAMAGED, f"{path}: {damaged} of its last {damaged + len(records)} lines are damaged")
    points = [*(read(lambda: spread_records(path, CURVE_POINTS)) or []), *records[-1:]]
    pairs = {_whole(point.get("iteration")): _number(point.get("lm_loss")) for point in points}
    status.curve = sorted((x, y) for x, y in pairs.items() if x is not None and y is not None)
    for record in reversed(records):
        if status.validation_iteration is None and (sets := _validation(record)):
            status.validation, status.validation_iteration = sets, _whole(record.get("iteration"))
    recent = records[-RECENT:]
    losses = _numbers(recent, "lm_loss")
    status.lm_loss = statistics.mean(losses) if losses else None
    status.tokens_per_second = _median(_numbers(recent, "tokens_per_second"))
    status.mfu = _median(_numbers(recent, "mfu"))
    status.consumed_train_tokens = _last(recent, "consumed_train_tokens")
    status.global_batch_size = _last(recent[-1:], "global_batch_size") or _whole(
        setting(settings, "train", "global_batch_size")
    )
    _take_ranks(status, recent)
    steps, _ = read(lambda: last_records(os.path.join(run_dir, STEPS), 1)) or NOTHING
    found = [one for one in (_last(recent, "iteration"), _last(steps, "iteration")) if one is not None]
    status.iteration = max(found, default=None)
    status.train_iters = _whole(setting(settings, "train", "train_iters"))
    _take_speed(status, recent)


def _validation(record: Record) -> dict[str, float]:
    """Return the finite losses of the sets of a record; {} if it has no validation."""
    sets = record.get("validation")
    found = {name: _number(values.get("lm_loss")) for name, values in _items(sets) if isinstance(values, dict)}
    return {name: loss for name, loss in found.items() if loss is not None}


def _items(value: Any) -> list[tuple[str, Any]]:
    return [(str(name)[:MOST_WORDS], inner) for name, inner in value.items()] if isinstance(value, dict) else []


def _take_ranks(status: RunStatus, recent: list[Record]) -> None:
    ranks = Counter(int(rank) for rank in _numbers(recent, "slowest_rank"))
    status.slowest_ranks = ranks.most_common(NAMED_RANKS)
    times = [(_number(record.get("rank_seconds_max")), _number(record.get("rank_seconds_mean"))) for record in recent]
    ratios = [most / mean for most, mean in times if most is not None and mean is not None and mean > 0]
    status.slowest_ratio = _median([ratio for ratio in ratios if math.isfinite(ratio)])


def _take_speed(status: RunStatus, recent: list[Record]) -> None:
    """Fill in the speed of records with the present batch size, and with it the time until the end."""
    if not recent:
        return
    last, size = recent[-1], recent[-1].get("global_batch_size")
    same = [record for record in recent if record.get("global_batch_size") == size]
    each = status.seconds_per_iteration = _median(_numbers(same, "seconds_per_iteration"))
    at, eta, its = (_number(last.get(key)) for key in ("iteration", "eta_seconds", "seconds_per_iteration"))
    if each is None or at is None or status.iteration is None:
        return
    if eta is not None and its:  # in iterations of the present size, also if a schedule changes the size
        status.eta_seconds = max(0.0, eta / its - (status.iteration - at)) * each
    elif status.train_iters is not None and size is None:  # records of older versions
        status.eta_seconds = max(0, status.train_iters - status.iteration) * each


def _read_bad_steps(status: RunStatus, run_dir: str) -> None:
    path, read = os.path.join(run_dir, BAD_STEPS), _Reader(status)
    status.bad_steps = read(lambda: count_lines(path, MOST_COUNTED_BYTES))
    if status.bad_steps == 0:
        return
    newest, _ = read(lambda: last_records(path, RECENT, MOST_BAD_BYTES)) or NOTHING
    if not newest:
        return
    names = ("iteration", "action", "reason", "lm_loss", "grad_norm", "score")
    values = {name: newest[-1].get(name) for name in names}
    status.last_bad_step = {
        name: value[:MOST_WORDS] if isinstance(value, str) else numbers_only(_scalar(value)) for name, value in values.items()
    }
    bad = [int(iteration) for iteration in _numbers(newest, "iteration")]
    status.recent_bad_steps = sum(iteration > (status.iteration or 0) - RECENT_STEPS for iteration in bad)
    if status.recent_bad_steps:
        many = "at least " if status.recent_bad_steps == RECENT else ""
        last = status.last_bad_step
        status.add(
            ProblemKind.SPIKE,
            f"bad steps in the last {RECENT_STEPS} iterations: {many}{status.recent_bad_steps}; the last one: iteration"
            f" {last['iteration']}, {last['reason']} ({last['action']})",
        )


def _scalar(value: Any) -> Any:
    return value if isinstance(value, int | float) else None


def _read_launches(status: RunStatus, run_dir: str) -> int | None:
    """Fill in what launches.jsonl says. Returns the iteration from which the newest launch resumes."""
    path, read = os.path.join(run_dir, LAUNCHES), _Reader(status)
    status.launches = read(lambda: count_lines(path, MOST_COUNTED_BYTES))
    newest, _ = read(lambda: last_records(path, 1)) or NOTHING
    if not newest:
        return None
    [launch] = newest
    status.world_size = _whole(launch.get("world_size"))
    status.host = str(launch.get("host") or "")[:MOST_WORDS]
    status.slurm_job_id = str(launch["slurm_job_id"])[:MOST_WORDS] if launch.get("slurm_job_id") else None
    return _whole(launch.get("from_iteration"))


def _read_checkpoints(status: RunStatus, run_dir: str, now: float) -> None:
    latest = _Reader(status, ProblemKind.CHECKPOINTS)(lambda: latest_checkpoint(os.path.join(run_dir, "checkpoints")))
    if latest is None:
        return
    read = _Reader(status)
    iteration = status.checkpoint_iteration = int(os.path.basename(latest).removeprefix("iter_"))
    saves, _ = read(lambda: last_records(os.path.join(run_dir, SAVES), RECENT)) or NOTHING
    saved = [save.get("saved_at") for save in saves if save.get("iteration") == iteration]
    saved_at = read(lambda: datetime.fromisoformat(str(saved[-1])).timestamp()) if saved else None
    if saved_at is None:
        saved_at = read(lambda: os.stat(latest).st_mtime)
    status.checkpoint_age_seconds = None if saved_at is None else max(0.0, now - saved_at)


def _read_disk(status: RunStatus, run_dir: str, limits: Limits) -> None:
    read = _Reader(status)
    status.disk_free_bytes = read(lambda: shutil.disk_usage(run_dir).free)
    least = limits.min_free_disk_gib
    if least is not None:
        status.disk_needed_bytes = int(least * GIB)
    elif status.checkpoint_iteration is not None:
        newest = os.path.join(run_dir, "checkpoints", checkpoint_name(status.checkpoint_iteration))
        size = read(lambda: _folder_bytes(newest))
        status.disk_needed_bytes = None if size is None else 2 * size


def _folder_bytes(folder: str) -> int | None:
    """Return the bytes of the files of a folder; None if it has just been deleted. Raise OSError."""
    try:
        with os.scandir(folder) as entries:
            return sum(entry.stat().st_size for entry in entries if entry.is_file())
    except FileNotFoundError:
        return None


def _age_of_records(run_dir: str, now: float) -> float | None:
    """Return the age of the newest file of records; None without any."""
    ages = []
    for name in (STEPS, METRICS, LAUNCHES):
        try:
            ages.append(now - os.stat(os.path.join(run_dir, name)).st_mtime)
        except FileNotFoundError:
            continue
    return min(ages, default=None)


def _take_heartbeat(status: RunStatus, run_dir: str, beat: Heartbeat, now: float, from_iteration: int | None) -> None:
    status.heartbeat_age_seconds = _age_of_heartbeat(status, run_dir, beat, now)
    status.activity, status.idle_seconds = beat.activity[:MOST_WORDS], beat.idle_seconds
    status.host, status.world_size = beat.host[:MOST_WORDS], beat.world_size
    status.slurm_job_id = beat.slurm_job_id
    if beat.state == RUNNING and beat.iteration == 0 and from_iteration is not None:
        # the run is being built: later records will be dropped, and were written by an earlier launch
        status.iteration, status.eta_seconds = from_iteration, None


def _age_of_heartbeat(status: RunStatus, run_dir: str, beat: Heartbeat, now: float) -> float | None:
    """Return the age of the heartbeat by the time of its file, which is that of the disk's server; None if it would be a guess."""
    modified = _Reader(status)(lambda: os.stat(os.path.join(run_dir, HEARTBEAT)).st_mtime)
    if modified is None:
        return None
    if abs(beat.at - modified) > CLOCK_SECONDS:
        order = "later" if beat.at > modified else "earlier"
        status.add(
            ProblemKind.CLOCK,
            f"the clock of {beat.host} is {abs(beat.at - modified):.0f} s {order} than that of the run's disk",
        )
    if modified - now > CLOCK_SECONDS:
        status.add(
            ProblemKind.CLOCK, f"the clock of this machine is {modified - now:.0f} s earlier than that of the run's disk"
        )
        return None
    return max(0.0, now - modified)


def _evidence(status: RunStatus, run_dir: str, heartbeat: Heartbeat | None, limits: Limits) -> Evidence:
    """Return the facts for `judge`, but for SLURM's."""
    beat_age, record_age = status.heartbeat_age_seconds, status.record_age_seconds
    files = ("config.yaml", HEARTBEAT, METRICS, STEPS, LAUNCHES)
    return Evidence(
        heartbeat=heartbeat,
        heartbeat_age=beat_age,
        record_age=record_age,
        record_lead=None if beat_age is None or record_age is None else beat_age - record_age,
        step_seconds=status.seconds_per_iteration or 0.0,
        ended_with=limits.ended_with,
        is_complete=bool(status.train_iters and status.checkpoint_iteration == status.train_iters),
        is_run=any(os.path.exists(os.path.join(run_dir, name)) for name in files),
        stale_seconds=limits.stale_seconds,
        stall_seconds=limits.stall_seconds,
    )

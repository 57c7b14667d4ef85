"""The status of runs as a table for a terminal, and as JSON."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from megatron_ledom.errors import visible
from megatron_ledom.monitoring.fields import GIB, RunStatus
from megatron_ledom.storage.records import numbers_only

HEADINGS = (
    "run",
    "state",
    "iteration",
    "left",
    "loss",
    "tokens/s",
    "bad steps",
    "saved",
    "slowest rank",
    "heartbeat",
    "free GiB",
)
UNKNOWN = "-"
UNITS = ((86400, "d"), (3600, "h"), (60, "m"))


def as_table(runs: Sequence[RunStatus]) -> str:
    """Return a line for each run, and below it the reasons and problems of each."""
    rows = [HEADINGS, *map(_cells, runs)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADINGS))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    for run in runs:
        lines += [_one_line(f"{run.run}: {note}") for note in notes(run)]
    return "\n".join(lines)


def notes(run: RunStatus) -> list[str]:
    """Return the sentences that a table has no column for: stage, reason, problems, job."""
    found = [run.stage] if run.stage else []
    is_told = any(one.text == run.reason for one in run.problems)
    found += [f"{run.state}: {run.reason}"] if run.reason and not is_told else []
    found += [f"{one.kind}: {one.text}" if one.text else one.kind.value for one in run.problems]
    if run.slurm_job_id:
        found.append(f"SLURM job {run.slurm_job_id}: {run.slurm_state or 'state unknown'}")
    return found


def as_json(runs: Sequence[RunStatus]) -> str:
    """Return a JSON list with an object for each run."""
    return json.dumps([as_fields(run) for run in runs], indent=1, allow_nan=False)


def as_fields(run: RunStatus) -> dict[str, Any]:
    """Return the fields of a status for JSON. NaN and infinity, which JSON lacks, become None."""
    found: dict[str, Any] = numbers_only(asdict(run))
    serious = [{"is_serious": one.is_serious} for one in run.problems]
    found["problems"] = [one | more for one, more in zip(found["problems"], serious, strict=True)]
    return found


def _cells(run: RunStatus) -> tuple[str, ...]:
    iteration = UNKNOWN if run.iteration is None else f"{run.iteration:,}"
    if run.train_iters:
        iteration += f" of {run.train_iters:,}"
        iteration += "" if run.iteration is None else f" ({100 * run.iteration / run.train_iters:.1f} %)"
    saved = UNKNOWN if run.checkpoint_iteration is None else f"{run.checkpoint_iteration:,}"
    if run.checkpoint_age_seconds is not None:
        saved += f", {duration(run.checkpoint_age_seconds)} ago"
    slowest = ", ".join(str(rank) for rank, _ in run.slowest_ranks) or UNKNOWN
    if run.slowest_ratio is not None:
        slowest += f" (x {run.slowest_ratio:.2f})"
    beat = UNKNOWN if run.heartbeat_age_seconds is None else f"{duration(run.heartbeat_age_seconds)} ago"
    return (
        _one_line(run.run),
        f"{'' if run.is_healthy else '! '}{run.state}",
        iteration,
        duration(run.eta_seconds),
        UNKNOWN if run.lm_loss is None else f"{run.lm_loss:.4f}",
        UNKNOWN if run.tokens_per_second is None else f"{run.tokens_per_second:,.0f}",
        UNKNOWN if run.bad_steps is None else f"{run.bad_steps:,}",
        saved,
        slowest,
        beat,
        UNKNOWN if run.disk_free_bytes is None else f"{run.disk_free_bytes / GIB:,.1f}",
    )


def _one_line(text: str) -> str:
    """Return a text of the run's files, safe to print as a part of a line."""
    return visible(" ".join(text.split()))


def duration(seconds: float | None) -> str:
    """Return a time such as `3d 04h`, `12m 05s` or `7s`."""
    if seconds is None:
        return UNKNOWN
    left, parts = int(seconds), list[str]()
    for size, unit in UNITS:
        if parts or left >= size:
            parts.append(f"{left // size:02d}{unit}" if parts else f"{left // size}{unit}")
            left %= size
    parts.append(f"{left:02d}s" if parts else f"{left}s")
    return " ".join(parts[:2])

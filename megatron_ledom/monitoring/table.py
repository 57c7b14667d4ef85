"""The status of runs as a table for a terminal, and as JSON."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from megatron_ledom.errors import visible
from megatron_ledom.monitoring.run_status import GIB, RunStatus

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
        lines += [f"{run.run}: {note}" for note in notes(run)]
    return visible("\n".join(lines))


def notes(run: RunStatus) -> list[str]:
    """Return the sentences that a table has no column for: reason, job, last bad step, problems."""
    found = [f"{run.state}: {run.reason}"] if run.reason else []
    if run.slurm_job_id:
        found.append(
            f"SLURM job {run.slurm_job_id}" + (f": {run.slurm_state}" if run.slurm_state else " (SLURM does not answer)")
        )
    if run.last_bad_step is not None:
        bad = run.last_bad_step
        found.append(f"last bad step: iteration {bad['iteration']}, {bad['reason']} ({bad['action']})")
    return found + run.problems


def as_json(runs: Sequence[RunStatus]) -> str:
    """Return a JSON list with an object for each run."""
    return json.dumps([fields(run) for run in runs], indent=1, allow_nan=False)


def fields(run: RunStatus) -> dict[str, Any]:
    """Return the fields of a status for JSON."""
    return asdict(run)


def _cells(run: RunStatus) -> tuple[str, ...]:
    iteration = UNKNOWN if run.iteration is None else f"{run.iteration:,}"
    if run.train_iters:
        iteration += f" of {run.train_iters:,} ({100 * (run.iteration or 0) / run.train_iters:.1f} %)"
    saved = UNKNOWN if run.checkpoint_iteration is None else f"{run.checkpoint_iteration:,}"
    if run.checkpoint_age_seconds is not None:
        saved += f", {duration(run.checkpoint_age_seconds)} ago"
    slowest = UNKNOWN if run.slowest_rank is None else str(run.slowest_rank)
    if run.slowest_ratio is not None:
        slowest += f" (x {run.slowest_ratio:.2f})"
    beat = UNKNOWN if run.heartbeat_age_seconds is None else f"{duration(run.heartbeat_age_seconds)} ago"
    return (
        run.run,
        f"{'' if run.is_healthy else '! '}{run.state}",
        iteration,
        duration(run.eta_seconds),
        UNKNOWN if run.lm_loss is None else f"{run.lm_loss:.4f}",
        UNKNOWN if run.tokens_per_second is None else f"{run.tokens_per_second:,.0f}",
        f"{run.bad_steps:,}",
        saved,
        slowest,
        beat,
        UNKNOWN if run.disk_free_bytes is None else f"{run.disk_free_bytes / GIB:,.1f}",
    )


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

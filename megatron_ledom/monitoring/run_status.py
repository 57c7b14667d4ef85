"""The status of a run, read from its folder: state, progress, loss, speed, spikes, last checkpoint, slowest ranks, disk.

`read_status` returns the status of one folder; `runs.py` reads many. Nothing is written, and no long file is read whole, so months of
records take milliseconds. The folder may be written at the same time, damaged or gone: each part that cannot be read stays None and becomes
one of `problems`.
"""

import time
from collections.abc import Callable, Iterable, Mapping

from megatron_ledom.monitoring.fields import GIB, Limits, RunStatus
from megatron_ledom.monitoring.problems import ProblemKind, problem
from megatron_ledom.monitoring.run_files import read_files
from megatron_ledom.monitoring.state import PROBLEM_OF, Evidence, State, judge

__all__ = ["Limits", "RunStatus", "conclude", "no_jobs", "read_status"]

CONTINUING = (State.RUNNING, State.STALLED, State.QUEUED, State.STOPPED, State.LOST, State.FAILED, State.PREEMPTED)
"""States of a run that will need more disk space."""
JobStates = Callable[[Iterable[str]], Mapping[str, str]]
"""Function that returns job -> state of the SLURM jobs that are known."""


def no_jobs(jobs: Iterable[str]) -> Mapping[str, str]:
    """Return no state: SLURM is not asked."""
    return {}


def read_status(
    run_dir: str, limits: Limits | None = None, job_states: JobStates = no_jobs, *, now: float | None = None
) -> RunStatus:
    """Return the status of a run folder. A folder that is missing or damaged raises nothing: see `state` and `problems`."""
    chosen = limits or Limits()
    status, facts = read_files(run_dir, chosen, time.time() if now is None else now)
    if status.slurm_job_id is not None:
        status.slurm_state = job_states([status.slurm_job_id]).get(status.slurm_job_id)
    return conclude(status, facts)


def conclude(status: RunStatus, facts: Evidence | None) -> RunStatus:
    """Return the status with its state, and with the problems that follow from it. facts: None if the folder cannot be read."""
    if facts is not None:
        facts.slurm_state = status.slurm_state
        found = judge(facts)
        status.state, status.reason = found.state, found.reason
    kind = PROBLEM_OF.get(State(status.state))
    if kind is not None:
        status.problems.insert(0, problem(kind, status.reason))
        status.reason = status.problems[0].text
    free, needed = status.disk_free_bytes, status.disk_needed_bytes
    if status.state in CONTINUING and free is not None and needed is not None and free < needed:
        status.add(ProblemKind.DISK_LOW, f"{free / GIB:.1f} GiB are free, fewer than {needed / GIB:.1f}")
    if status.state != State.RUNNING:
        status.eta_seconds = None
    status.is_healthy = not any(found.is_serious for found in status.problems)
    return status

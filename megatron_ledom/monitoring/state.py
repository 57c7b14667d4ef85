"""Judge the state of a run from its heartbeat, its job and the files of its folder."""

import os
import socket
from dataclasses import dataclass
from enum import StrEnum

from megatron_ledom.monitoring.heartbeat import COMPLETE, FAILED, RUNNING, STOPPED, Heartbeat

WAITING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SUSPENDED", "RESIZING", "SPECIAL_EXIT")
"""States of a SLURM job that starts or continues by itself."""
GOING = ("RUNNING", "COMPLETING", "SIGNALING", "STAGE_OUT", "STOPPED")
SILENT_STEPS = 5


class State(StrEnum):
    """The state of a run."""

    RUNNING = "running"
    COMPLETE = "complete"
    STOPPED = "stopped"
    QUEUED = "queued"
    NEW = "not started"
    STALLED = "stalled"
    FAILED = "failed"
    LOST = "lost"
    SILENT = "silent"
    UNREADABLE = "unreadable"


HEALTHY = (State.RUNNING, State.COMPLETE, State.STOPPED, State.QUEUED, State.NEW)


@dataclass(frozen=True, slots=True)
class StateOfRun:
    """A state and its reason."""

    state: State
    reason: str = ""

    @property
    def is_healthy(self) -> bool:
        """Return True unless somebody has to look at the run."""
        return self.state in HEALTHY


def judge(
    heartbeat: Heartbeat | None,
    *,
    age_seconds: float | None,
    slurm_state: str | None,
    ended_with: int | None,
    stale_seconds: float,
    stall_seconds: float,
    is_complete: bool,
    is_run: bool,
    silent_seconds: float | None,
    step_seconds: float,
) -> StateOfRun:
    """Return the state of a run.

    age_seconds: age of the heartbeat. ended_with: exit code of the launch, if its launcher has reported it. silent_seconds:
    seconds since the last record, for a run without a heartbeat.
    """
    if not is_run:
        return StateOfRun(State.UNREADABLE, "the folder has no config.yaml and no records; give the run_dir of a run")
    if heartbeat is None:
        return _without_heartbeat(silent_seconds, step_seconds, stale_seconds, is_complete)
    if heartbeat.state == COMPLETE:
        return StateOfRun(State.COMPLETE, heartbeat.reason)
    if slurm_state in WAITING:
        return StateOfRun(
            State.QUEUED, f"SLURM: job {heartbeat.slurm_job_id} is {slurm_state}; {heartbeat.reason}".rstrip("; ")
        )
    if heartbeat.state == STOPPED:
        return StateOfRun(State.STOPPED, heartbeat.reason)
    if heartbeat.state == FAILED:
        return StateOfRun(State.FAILED, heartbeat.reason)
    if heartbeat.state != RUNNING:
        return StateOfRun(State.UNREADABLE, f"its heartbeat has the unknown state {heartbeat.state!r:.60}")
    return _by_age(heartbeat, age_seconds or 0.0, slurm_state, ended_with, stale_seconds, stall_seconds)


def _by_age(
    heartbeat: Heartbeat,
    age: float,
    slurm_state: str | None,
    ended_with: int | None,
    stale_seconds: float,
    stall_seconds: float,
) -> StateOfRun:
    """Return the state of a run whose heartbeat says that it runs."""
    where = f"process {heartbeat.pid} on {heartbeat.host}, iteration {heartbeat.iteration}, {heartbeat.activity}"
    if ended_with is not None:
        return StateOfRun(State.LOST, f"the launch ended with code {ended_with} without a report; last: {where}")
    if slurm_state is not None and slurm_state not in GOING:
        return StateOfRun(State.LOST, f"SLURM: job {heartbeat.slurm_job_id} is {slurm_state}; last: {where}")
    if age > 2 * heartbeat.interval_seconds and _is_dead(heartbeat):
        return StateOfRun(State.LOST, f"its process has ended without a report; last: {where}")
    if age > stale_seconds:
        job = f", although SLURM's job {heartbeat.slurm_job_id} is {slurm_state}" if slurm_state else ""
        return StateOfRun(State.LOST, f"no heartbeat for {age:.0f} s{job}; last: {where}")
    allowed = max(stall_seconds, heartbeat.limit_seconds / 2) if heartbeat.is_patient else stall_seconds
    if heartbeat.idle_seconds > allowed:
        return StateOfRun(State.STALLED, f"no progress for {heartbeat.idle_seconds:.0f} s; {where}")
    return StateOfRun(State.RUNNING)


def _is_dead(heartbeat: Heartbeat) -> bool:
    """Return True if the process was on this host and is gone."""
    return heartbeat.host == socket.gethostname() and not os.path.exists(f"/proc/{heartbeat.pid}")


def _without_heartbeat(silent: float | None, step_seconds: float, stale_seconds: float, is_complete: bool) -> StateOfRun:
    if is_complete:
        return StateOfRun(State.COMPLETE)
    if silent is None:
        return StateOfRun(State.NEW)
    if silent <= stale_seconds + SILENT_STEPS * step_seconds:
        return StateOfRun(State.RUNNING, "no heartbeat.json; judged by the age of its last record")
    return StateOfRun(State.SILENT, f"no heartbeat.json, and no record for {silent:.0f} s")

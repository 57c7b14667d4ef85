"""Judge the state of a run from its heartbeat, its SLURM job and the times of its files."""

import os
import socket
from dataclasses import dataclass
from enum import StrEnum

from megatron_ledom.monitoring.heartbeat import COMPLETE, FAILED, RUNNING, STOPPED, Heartbeat
from megatron_ledom.monitoring.problems import ProblemKind

WAITING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "SUSPENDED", "RESIZING")
"""States of a SLURM job that starts or continues by itself."""
HELD = ("REQUEUE_HOLD", "SPECIAL_EXIT")
"""States of a SLURM job that waits for `scontrol release`."""
BROKEN = ("FAILED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE", "LAUNCH_FAILED", "RECONFIG_FAIL")
"""States of a SLURM job that has ended with an error."""
GOING = ("RUNNING", "COMPLETING", "SIGNALING", "STAGE_OUT", "STOPPED")
SILENT_STEPS = 5
MISSED_BEATS = 2
"""Number of missed heartbeats from which the process and the job are asked."""
STALL_SECONDS = 120.0
"""Default time without progress, for a run whose watchdog is off."""
ENDING_SECONDS, STARTING_SECONDS = 120.0, 900.0
"""Longest times for a job to end after its last heartbeat, and for a launch to start until its first one."""
LATER_SECONDS = 60.0
"""Records that are newer than the heartbeat by this time were not written by its launch."""
CLOCK_SECONDS = 30.0
"""Largest difference of two clocks that is not reported: a heartbeat is on disk within a second or two."""


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
    PREEMPTED = "preempted"
    UNKNOWN = "unknown"
    UNREADABLE = "unreadable"


PROBLEM_OF = {
    State.STOPPED: ProblemKind.STOPPED,
    State.STALLED: ProblemKind.STALLED,
    State.FAILED: ProblemKind.FAILED,
    State.LOST: ProblemKind.LOST,
    State.PREEMPTED: ProblemKind.PREEMPTED,
    State.UNKNOWN: ProblemKind.UNKNOWN,
    State.UNREADABLE: ProblemKind.UNREADABLE,
}
"""The problem that a state is; the other states are none."""


@dataclass(frozen=True, slots=True)
class StateOfRun:
    """A state and its reason."""

    state: State
    reason: str = ""


@dataclass(slots=True, kw_only=True)
class Evidence:
    """The facts from which the state of a run follows. Ages are in seconds by the clock of this machine; None if unknown."""

    heartbeat: Heartbeat | None = None
    heartbeat_age: float | None = None
    """None also if the clocks differ so much that the age would be a guess."""
    record_age: float | None = None
    """Age of the newest file of records."""
    record_lead: float | None = None
    """Seconds by which that file is newer than the file of the heartbeat."""
    step_seconds: float = 0.0
    slurm_state: str | None = None
    ended_with: int | None = None
    """Exit code of the launch, if its launcher has reported it."""
    is_complete: bool = False
    """True if the checkpoint of the last iteration is saved."""
    is_run: bool = True
    """False for a folder without any file of a run."""
    stale_seconds: float = 120.0
    stall_seconds: float | None = None


def judge(facts: Evidence) -> StateOfRun:
    """Return the state of a run."""
    beat = facts.heartbeat
    if not facts.is_run:
        return StateOfRun(State.UNREADABLE, "the folder has no config.yaml and no records; give the run_dir of a run")
    if beat is None or (beat.state != RUNNING and _has_later_records(facts)):
        return _by_records(facts)
    if beat.state == COMPLETE or (facts.is_complete and facts.slurm_state == "COMPLETED"):
        return StateOfRun(State.COMPLETE, beat.reason if beat.state == COMPLETE else "")
    if facts.slurm_state in HELD and not _is_fresh(facts):
        job = f"SLURM's job {beat.slurm_job_id}"
        return StateOfRun(State.STALLED, f"{job} is held and waits for `scontrol release {beat.slurm_job_id}`")
    if facts.slurm_state in WAITING and not _is_fresh(facts):
        return StateOfRun(State.QUEUED, _and(f"SLURM's job {beat.slurm_job_id} is {facts.slurm_state}", beat.reason))
    if beat.state == RUNNING:
        return _by_age(facts, beat)
    if beat.state in (FAILED, STOPPED):
        return _after_end(facts, beat)
    return StateOfRun(State.UNKNOWN, f"heartbeat.json has the state {beat.state!r:.60}, which this version does not know")


def _after_end(facts: Evidence, beat: Heartbeat) -> StateOfRun:
    """Return the state of a run whose last launch has reported its end. A later start may have failed, or last too long, before
    its first heartbeat."""
    age = facts.heartbeat_age
    job = f"SLURM's job {beat.slurm_job_id} is {facts.slurm_state}" if facts.slurm_state else ""
    if facts.slurm_state == "RUNNING" and age is not None and age > ENDING_SECONDS:
        if age <= STARTING_SECONDS:
            return StateOfRun(State.RUNNING, f"{job}: a launch starts")
        return StateOfRun(State.STALLED, f"{job}, but there is no heartbeat since the launch that ended {age:.0f} s ago")
    if beat.state == FAILED:
        return StateOfRun(State.FAILED, beat.reason)
    if facts.slurm_state in BROKEN:
        return StateOfRun(State.FAILED, _and(f"{job}: see its log", f"the last launch had stopped: {beat.reason}"))
    return StateOfRun(State.PREEMPTED if facts.slurm_state == "PREEMPTED" else State.STOPPED, _and(beat.reason, job))


def _and(first: str, second: str) -> str:
    return "; ".join(text for text in (first, second) if text)


def _is_fresh(facts: Evidence) -> bool:
    """Return True if the newest heartbeat says `running` and none is missing: this outweighs all that SLURM says."""
    beat, age = facts.heartbeat, facts.heartbeat_age
    return beat is not None and beat.state == RUNNING and age is not None and age <= MISSED_BEATS * beat.interval_seconds


def _has_later_records(facts: Evidence) -> bool:
    """Return True if records were written after the heartbeat: by a launch that writes none, or cannot write it."""
    return facts.record_lead is not None and facts.record_lead > LATER_SECONDS


def _writes_records(facts: Evidence) -> bool:
    """Return True if the newest record is as new as that of a running launch."""
    longest = facts.stale_seconds + SILENT_STEPS * facts.step_seconds
    return facts.record_age is not None and -CLOCK_SECONDS <= facts.record_age <= longest


def _by_age(facts: Evidence, beat: Heartbeat) -> StateOfRun:
    """Return the state of a run whose heartbeat says that it runs."""
    age, job = facts.heartbeat_age, f"SLURM's job {beat.slurm_job_id} is {facts.slurm_state}"
    last = f"last: process {beat.pid} on {beat.host}, iteration {beat.iteration}, {beat.activity}"
    if facts.ended_with is not None:
        return StateOfRun(State.LOST, f"the launch ended with code {facts.ended_with} without a report; {last}")
    if _is_fresh(facts):
        return _by_progress(facts, beat, last)
    if facts.slurm_state is not None and facts.slurm_state not in GOING:
        return StateOfRun(State.PREEMPTED if facts.slurm_state == "PREEMPTED" else State.LOST, f"{job}; {last}")
    if age is not None and _is_dead(beat):
        return StateOfRun(State.LOST, f"its process has ended without a report: killed, or out of memory; {last}")
    if _has_later_records(facts) and _writes_records(facts):
        return StateOfRun(State.RUNNING, "records are being written, but heartbeat.json is old: see the log of rank 0")
    if age is None:
        return StateOfRun(State.UNKNOWN, f"the age of heartbeat.json is unknown, because clocks differ; {last}")
    if age > facts.stale_seconds:
        although = f", although {job}" if facts.slurm_state else ""
        return StateOfRun(
            State.LOST,
            f"no heartbeat for {age:.0f} s{although}: its process was killed, its host is down, or its disk hangs; {last}",
        )
    return _by_progress(facts, beat, last)


def _by_progress(facts: Evidence, beat: Heartbeat, last: str) -> StateOfRun:
    """Return if a live run makes progress. Half the watchdog's limit is allowed, or as the user has set it."""
    half = beat.limit_seconds / 2
    stall = facts.stall_seconds
    if stall is None:
        stall = half if half > 0 else STALL_SECONDS
    allowed = max(stall, half) if beat.is_patient else stall
    if beat.idle_seconds > allowed:
        return StateOfRun(State.STALLED, f"no progress for {beat.idle_seconds:.0f} s; {last}")
    return StateOfRun(State.RUNNING)


def _is_dead(heartbeat: Heartbeat) -> bool:
    """Return True if the process was on this host and is gone."""
    return heartbeat.host == socket.gethostname() and not os.path.exists(f"/proc/{heartbeat.pid}")


def _by_records(facts: Evidence) -> StateOfRun:
    """Return the state of a run without a heartbeat of its newest launch."""
    why = "heartbeat.json is older than the records" if facts.heartbeat else "there is no heartbeat.json that can be read"
    if facts.is_complete:
        return StateOfRun(State.COMPLETE)
    if facts.slurm_state in WAITING:
        return StateOfRun(State.QUEUED, f"its SLURM job is {facts.slurm_state}; {why}")
    if facts.record_age is None:
        return StateOfRun(State.NEW)
    if _writes_records(facts):
        return StateOfRun(State.RUNNING, f"{why}; records are being written")
    if facts.record_age < 0:
        return StateOfRun(State.UNKNOWN, f"{why}, and the age of the newest record is unknown, because clocks differ")
    job = f", its SLURM job is {facts.slurm_state}" if facts.slurm_state else ""
    return StateOfRun(State.UNKNOWN, f"{why}, the newest record is {facts.record_age:.0f} s old{job}: ended, or very slow")

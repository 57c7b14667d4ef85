"""Find the events of a run: compare its status with what has been told about it before. No input or output here."""

import os
import socket
import uuid
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from megatron_ledom.monitoring.fields import GIB, RunStatus
from megatron_ledom.monitoring.problems import ProblemKind
from megatron_ledom.monitoring.state import State

VERSION = 1
"""Version of the message. Fields may be added; a change of their meaning raises it."""
UNREADABLE_POLLS = 3
"""Looks in a row that do not show the state until that is an event: network disks have short gaps."""
SPIKE_SECONDS = 600.0
"""Shortest time between two messages about bad steps of a run; the later one counts all."""
ENOUGH_FREE = 1.1
"""Free space, in relation to the needed one, from which a disk that was low counts as not low."""


class Event(StrEnum):
    """The events that are told about a run."""

    STOPPED = "stopped"
    FAILED = "failed"
    STALLED = "stalled"
    UNREADABLE = "unreadable"
    RESTARTED = "restarted"
    RECOVERED = "recovered"
    FINISHED = "finished"
    SPIKE = "spike"
    DISK_LOW = "disk_low"
    DISK_OK = "disk_ok"
    TEST = "test"


HEADLINES = {
    Event.STOPPED: "was saved and stopped, and can be resumed",
    Event.FAILED: "FAILED",
    Event.STALLED: "makes NO PROGRESS",
    Event.UNREADABLE: "CANNOT BE JUDGED",
    Event.RESTARTED: "was started again; its end was not seen",
    Event.RECOVERED: "is running again",
    Event.FINISHED: "is complete",
    Event.SPIKE: "had BAD STEPS",
    Event.DISK_LOW: "has LITTLE DISK SPACE left",
    Event.DISK_OK: "has enough disk space again",
    Event.TEST: "is the folder of this test message: alerts arrive",
}
CONDITIONS = {
    State.RUNNING: Event.RECOVERED,
    State.COMPLETE: Event.FINISHED,
    State.STOPPED: Event.STOPPED,
    State.QUEUED: Event.STOPPED,
    State.FAILED: Event.FAILED,
    State.LOST: Event.FAILED,
    State.PREEMPTED: Event.STOPPED,
    State.STALLED: Event.STALLED,
    State.UNKNOWN: Event.UNREADABLE,
    State.UNREADABLE: Event.UNREADABLE,
}
"""State of a run -> event that tells that it has come into this state; `not started` is none."""
PROBLEMS = (Event.FAILED, Event.STALLED, Event.UNREADABLE)
"""Events that are also told about a run that was in this state when it was first seen."""


@dataclass(slots=True, kw_only=True)
class Known:
    """The facts that have been told about a run, as the state file keeps them."""

    condition: str = ""
    """The last event that describes the state; empty for a run not yet seen."""
    launches: int = 0
    bad_steps: int = 0
    is_disk_low: bool = False
    spike_at: float = 0.0
    """Time of the last message about bad steps, in seconds since 1970."""
    unreadable_polls: int = 0


def find_events(known: Known, status: RunStatus, now: float, *, may_be_missing: bool = False) -> list[Event]:
    """Return what is new in a status, in order, and update `known`.

    may_be_missing: do not tell that a run which was never seen cannot be read, because it may not have been started.
    """
    first = not known.condition
    condition = CONDITIONS.get(State(status.state))
    if condition is Event.UNREADABLE:
        known.unreadable_polls += 1
        if known.unreadable_polls < UNREADABLE_POLLS or (first and may_be_missing):
            return []
    else:
        known.unreadable_polls = 0
    events = [] if condition is None else _state_events(known, status, condition)
    if condition is not Event.UNREADABLE:
        events += _disk_events(known, status) + _spike_events(known, status, now, first)
    return events


def _state_events(known: Known, status: RunStatus, condition: Event) -> list[Event]:
    before, known.condition = known.condition, condition
    launches = known.launches if status.launches is None else status.launches
    is_new_launch, known.launches = launches > known.launches, launches
    if before == condition:
        return [Event.RESTARTED] if condition is Event.RECOVERED and is_new_launch else []
    return [condition] if before or condition in PROBLEMS else []


def _disk_events(known: Known, status: RunStatus) -> list[Event]:
    free, needed = status.disk_free_bytes, status.disk_needed_bytes
    if free is None or needed is None:
        return []
    is_low = any(found.kind is ProblemKind.DISK_LOW for found in status.problems)
    is_low = is_low or (known.is_disk_low and free < needed * ENOUGH_FREE)
    before, known.is_disk_low = known.is_disk_low, is_low
    return [] if is_low == before else [Event.DISK_LOW if is_low else Event.DISK_OK]


def _spike_events(known: Known, status: RunStatus, now: float, first: bool) -> list[Event]:
    count = known.bad_steps if status.bad_steps is None else status.bad_steps
    if first or count < known.bad_steps:  # a new run in the folder
        known.bad_steps = count
    if count == known.bad_steps or now - known.spike_at < SPIKE_SECONDS:
        return []
    known.spike_at, known.bad_steps = now, count
    return [Event.SPIKE]


def message(event: Event, status: RunStatus, before: Known, now: float, note: str = "") -> dict[str, Any]:
    """Return the message of an event as JSON values. before: what was known before it. note: a sentence of the launcher."""
    name = os.path.basename(os.path.abspath(status.run))
    new_bad_steps = (status.bad_steps or 0) - before.bad_steps if event is Event.SPIKE else 0
    details = _details(event, status, new_bad_steps)
    return {
        "version": VERSION,
        "id": uuid.uuid4().hex,
        "event": str(event),
        "time": datetime.fromtimestamp(now, UTC).isoformat(timespec="seconds"),
        "run": os.path.abspath(status.run),
        "name": name,
        "text": ". ".join(part for part in (f"{name} {HEADLINES[event]}", *details, note) if part),
        "state": str(status.state),
        "reason": status.reason,
        "note": note,
        "iteration": status.iteration,
        "train_iters": status.train_iters,
        "lm_loss": status.lm_loss,
        "checkpoint_iteration": status.checkpoint_iteration,
        "new_bad_steps": new_bad_steps,
        "last_bad_step": status.last_bad_step,
        "disk_free_bytes": status.disk_free_bytes,
        "host": status.host,
        "slurm_job_id": status.slurm_job_id,
        "slurm_state": status.slurm_state,
        "launches": status.launches,
        "sent_from": socket.gethostname(),
    }


def _details(event: Event, status: RunStatus, new_bad_steps: int) -> list[str]:
    """Return the sentences after the headline, without full stops."""
    found = []
    if event is Event.SPIKE:
        last = status.last_bad_step or {}
        found.append(
            f"{new_bad_steps} new; the last one: iteration {last.get('iteration')}, {last.get('reason')} ({last.get('action')})"
        )
    elif event in (Event.DISK_LOW, Event.DISK_OK):
        found.append(f"{(status.disk_free_bytes or 0) / GIB:.1f} GiB free, {(status.disk_needed_bytes or 0) / GIB:.1f} needed")
    elif status.reason:
        found.append(status.reason.rstrip("."))
    if status.iteration is not None:
        length = f" of {status.train_iters:,}" if status.train_iters else ""
        saved = "" if status.checkpoint_iteration is None else f", saved: {status.checkpoint_iteration:,}"
        loss = "" if status.lm_loss is None else f", loss {status.lm_loss:.4f}"
        found.append(f"Iteration {status.iteration:,}{length}{saved}{loss}")
    places = [f"host {status.host}" if status.host else "", f"SLURM job {status.slurm_job_id}" if status.slurm_job_id else ""]
    if any(places):
        found.append(", ".join(place for place in places if place))
    return found


def as_values(known: Known) -> dict[str, Any]:
    """Return the values for the state file."""
    return asdict(known)

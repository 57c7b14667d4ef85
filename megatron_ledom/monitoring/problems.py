"""The problems of a run that its folder shows. Alerts and scripts tell them apart by `kind`."""

from dataclasses import dataclass
from enum import StrEnum

MOST_TEXT = 600
"""Longest text of a problem, in characters."""


class ProblemKind(StrEnum):
    """The kind of a problem."""

    STALLED = "stalled"
    """The process runs, but makes no progress."""
    FAILED = "failed"
    """An error or the watchdog ended the launch."""
    LOST = "lost"
    """The process ended without a report: killed, out of memory, its host down."""
    PREEMPTED = "preempted"
    """SLURM ended the job for another one, and has not queued it again."""
    STOPPED = "stopped"
    """The run saved and stopped before its last iteration, and no job continues it."""
    UNKNOWN = "unknown"
    """The files do not say if the run is alive."""
    UNREADABLE = "unreadable"
    """The folder is missing, is no run, or its disk does not answer."""
    SPIKE = "spike"
    """Some of the last steps were spikes, or not finite."""
    DISK_LOW = "disk low"
    """The disk has less free space than the next checkpoints may need."""
    CHECKPOINTS = "checkpoints"
    """The run cannot be resumed from its newest checkpoint as it is."""
    DAMAGED = "damaged"
    """A file, or a part of it, cannot be read."""
    CLOCK = "clock"
    """The clocks of the run's host, of this machine or of the disk differ."""


SERIOUS = frozenset(
    {
        ProblemKind.STALLED,
        ProblemKind.FAILED,
        ProblemKind.LOST,
        ProblemKind.PREEMPTED,
        ProblemKind.UNKNOWN,
        ProblemKind.UNREADABLE,
        ProblemKind.DISK_LOW,
        ProblemKind.CHECKPOINTS,
    }
)
"""Kinds with which a run is not healthy."""


@dataclass(frozen=True, slots=True)
class Problem:
    """A problem of a run."""

    kind: ProblemKind
    text: str
    """A sentence for people."""

    @property
    def is_serious(self) -> bool:
        """Return True if somebody has to look at the run."""
        return self.kind in SERIOUS


def problem(kind: ProblemKind, text: str) -> Problem:
    """Return a problem with its text on one line and cut to MOST_TEXT characters."""
    return Problem(kind, " ".join(text.split())[:MOST_TEXT])

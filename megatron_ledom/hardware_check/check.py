"""One check of the hardware: its name, its time limit, and its result."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class Status(StrEnum):
    """The result of a check in a word."""

    PASSED = "passed"
    FAILED = "failed"
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True)
class Setting:
    """The machine that a check runs on, and its resources."""

    device: str
    """`cuda` or `cpu`; on a CPU the same code runs over gloo, with smaller sizes."""
    num_gpus: int
    """Ranks that a check may start on this machine: one for each GPU, or on a CPU that many processes."""
    seconds: float
    """Time limit of this check, or when it runs, what is left of it; the process is killed after it."""
    folder: str
    """An empty folder for the files of this check. It is kept in the report's folder."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of a check, as the report shows it."""

    status: Status
    reason: str = ""
    """One line: why the check failed or was skipped, or what a passed check found."""
    numbers: dict[str, Any] = field(default_factory=dict)
    """Measured values with their units in the names, such as `loss_difference` or `bandwidth_gb_per_s`; plain JSON."""


def passed(reason: str = "", **numbers: Any) -> Outcome:
    """Return a passed outcome."""
    return Outcome(Status.PASSED, reason, numbers)


def failed(reason: str, **numbers: Any) -> Outcome:
    """Return a failed outcome."""
    return Outcome(Status.FAILED, reason, numbers)


def skipped(reason: str, **numbers: Any) -> Outcome:
    """Return a skipped outcome: the machine lacks what the check needs."""
    return Outcome(Status.SKIPPED, reason, numbers)


@dataclass(frozen=True, slots=True)
class Check:
    """A check that runs in a process of its own, so that a crash or a hang does not stop the others."""

    name: str
    """Name in the report and of `--only`."""
    title: str
    """Subject of the check, in a sentence for the report."""
    share: float
    """Part of the whole time that this check may take, relative to the others."""
    function: str
    """`module:function`; the function maps a Setting to an Outcome. The module is imported in the check's process only."""
    keeps_job: bool = False
    """True for a check that starts ranks on the nodes of a SLURM job. The others do not see the job: they are runs of one machine."""

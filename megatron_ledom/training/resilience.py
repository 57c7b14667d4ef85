"""Stop a run without losing work: after a signal to any rank, or near the end of the job, all ranks save at the same step."""

import logging
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

from megatron_ledom.config.schema import TrainConfig
from megatron_ledom.errors import StoppedWaiting, UsageError
from megatron_ledom.platform.slurm import seconds_until_job_end

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
LONGEST_DEFAULT_MARGIN_SECONDS = 600.0


class StopRequest:
    """A request to stop, by SIGTERM, SIGUSR1 or SIGUSR2 to any rank, or by a deadline; the ranks agree on it after each step.

    Make it before anything else, also before torch is imported: a signal that comes while the run is being built then ends the
    run after its first step instead of killing it.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.deadline: Deadline | None = None
        """Set on rank 0 once it is known."""
        self.exits_at_once = False
        self.has_reached_deadline = False
        for number in STOP_SIGNALS:
            signal.signal(number, self._remember)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # the process of the last stage blocks them

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        if self.exits_at_once and number == signal.SIGTERM:
            raise StoppedWaiting(f"got {self.received.name} before training began: the run does not start")

    @contextmanager
    def exiting_at_once(self) -> Iterator[None]:
        """Let SIGTERM raise StoppedWaiting, as there is nothing to save yet.

        The other signals are warnings before a time limit and are only remembered: a job whose limit is shorter than its
        warning must still do one step per start.
        """
        self.exits_at_once = True
        try:
            yield
        finally:
            self.exits_at_once = False

    def name(self) -> str | None:
        """Return the name of the received signal, or None."""
        return None if self.received is None else self.received.name

    def reason(self) -> str:
        """Return the reason for which this rank has asked all ranks to stop; empty if it has not."""
        if self.received is not None:
            return f"got {self.received.name}"
        if self.has_reached_deadline and self.deadline is not None:
            return self.deadline.describe()
        return ""

    def agreed(self, device: "torch.device", seconds_to_save: float) -> bool:
        """Return True if any rank has to stop; the same on every rank. Call on every rank at every step boundary.

        `seconds_to_save` is the time this rank would need to save and exit.
        """
        import torch
        import torch.distributed as dist

        too_late = self.deadline is not None and self.deadline.reached(seconds_to_save)
        self.has_reached_deadline = too_late
        flag = torch.tensor(int(too_late or self.received is not None), dtype=torch.int32, device=device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        stop = bool(flag.item())
        if stop and self.received is not None:
            log.warning("got %s: saving and exiting", self.received.name)
        elif too_late and self.deadline is not None:
            log.warning("%s: saving and exiting", self.deadline.describe())
        return stop


class Deadline:
    """The time by which a run must have saved and exited. `seconds_left` returns the seconds until then, None without a limit."""

    def __init__(self, seconds_left: Callable[[], float | None]) -> None:
        self.seconds_left = seconds_left
        self.longest = 0.0
        """Longest time from one step boundary to the next so far, in seconds, with validations and the waits for saves."""
        self.seconds_to_save = 0.0
        self.last: float | None = None
        left = seconds_left()
        self.at = None if left is None else time.monotonic() + left

    def reached(self, seconds_to_save: float) -> bool:
        """Return True if one more step plus `seconds_to_save` might end too late. Call at every step boundary."""
        now = time.monotonic()
        if self.last is not None:
            self.longest = max(self.longest, now - self.last)
        self.last, self.seconds_to_save = now, seconds_to_save
        needed = self.longest + seconds_to_save
        if self.at is None or now + needed < self.at:
            return False
        left = self.seconds_left()  # read again, because the limit of a job can be extended while it runs
        self.at = self.at if left is None else now + left
        return now + needed >= self.at

    def describe(self) -> str:
        """Return the reason to exit, for the log."""
        left = 0.0 if self.at is None else max(0.0, self.at - time.monotonic())
        needed = f"a step takes up to {self.longest:.1f} s, and saving {self.seconds_to_save:.1f} s"
        return f"{left:.0f} s are left for training; {needed}"


def find_deadline(train: TrainConfig, started: float | None = None) -> Deadline:
    """Return the deadline of a run that started at `started`, a time.monotonic value (default: now).

    It is `train.exit_before_limit_seconds` before the end of the SLURM job, or `train.exit_duration_seconds` after the start,
    whichever is earlier. Raises UsageError if the job ends before `train.exit_before_limit_seconds` have passed.
    """
    began = time.monotonic() if started is None else started
    configured = train.exit_before_limit_seconds
    until_end = None if configured == 0 else seconds_until_job_end()
    margin = min(LONGEST_DEFAULT_MARGIN_SECONDS, (until_end or 0) / 10) if configured is None else configured
    if configured is not None and until_end is not None and configured >= until_end:
        raise UsageError(
            f"train.exit_before_limit_seconds={configured}, but SLURM ends this job in {until_end:.0f} s; request more time"
            f" for the job, or set a value well below {until_end:.0f}"
        )

    job_end = None if until_end is None else time.monotonic() + until_end

    def seconds_left() -> float | None:
        """Return the seconds until the deadline, None without one; queries SLURM again, since a limit can be extended."""
        nonlocal job_end
        if job_end is not None and (now_until_end := seconds_until_job_end()) is not None:
            job_end = time.monotonic() + now_until_end  # else SLURM does not answer now
        ends = [] if job_end is None else [job_end - margin]
        if train.exit_duration_seconds is not None:
            ends.append(began + train.exit_duration_seconds)
        return min(ends) - time.monotonic() if ends else None

    if until_end is not None:
        log.info("SLURM ends this job in %.0f s; the run saves and exits %.0f s before that", until_end, margin)
    return Deadline(seconds_left)

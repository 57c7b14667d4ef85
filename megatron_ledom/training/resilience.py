"""Stop a run so that nothing is lost: after a signal to any rank, or near the job's end, all ranks save at the same step."""

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
    """Remembers SIGTERM, SIGUSR1 or SIGUSR2 from its construction on, and watches a deadline; ranks agree on both each step.

    Made first of all, before torch is imported: a signal that comes while a run is being built ends it after its first step
    instead of killing it.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.deadline: Deadline | None = None
        """Set on rank 0 once it is known."""
        self.leaves_at_once = False
        for number in STOP_SIGNALS:
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        if self.leaves_at_once and number == signal.SIGTERM:
            raise StoppedWaiting(f"got {self.received.name} before training began: nothing starts")

    @contextmanager
    def leaving_at_once(self) -> Iterator[None]:
        """Let SIGTERM raise StoppedWaiting: nothing has begun that would have to be saved. The others are warnings: a job whose
        time limit is shorter than its warning has to come a step further at each start.
        """
        self.leaves_at_once = True
        try:
            yield
        finally:
            self.leaves_at_once = False

    def name(self) -> str | None:
        """Return the name of the signal that came, if one did."""
        return None if self.received is None else self.received.name

    def agreed(self, device: "torch.device", seconds_to_save: float) -> bool:
        """Return whether any rank has to stop; the same on every rank. Call on every rank at every step boundary.

        `seconds_to_save` is how long this rank would take to save and leave.
        """
        import torch
        import torch.distributed as dist

        too_late = self.deadline is not None and self.deadline.reached(seconds_to_save)
        flag = torch.tensor(int(too_late or self.received is not None), dtype=torch.int32, device=device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        stop = bool(flag.item())
        if stop and self.received is not None:
            log.warning("got %s: saving and leaving", self.received.name)
        elif too_late and self.deadline is not None:
            log.warning("%s: saving and leaving", self.deadline.describe())
        return stop


class Deadline:
    """The time at which a run must begin to save and leave; `seconds_left` returns how far off it is, None without a limit."""

    def __init__(self, seconds_left: Callable[[], float | None]) -> None:
        self.seconds_left = seconds_left
        self.longest = 0.0
        """Seconds from one step boundary to the next, the longest so far, validations too; of a save, what training waits for."""
        self.seconds_to_save = 0.0
        self.last: float | None = None
        left = seconds_left()
        self.at = None if left is None else time.monotonic() + left

    def reached(self, seconds_to_save: float) -> bool:
        """Return whether one more step, and `seconds_to_save` after it, might end too late. Call at every step boundary."""
        now = time.monotonic()
        if self.last is not None:
            self.longest = max(self.longest, now - self.last)
        self.last, self.seconds_to_save = now, seconds_to_save
        needed = self.longest + seconds_to_save
        if self.at is None or now + needed < self.at:
            return False
        left = self.seconds_left()  # asked again: the limit of a job can be extended while it runs
        self.at = self.at if left is None else now + left
        return now + needed >= self.at

    def describe(self) -> str:
        """Return the reason to leave, for the log."""
        left = 0.0 if self.at is None else max(0.0, self.at - time.monotonic())
        needed = f"a step has taken up to {self.longest:.1f} s, and saving would take {self.seconds_to_save:.1f} s"
        return f"{left:.0f} s are left to train in, {needed}"


def find_deadline(train: TrainConfig, started: float | None = None) -> Deadline:
    """Return the earlier of the SLURM job's end, less `train.exit_before_limit_seconds`, and `train.exit_duration_seconds` from the
    start, `started` by time.monotonic (default: now).

    Raises UsageError where the job is too short for the time that shall be left of it.
    """
    began = time.monotonic() if started is None else started
    asked = train.exit_before_limit_seconds
    until_end = None if asked == 0 else seconds_until_job_end()
    margin = min(LONGEST_DEFAULT_MARGIN_SECONDS, (until_end or 0) / 10) if asked is None else asked
    if asked is not None and until_end is not None and asked >= until_end:
        raise UsageError(
            f"train.exit_before_limit_seconds={asked}, but SLURM ends this job in {until_end:.0f} s already; ask for more"
            f" time, or set it well below {until_end:.0f}"
        )

    job_end = None if until_end is None else time.monotonic() + until_end

    def seconds_left() -> float | None:
        """Return the time left to save in; SLURM is asked again, since a limit can be extended. None without a limit."""
        nonlocal job_end
        if job_end is not None and (now_until_end := seconds_until_job_end()) is not None:
            job_end = time.monotonic() + now_until_end  # else SLURM does not answer now
        ends = [] if job_end is None else [job_end - margin]
        if train.exit_duration_seconds is not None:
            ends.append(began + train.exit_duration_seconds)
        return min(ends) - time.monotonic() if ends else None

    if until_end is not None:
        log.info("SLURM ends this job in %.0f s; the run saves and leaves %.0f s before that", until_end, margin)
    return Deadline(seconds_left)

"""Stopping in good order: a signal to any rank makes all ranks save at the same step boundary."""

import logging
import signal
from types import FrameType

import torch
import torch.distributed as dist

log = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Remembers SIGTERM or SIGUSR1 from now on; the ranks agree on it once a step.

    Made before a run is built: a signal that comes in the meantime, as under a short time limit, ends the run after its
    first step instead of killing it.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        for number in STOP_SIGNALS:
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)

    def agreed(self, device: torch.device) -> bool:
        """Whether any rank was told to stop; the same answer on every rank. Call on every rank."""
        flag = torch.tensor(0 if self.received is None else 1, dtype=torch.int32, device=device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        stop = bool(flag.item())
        if stop and self.received is not None:
            log.warning("got %s: saving and leaving", self.received.name)
        return stop

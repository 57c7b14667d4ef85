"""Stopping in good order: a signal to any rank makes all ranks save at the same step boundary."""

import logging
import signal
from types import FrameType

import torch
import torch.distributed as dist

from megatron_ledom.platform.device import Platform

log = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Remembers SIGTERM or SIGUSR1; the ranks agree on it once a step."""

    def __init__(self, platform: Platform) -> None:
        self.received: signal.Signals | None = None
        self.flag = torch.zeros(1, dtype=torch.int32, device=platform.device)
        for number in STOP_SIGNALS:
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)

    def agreed(self) -> bool:
        """Whether any rank was told to stop; the same answer on every rank. Call on every rank."""
        self.flag.fill_(0 if self.received is None else 1)
        dist.all_reduce(self.flag, op=dist.ReduceOp.MAX)
        stop = bool(self.flag.item())
        if stop and self.received is not None:
            log.warning("got %s: saving and leaving", self.received.name)
        return stop

"""Where the ranks' time goes: what a straggler is known by, the wait for data, and the memory.

The time told of a rank is from the start of a step until its last backward pass is done, before gradients are reduced over the
data-parallel replicas: in that reduction everybody waits for the slowest. Ranks of one tensor, context or pipeline group wait for
each other on the way, so such a group is slow as a whole, and the first of its ranks is named.
"""

import resource
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from megatron_ledom.data.dataset.batch import Batch
from megatron_ledom.platform.device import Platform
from megatron_ledom.training.watchdog import Watchdog

Record = dict[str, Any]


class RankTimes:
    """Seconds of this rank since the last reading, and their comparison over all ranks."""

    def __init__(self, platform: Platform, core_config: Any, watchdog: Watchdog) -> None:
        self.platform, self.watchdog = platform, watchdog
        self.data_wait = 0.0
        self._begun: Any = None
        self._spans: list[tuple[Any, Any]] = []
        self._hook(core_config)

    def _hook(self, core_config: Any) -> None:
        """megatron-core's schedules call this function when the last backward pass is done."""
        finalize = core_config.finalize_model_grads_func

        def _finalize(*args: Any, **kwargs: Any) -> Any:
            self._spans.append((self._begun, self._mark()))
            return finalize(*args, **kwargs)

        core_config.finalize_model_grads_func = _finalize

    def begin_step(self) -> None:
        """A step begins."""
        self._begun = self._mark()

    def timed(self, batches: list[Iterator[Batch]]) -> list[Iterator[Batch]]:
        """The same micro-batches; the wait for each is counted, and the watchdog told of it."""
        return [self._timed(iterator) for iterator in batches]

    def _timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        while True:
            self.watchdog.tell("waiting for data")
            before = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self.data_wait += time.perf_counter() - before
            self.watchdog.tell("forward and backward")
            yield batch

    def read(self) -> Record:
        """Means a step since the last reading, over all ranks, and the peak of memory. Call on every rank."""
        steps = max(len(self._spans), 1)
        mine = torch.tensor([self._seconds() / steps, self.data_wait / steps, self._memory_gib()], dtype=torch.float64)
        mine = mine.to(self.platform.device)
        all_ranks = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(all_ranks, mine)
        seconds, waits, memory = torch.stack(all_ranks).cpu().T
        self.data_wait = 0.0
        self._spans.clear()
        return {
            "rank_seconds_min": float(seconds.min()),
            "rank_seconds_mean": float(seconds.mean()),
            "rank_seconds_max": float(seconds.max()),
            "slowest_rank": int(seconds.argmax()),
            "data_wait_seconds": float(waits.max()),
            "memory_gib": float(memory.max()),
        }

    def _mark(self) -> Any:
        """A moment: of the device's own stream on a GPU, where the process runs ahead of it."""
        if self.platform.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _seconds(self) -> float:
        self.platform.synchronize()
        if self.platform.device.type != "cuda":
            return float(sum(end - begin for begin, end in self._spans))
        return float(sum(begin.elapsed_time(end) for begin, end in self._spans)) / 1e3

    def _memory_gib(self) -> float:
        """Peak of this process: allocated on its GPU, or resident."""
        if self.platform.device.type == "cuda":
            return float(torch.cuda.max_memory_allocated(self.platform.device)) / 2**30
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

"""torch's profiler over a window of iterations, `logging.profile_start` to `profile_stop`, on `profile_ranks`."""

import logging
import os
from typing import Any

import torch.distributed as dist
from torch.profiler import profile, supported_activities

from megatron_ledom.config.schema import RunConfig
from megatron_ledom.training.log_guard import GuardedLog

log = logging.getLogger(__name__)


class ProfilerWindow:
    """Starts and ends the recording; the trace, for chrome://tracing or Perfetto, goes to profile/ in the run folder.

    The same calls on every rank: those that do not record wait until the traces are written.
    """

    def __init__(self, config: RunConfig) -> None:
        settings = config.logging
        self.records = dist.get_rank() in settings.profile_ranks
        self.start = settings.profile_start
        self.stop = settings.profile_stop or settings.profile_start or 0
        self.folder = os.path.join(config.run_dir, "profile")
        self._first: int | None = None
        self._profiler: Any = None

    def before(self, iteration: int) -> None:
        """Called before an iteration is done: starts the recording where it is to begin."""
        if self.start is None or self._first is not None or not self.start <= iteration <= self.stop:
            return
        self._first = iteration
        if self.records:
            self._profiler = profile(activities=supported_activities())  # type: ignore[no-untyped-call]
            self._profiler.start()

    def ends_with(self, iteration: int) -> bool:
        """Whether the recording is to end after this iteration: with `close`, which may take long."""
        return self._first is not None and iteration >= self.stop

    def close(self, iteration: int) -> None:
        """Write what was recorded up to `iteration`, if anything is."""
        if self._first is None:
            return
        if self._profiler is not None:
            self._write(iteration)
        self._first = self._profiler = self.start = None
        dist.barrier()

    def _write(self, iteration: int) -> None:
        self._profiler.stop()
        path = os.path.join(self.folder, f"rank_{dist.get_rank()}_iterations_{self._first}_to_{iteration}.json.gz")
        if GuardedLog(path).attempt(lambda: self._export(path), 0):
            log.info("profile written to %s", path)

    def _export(self, path: str) -> None:
        os.makedirs(self.folder, exist_ok=True)
        self._profiler.export_chrome_trace(path)

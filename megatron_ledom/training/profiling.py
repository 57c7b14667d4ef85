"""torch's profiler over a window of iterations, `logging.profile_start` to `profile_stop`, on `profile_ranks`."""

import logging
import os
from typing import Any

import torch.distributed as dist
from torch.profiler import profile, supported_activities

from megatron_ledom.config.schema import RunConfig

log = logging.getLogger(__name__)


class ProfilerWindow:
    """Starts and ends the recording; the trace, for chrome://tracing or Perfetto, goes to profile/ in the run folder."""

    def __init__(self, config: RunConfig) -> None:
        settings = config.logging
        wanted = settings.profile_start is not None and dist.get_rank() in settings.profile_ranks
        self.start = settings.profile_start if wanted else None
        self.stop = settings.profile_stop or settings.profile_start or 0
        self.folder = os.path.join(config.run_dir, "profile")
        self._profiler: Any = None

    def before(self, iteration: int) -> None:
        """Called before an iteration is done: starts the recording where it is to begin."""
        if self.start is not None and self._profiler is None and self.start <= iteration <= self.stop:
            self._first = iteration
            self._profiler = profile(activities=supported_activities())  # type: ignore[no-untyped-call]
            self._profiler.start()

    def after(self, iteration: int) -> None:
        """Called after an iteration is done: ends the recording where it is to end."""
        if self._profiler is not None and iteration >= self.stop:
            self.close(iteration)

    def close(self, iteration: int) -> None:
        """Write what was recorded up to `iteration`, if anything is."""
        if self._profiler is None:
            return
        self._profiler.stop()
        os.makedirs(self.folder, exist_ok=True)
        path = os.path.join(self.folder, f"rank_{dist.get_rank()}_iterations_{self._first}_to_{iteration}.json.gz")
        self._profiler.export_chrome_trace(path)
        self._profiler = self.start = None
        log.info("profile written to %s", path)

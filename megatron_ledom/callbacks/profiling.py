"""Run torch's profiler from iteration `logging.profile_start` to `profile_stop` on `profile_ranks`."""

import logging
import os
from typing import Any

import torch.distributed as dist
from torch.profiler import profile, supported_activities

from megatron_ledom.config.schema import RunConfig
from megatron_ledom.training.callback import Callback, TrainingRun
from megatron_ledom.training.log_guard import GuardedLog
from megatron_ledom.training.step_policy import StepResult

log = logging.getLogger(__name__)


class Profiling(Callback):
    """Profiles one window of iterations and writes a trace for chrome://tracing or Perfetto into profile/ of the run folder.

    Ranks that do not record wait until the traces are written.
    """

    def __init__(self, config: RunConfig) -> None:
        settings = config.logging
        self.records = dist.get_rank() in settings.profile_ranks
        self.start = settings.profile_start
        self.stop = settings.profile_stop or settings.profile_start or 0
        self.folder = os.path.join(config.run_dir, "profile")
        self._first: int | None = None
        self._profiler: Any = None

    def on_step_start(self, run: TrainingRun) -> None:
        """Start recording when the window begins."""
        iteration = run.state.iteration + 1
        if self.start is None or self._first is not None or not self.start <= iteration <= self.stop:
            return
        self._first = iteration
        if self.records:
            self._profiler = profile(activities=supported_activities())  # type: ignore[no-untyped-call]
            self._profiler.start()

    def on_step_end(self, run: TrainingRun, result: StepResult | None) -> None:
        """Write the trace when the window ends."""
        if self._first is not None and run.state.iteration >= self.stop:
            with run.pause("writing the profile"):
                self._close(run.state.iteration)

    def on_rollback(self, run: TrainingRun) -> None:
        """Write the steps recorded so far and end the profile: the repeated steps are not recorded."""
        self._close(run.state.iteration)

    def on_train_end(self, run: TrainingRun) -> None:
        """Write the steps recorded so far if the run ends inside the window."""
        self._close(run.state.iteration)

    def _close(self, iteration: int) -> None:
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

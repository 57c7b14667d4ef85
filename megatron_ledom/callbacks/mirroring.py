"""Give each finished checkpoint to the process that copies it to `checkpoint.mirror`."""

import logging
import signal
from collections.abc import Callable
from contextlib import ExitStack

import torch.distributed as dist

from megatron_ledom.checkpoint.folder import latest_name, own_checkpoints
from megatron_ledom.config.schema import RunConfig
from megatron_ledom.mirror.contents import Claim, number
from megatron_ledom.mirror.uploader import Uploader
from megatron_ledom.platform.slurm import seconds_until_job_end
from megatron_ledom.training.callback import Callback, TrainingRun
from megatron_ledom.training.resilience import StopRequest

log = logging.getLogger(__name__)

TERM_SECONDS = 15.0
"""Longest wait for the last copy after SIGTERM: launchers kill the ranks 30 seconds after it."""
JOB_END_SECONDS = 20.0
"""Seconds before the end of a SLURM job at which the wait ends."""


class Mirroring(Callback):
    """Looks after the copies between two steps; only the first rank, of a run with a mirror, has an `Uploader`."""

    def __init__(self, config: RunConfig, stop: StopRequest, resources: ExitStack) -> None:
        """resources: closes the uploader at the end, also after an error."""
        self.uploader: Uploader | None = None
        if config.checkpoint.mirror is not None and dist.get_rank() == 0:
            self.uploader = resources.enter_context(Uploader(config, Claim.of(config)))
        self.stop = stop
        self._newest: int | None = None

    def on_train_start(self, run: TrainingRun) -> None:
        """Copy the checkpoints that an earlier launch saved and did not copy."""
        if self.uploader is None:
            return
        latest = latest_name(run.state.store.folder)
        last = -1 if latest is None else number(latest)
        self._look(run, [iteration for iteration in own_checkpoints(run.state.store.folder) if iteration <= last])

    def on_step_start(self, run: TrainingRun) -> None:
        """Give a new checkpoint to the process. Its last record is in metrics.jsonl by now, and is copied too."""
        self._look(run)

    def _look(self, run: TrainingRun, more: list[int] | None = None) -> None:
        if self.uploader is None:
            return
        store, found = run.state.store, list(more or [])
        if store.newest != self._newest:
            try:
                there = own_checkpoints(store.folder)
            except OSError as error:
                log.warning("%s cannot be listed (%s); the next step tries again", store.folder, error.strerror)
                return
            self._newest = store.newest
            found += [iteration for iteration in there if iteration <= (self._newest or 0)]
        self.uploader.replayed = store.writer.replayed
        if found:
            self.uploader.add(found)
        self.uploader.poll()
        store.writer.held = self.uploader.held
        # no longer than the end of the run would wait: a mirror that hangs must not end a job hours before its limit
        store.seconds_to_copy = min(self.uploader.seconds_to_copy(), run.state.config.checkpoint.mirror_wait_seconds)

    def on_train_end(self, run: TrainingRun) -> None:
        """Wait for the last copy, but not beyond the limits of the launch."""
        if self.uploader is None:
            return
        self._look(run)
        self.uploader.finish(self._limit(run))

    def _limit(self, run: TrainingRun) -> Callable[[], float]:
        """Return a function of the seconds that may be waited in all."""
        config = run.state.config
        most = float(config.checkpoint.mirror_wait_seconds)
        if dist.get_world_size() > 1:  # the other ranks wait in a collective
            most = min(most, 0.8 * 60 * config.parallel.distributed_timeout_minutes)
        left = seconds_until_job_end()
        if left is not None:
            most = min(most, max(0.0, left - JOB_END_SECONDS))

        def seconds() -> float:
            """Return fewer seconds after SIGTERM, which may also come during the wait."""
            return min(most, TERM_SECONDS) if self.stop.received == signal.SIGTERM else most

        return seconds

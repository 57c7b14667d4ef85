"""Report a launch while it runs and how it ends: the heartbeat of rank 0."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from megatron_ledom.config.schema import RunConfig
from megatron_ledom.errors import DataError
from megatron_ledom.monitoring.heartbeat import COMPLETE, FAILED, STOPPED, HeartbeatWriter, Progress, read_heartbeat
from megatron_ledom.platform.launch import Launch
from megatron_ledom.platform.slurm import job_id


class LaunchReport:
    """The heartbeat of one launch. Every method may be called on every rank; only rank 0 has a writer."""

    def __init__(self, config: RunConfig, writer: HeartbeatWriter | None) -> None:
        self._config, self._writer = config, writer
        self._is_over = False

    def hung(self, reason: str) -> None:
        """Report that the watchdog ends this process. Without the stacks, which are in the log."""
        self._end(FAILED, " ".join(line for line in reason.splitlines() if not line.startswith(" ")))

    def ended(self, iteration: int, reason: str) -> None:
        """Report the end of training: the run is complete, or it was saved and can be resumed.

        reason: the cause of a stop, as far as this rank knows it; empty if it does not.
        """
        interval = self._config.train.exit_interval
        if iteration >= self._config.train.train_iters:
            self._end(COMPLETE, "", iteration)
        elif reason:
            self._end(STOPPED, reason, iteration)
        elif interval is not None and iteration % interval == 0:
            self._end(STOPPED, f"train.exit_interval={interval}", iteration)
        else:
            self._end(STOPPED, "another rank had to stop", iteration)

    def failed(self, error: BaseException) -> None:
        """Report the error that ends the launch."""
        self._end(FAILED, f"{type(error).__name__}: {error}")

    def _end(self, state: str, reason: str, iteration: int | None = None) -> None:
        if self._writer is None or self._is_over:
            return
        self._is_over = True
        self._writer.end(state, reason, iteration)


def report_complete(config: RunConfig, launch: Launch) -> None:
    """Correct the heartbeat of a run whose last launch saved the last iteration, but then failed. Writes nothing on other ranks."""
    if launch.rank != 0:
        return
    try:
        found = read_heartbeat(config.run_dir)
    except (OSError, DataError):
        return
    if found is None or found.state == COMPLETE:
        return
    done = Progress(
        iteration=config.train.train_iters, activity="complete", idle_seconds=0.0, limit_seconds=0.0, is_patient=False
    )
    HeartbeatWriter(config.run_dir, lambda: done, launch.world_size, job_id(os.environ)).end(COMPLETE)


@contextmanager
def reporting(config: RunConfig, rank: int, world_size: int, progress: Callable[[], Progress]) -> Iterator[LaunchReport]:
    """Write heartbeats of rank 0 inside the context, and report an error that leaves it."""
    writer = HeartbeatWriter(config.run_dir, progress, world_size, job_id(os.environ)) if rank == 0 else None
    report = LaunchReport(config, writer)
    if writer is not None:
        writer.start()
    try:
        yield report
    except BaseException as error:
        report.failed(error)
        raise

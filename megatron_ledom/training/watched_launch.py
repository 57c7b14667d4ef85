"""Watch one launch: its watchdog, its heartbeat, and the report of its end."""

from collections.abc import Iterator
from contextlib import contextmanager

from megatron_ledom.config.schema import RunConfig
from megatron_ledom.monitoring.launch_report import LaunchReport, report_complete, reporting
from megatron_ledom.parallel.groups import wait_for_all_ranks
from megatron_ledom.platform.launch import Launch
from megatron_ledom.training.resilience import StopRequest
from megatron_ledom.training.watchdog import Watchdog

__all__ = ["end_launch", "report_complete", "watched"]


@contextmanager
def watched(config: RunConfig, launch: Launch) -> Iterator[tuple[Watchdog, LaunchReport]]:
    """Run the watchdog and, on rank 0, the heartbeat inside the context. An error that leaves it is reported."""
    with Watchdog(config, launch) as watchdog, reporting(config, launch.rank, launch.world_size, watchdog.progress) as report:
        watchdog.before_end = report.hung
        yield watchdog, report


def end_launch(watchdog: Watchdog, report: LaunchReport, iteration: int, stop: StopRequest) -> None:
    """Wait for all ranks, then report that training has ended at `iteration`. Call on every rank."""
    watchdog.set_activity("waiting for the last rank", patient=True)
    wait_for_all_ranks()  # rank 0 closes last; srun kills the rest a minute after the first rank ends
    report.ended(iteration, stop.reason())

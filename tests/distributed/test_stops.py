"""Early ends of a run, at a set time or by a lost rank, and their exit codes and progress for scripts."""

import os
import signal
import time
from functools import partial
from pathlib import Path

from tests.support.tiny_runs import TinyData, read_metrics, run_command, run_on_ranks, start_ranks

LONG = ("train.train_iters=100000", "data.allow_repeats=true", "checkpoint.save_interval=100000")


def test_run_exits_when_its_time_is_over_and_reports_its_progress(data: TinyData, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    records = run_on_ranks(data.config, run_dir, *LONG, "train.exit_duration_seconds=3", num_ranks=2)
    last = records[-1]["iteration"]
    assert (run_dir / "checkpoints/latest").read_text() == f"iter_{last:07d}\n"
    progress = run_command("--config", str(data.config), "--progress", f"run_dir={run_dir}", *LONG)
    assert (progress.returncode, progress.stdout) == (0, f"{last} 100000\n"), progress.stderr


def close_slowly(folder: Path) -> None:
    """Let rank 0 close its logs slowly, as with a tracking service; the other rank notes if it ended earlier."""
    from megatron_ledom.callbacks.metrics import MetricsWriter
    from megatron_ledom.parallel import groups

    close, stop, is_first = MetricsWriter.close, groups.stop_distributed, os.environ["RANK"] == "0"

    def closed_late(writer: MetricsWriter) -> None:
        close(writer)
        if is_first:
            time.sleep(1)
            (folder / "closed").touch()

    def noted() -> None:
        if not is_first and not (folder / "closed").exists():
            (folder / "ended early").touch()
        stop()

    MetricsWriter.close = closed_late  # type: ignore[method-assign]
    groups.stop_distributed = noted


def test_no_rank_ends_before_the_last_one_is_done(data: TinyData, tmp_path: Path) -> None:
    """srun kills the rest of a step a minute after its first rank has ended."""
    run_on_ranks(data.config, tmp_path / "run", "train.train_iters=3", num_ranks=2, hook=partial(close_slowly, tmp_path))
    assert (tmp_path / "closed").exists()
    assert not (tmp_path / "ended early").exists()


def test_rank_that_loses_another_exits_with_the_code_for_a_new_start(data: TinyData, tmp_path: Path) -> None:
    """The code is 3, which no mistake of a user has."""
    run_dir = tmp_path / "run"
    ranks = start_ranks(data.config, run_dir, *LONG, num_ranks=2)
    ranks.wait_until(lambda: (run_dir / "metrics.jsonl").exists() and len(read_metrics(run_dir)) > 2)
    time.sleep(0.1)
    ranks.send(signal.SIGKILL, rank=1)
    assert ranks.wait() == [3, -signal.SIGKILL], ranks.output()
    assert "rank 0 failed" in ranks.output()

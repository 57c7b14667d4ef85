"""How a run ends that does not come to its end: by a set time, by a rank that is lost; and what scripts are told of it."""

import signal
import time
from pathlib import Path

from tests.tiny_runs import TinyData, read_metrics, run_command, run_on_ranks, start_ranks

LONG = ("train.train_iters=100000", "data.allow_repeats=true", "checkpoint.save_interval=100000")


def test_run_leaves_when_its_time_is_over_and_tells_how_far_it_came(data: TinyData, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    records = run_on_ranks(data.config, run_dir, *LONG, "train.exit_duration_seconds=3", num_ranks=2)
    last = records[-1]["iteration"]
    assert (run_dir / "checkpoints/latest").read_text() == f"iter_{last:07d}\n"
    told = run_command("--config", str(data.config), "--progress", f"run_dir={run_dir}", *LONG)
    assert (told.returncode, told.stdout) == (0, f"{last} 100000\n"), told.stderr


def test_rank_that_loses_another_says_that_a_new_start_may_help(data: TinyData, tmp_path: Path) -> None:
    """Status 3, which no error of the user's has."""
    run_dir = tmp_path / "run"
    ranks = start_ranks(data.config, run_dir, *LONG, num_ranks=2)
    ranks.wait_until(lambda: (run_dir / "metrics.jsonl").exists() and len(read_metrics(run_dir)) > 2)
    time.sleep(0.1)
    ranks.send(signal.SIGKILL, rank=1)
    assert ranks.wait() == [3, -signal.SIGKILL], ranks.output()
    assert "rank 0 failed" in ranks.output()

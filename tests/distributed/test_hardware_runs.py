"""The runs of the hardware checks: a failing one is named and does not stop the others, and no process outlives the time limit."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_ledom.errors import UNFORESEEN
from megatron_ledom.hardware_check.check import Setting
from megatron_ledom.hardware_check.training_runs import RESERVE_SECONDS, RunFailedError, TrainingRuns, free_ports, wait_for

ONE_STEP = ["train.train_iters=1", "optimizer.lr_warmup_iters=0"]
IMPOSSIBLE = [*ONE_STEP, "optimizer.min_lr=1"]
RUNS_FOR_EVER = [sys.executable, "-c", "import threading; threading.Event().wait(600)"]


def training(tmp_path: Path, seconds: float = 100, num_gpus: int = 1) -> TrainingRuns:
    return TrainingRuns(Setting(device="cpu", num_gpus=num_gpus, seconds=seconds, folder=str(tmp_path)))


def test_a_failing_run_does_not_stop_the_others(tmp_path: Path) -> None:
    runs = training(tmp_path)
    records, failures = runs.try_each({"bad": IMPOSSIBLE, "good": ONE_STEP, "also bad": IMPOSSIBLE})
    assert [record["iteration"] for record in records["good"]] == [1]
    assert set(records) == {"good"}
    assert set(failures) == {"bad", "also bad"}
    assert all("exit codes [2]" in failure and "optimizer.min_lr" in failure for failure in failures.values())
    with pytest.raises(RunFailedError, match="the run bad on 1 ranks ended with the exit codes"):
        runs.train({"bad": IMPOSSIBLE})


def test_runs_end_before_the_time_limit(tmp_path: Path) -> None:
    runs = training(tmp_path, seconds=RESERVE_SECONDS + 1)
    started = time.monotonic()
    with pytest.raises(RunFailedError, match="the time limit of 6 s ended before the run long did"):
        runs.train({"long": ["train.train_iters=100000"]}, num_ranks=2)
    assert time.monotonic() - started < RESERVE_SECONDS


def test_ranks_that_wait_for_a_failed_one_get_a_little_time() -> None:
    waiting, ended = subprocess.Popen(RUNS_FOR_EVER), subprocess.Popen([sys.executable, "-c", "raise SystemExit(75)"])
    try:
        assert wait_for([waiting, ended], time.monotonic() + 60, grace_seconds=0.0) == [UNFORESEEN, 75]
        assert wait_for([waiting], time.monotonic() - 1) is None
    finally:
        for process in (waiting, ended):
            process.kill()
            process.wait()


def test_free_ports_differ() -> None:
    assert len(set(free_ports(20))) == 20

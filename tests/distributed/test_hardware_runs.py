"""The runs of the hardware checks: a failing one is named and does not stop the others, and no process outlives the time limit."""

import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_ledom.convert.hf_export import export_hf
from megatron_ledom.convert.verify import MAX_LOGIT_DIFFERENCE
from megatron_ledom.errors import UNFORESEEN
from megatron_ledom.hardware_check import golden, layouts, planner, training_runs
from megatron_ledom.hardware_check.check import Setting
from megatron_ledom.hardware_check.conversion import device_difference
from megatron_ledom.hardware_check.curves import compare_each
from megatron_ledom.hardware_check.ranks import RESERVE_SECONDS, Ranks, free_ports, wait_for
from megatron_ledom.hardware_check.resume import first_different_step, first_different_tensor, stored_tensors
from megatron_ledom.hardware_check.training_runs import RunFailedError, TrainingRuns
from megatron_ledom.planning.hardware import load_hardware

ONE_STEP = ["train.train_iters=1", "optimizer.lr_warmup_iters=0"]
IMPOSSIBLE = [*ONE_STEP, "optimizer.min_lr=1"]
RUNS_FOR_EVER = [sys.executable, "-c", "import threading; threading.Event().wait(600)"]


@pytest.fixture(autouse=True)
def _ranks_start_at_once(python: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ranks be forks of a process that has imported the trainer."""
    monkeypatch.setattr(sys, "executable", str(python))


def training(tmp_path: Path, seconds: float = 300, num_gpus: int = 1) -> TrainingRuns:
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


def test_the_comparisons_see_a_run_with_another_seed(tmp_path: Path) -> None:
    runs = training(tmp_path)
    records = runs.train({"one": ONE_STEP, "other": [*ONE_STEP, "train.seed=43"]})
    for tolerance in (golden.TOLERANCE, layouts.TOLERANCE):
        assert compare_each(records, records["one"], tolerance)[1][0].startswith("other: losses differ by")
    assert first_different_step(records["other"], records["one"]) == 1
    one, other = (stored_tensors(runs.run_dir(name)) for name in ("one", "other"))
    assert "tensors differ" in str(first_different_tensor(other, one))
    folder = str(tmp_path / "hugging_face")
    export_hf(runs.run_dir("one"), folder, verify=None)
    assert device_difference(runs.run_dir("one"), folder, "cpu") <= MAX_LOGIT_DIFFERENCE
    assert device_difference(runs.run_dir("other"), folder, "cpu") > 100 * MAX_LOGIT_DIFFERENCE


def test_a_run_that_had_much_time_has_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layout whose collectives hang must not pass as one for which no time was left."""
    monkeypatch.setattr(training_runs, "LONG_SECONDS", 0.0)
    runs = training(tmp_path)
    runs.end = time.monotonic() + 1
    records, failures = runs.try_each({"long": ["train.train_iters=100000"], "next": []})
    assert records == {}
    assert list(failures) == ["long"]
    assert "so it may hang" in failures["long"]


def test_runs_end_before_the_time_limit(tmp_path: Path) -> None:
    runs = training(tmp_path, seconds=RESERVE_SECONDS + 1)
    started = time.monotonic()
    with pytest.raises(RunFailedError, match="the time limit of 6 s ended before the run long did"):
        runs.train({"long": ["train.train_iters=100000"]}, num_ranks=2)
    assert time.monotonic() - started < RESERVE_SECONDS


def test_prepared_ranks_train_once_and_only_as_asked(tmp_path: Path) -> None:
    runs = training(tmp_path)
    runs.prepare(2)
    runs.prepare(1)
    (_, _, two), (_, _, one) = runs.prepared
    assert [record["iteration"] for record in runs.train({"alone": ONE_STEP})["alone"]] == [1]
    assert all(process.returncode == 0 for process in one.processes)
    assert all(process.poll() is None for process in two.processes)
    two.processes[0].kill()
    with pytest.raises(RunFailedError, match=r"the run both on 2 ranks ended with the exit codes \[-9, "):
        runs.train({"both": ONE_STEP}, num_ranks=2)
    assert runs.prepared == []
    assert all(process.poll() is not None for process in two.processes)


def test_prepared_ranks_that_get_no_work_end_with_their_parent(tmp_path: Path) -> None:
    """A check that fails early leaves them."""
    ranks = Ranks("megatron_ledom.hardware_check.rank", tmp_path / "launch.json", 1, "cpu")
    assert ranks.processes[0].stdin is not None
    ranks.processes[0].stdin.close()
    assert ranks.processes[0].wait(60) == 0


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


def test_two_ranks_measure_collectives_and_a_failure_is_named(tmp_path: Path) -> None:
    hardware, setting = load_hardware("cpu"), Setting(device="cpu", num_gpus=2, seconds=600, folder=str(tmp_path))
    found, problems = planner.measure_collectives(hardware, setting)
    assert problems == []
    assert 0 < found["collective_efficiency"] <= 1
    assert {row["is_fitted"] for row in found["collectives"]} == {True, False}
    assert all(row["seconds"] > 0 and row["planned_seconds"] > 0 for row in found["collectives"])
    assert planner.measure_collectives(hardware, replace(setting, num_gpus=1)) == ({}, [])
    found, problems = planner.measure_collectives(hardware, replace(setting, seconds=0.1))
    assert found == {}
    assert problems[0].startswith("the collectives of 2 ranks did not end in 0 s")

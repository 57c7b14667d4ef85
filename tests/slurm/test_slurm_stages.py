"""STAGES of examples/slurm/pretrain.sbatch under a real SLURM: a job of several stages that ends early resumes in the right one.

All stages are compared bit for bit with runs that are started by hand, one after the other.
"""

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml

from tests.slurm.cluster import Cluster
from tests.support import tiny_runs
from tests.support.paths import ROOT
from tests.support.tiny_runs import TinyData, curve, read_metrics, read_tensors, run_each_on_ranks

STAGES = {
    "base": ["train.train_iters=10", "checkpoint.save_interval=10"],
    "anneal": ["train.train_iters=200", "checkpoint.save_interval=100", "train.seed=7", "train.global_batch_size=4"],
    "longer": ["train.train_iters=6", "data.seq_length=64", "parallel.tensor_model_parallel_size=2"],
}
COMMON = ["data.allow_repeats=true"]
TOTAL = 216
OPTIONS = "--nodes=2 --ntasks-per-node=1 --gpus-per-node=0 --cpus-per-task=1 --mem=4000M --time=60"


@dataclass
class StagesJob:
    """A job that trains the stages."""

    cluster: Cluster
    folder: Path
    config: Path
    job: str = ""

    def submit(self, python: str) -> None:
        """Submit by the script itself, which checks all stages first."""
        entries = [
            {"config": str(self.config), "overrides": [f"run_dir={self.folder / name}", *COMMON, *overrides]}
            for name, overrides in STAGES.items()
        ]
        file = self.folder / "stages.yaml"
        file.write_text(yaml.safe_dump({"stages": entries}), encoding="utf-8")
        variables = {"PYTHON": python, "OMP_NUM_THREADS": "1", "STAGES": str(file)}
        variables["SBATCH_OPTIONS"] = f"{OPTIONS} --output={self.folder}/job.log"
        printed = self.cluster.run("bash", "examples/slurm/pretrain.sbatch", cwd=ROOT, **variables)
        assert "stage 1 of 3 (base): next" in printed
        assert "stage 3 of 3 (longer): to come" in printed
        self.job = printed.split()[-1]

    def logged(self) -> str:
        log = self.folder / "job.log"
        return log.read_text() if log.exists() else ""

    def wait_for_iteration(self, stage: str, iteration: int) -> None:
        metrics = self.folder / stage / "metrics.jsonl"
        self.cluster.wait_until(
            lambda: metrics.exists() and len(metrics.read_text().splitlines()) >= iteration, 300, explain=self.logged
        )

    def check_ends_as(self, by_hand: Path) -> None:
        """Check that the job is complete after one restart, and that every stage equals its run to the last bit."""
        self.cluster.wait_for_end(self.job, seconds=600, explain=self.logged)
        ended = self.cluster.job(self.job)
        assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("COMPLETED", "0:0", "1"), self.logged()
        assert f"complete: iteration {TOTAL}" in self.logged()
        second = self.logged().split("start 2, 2 ranks")[1]
        assert re.findall(r"(stage \d of 3 \(\w+\)), run_dir=", second) == ["stage 2 of 3 (anneal)", "stage 3 of 3 (longer)"]
        assert "[rank 0] data.seq_length=64" in self.logged()
        assert "[rank 1] data.seq_length=64" not in self.logged()
        for name in STAGES:
            assert curve(read_metrics(self.folder / name)) == curve(read_metrics(by_hand / name)), name
            found, expected = read_tensors(self.folder / name), read_tensors(by_hand / name)
            assert found.keys() == expected.keys()
            assert [key for key in expected if not torch.equal(found[key], expected[key])] == [], name


@pytest.fixture(scope="module")
def by_hand(cluster: Cluster, data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the runs, each started by itself. It asks for `cluster` so that it is skipped together with the tests."""
    folder, runs, before = tmp_path_factory.mktemp("by_hand"), {}, []
    for name, overrides in STAGES.items():
        runs[folder / name] = [*COMMON, *overrides, *before]
        before = [f"init_from={folder / name}"]
    run_each_on_ranks(data.config, runs, num_ranks=2)
    return folder


@pytest.fixture
def stages(cluster: Cluster, data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StagesJob]:
    monkeypatch.setattr(tiny_runs, "SECONDS", 600)
    job = StagesJob(cluster, tmp_path, data.config)
    yield job
    cluster.end_pretraining(job.job)


def test_stages_that_the_time_limit_signals_in_the_second_resume_in_it(stages: StagesJob, by_hand: Path, python: Path) -> None:
    stages.submit(str(python))
    stages.wait_for_iteration("anneal", 5)
    stages.cluster.run("scancel", "--batch", "--signal=USR1", stages.job)
    stages.cluster.wait_until(lambda: "queued again at iteration" in stages.logged(), 300, explain=stages.logged)
    stages.cluster.start_again_soon(stages.job)
    (saved,) = map(int, re.findall(rf"saved; queued again at iteration (\d+) of {TOTAL}", stages.logged()))
    assert 10 + 5 <= saved < 210
    assert not (stages.folder / "longer").exists()
    stages.check_ends_as(by_hand)


@pytest.mark.slow
def test_stages_that_are_preempted_in_the_second_resume_in_it(stages: StagesJob, by_hand: Path, tmp_path: Path) -> None:
    """A job of higher priority takes the nodes; SLURM queues our job again by itself. Every rank starts as a user's does."""
    stages.submit(sys.executable)
    stages.wait_for_iteration("anneal", 101)
    urgent = tmp_path / "urgent.sbatch"
    urgent.write_text("#!/bin/bash\nsleep 5\n")
    options = ["--partition=urgent", "--nodes=2", "--exclusive", f"--output={tmp_path}/urgent.log"]
    other = stages.cluster.submit(urgent, options=options, cwd=tmp_path)
    stages.cluster.wait_until(lambda: stages.cluster.states(other) == ["RUNNING"], explain=stages.logged)
    stages.cluster.wait_for_end(other)
    stages.cluster.start_again_soon(stages.job)
    assert "queued again" not in stages.logged()
    stages.check_ends_as(by_hand)

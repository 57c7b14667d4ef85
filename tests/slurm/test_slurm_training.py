"""examples/slurm/pretrain.sbatch under a real SLURM of two virtual nodes: a run resumes after every kind of early end.

Each run is compared bit for bit with an uninterrupted one: losses, gradient norms, and every tensor of the last checkpoint.
"""

import os
import re
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from megatron_ledom.checkpoint.folder import latest_checkpoint
from tests.slurm.cluster import Cluster
from tests.support import tiny_runs
from tests.support.alert_receivers import Hook, receiving
from tests.support.paths import ROOT
from tests.support.tiny_runs import TinyData, curve, read_metrics, read_tensors, run_on_ranks

PRETRAIN = ROOT / "examples/slurm/pretrain.sbatch"
TWO_NODES = ["--nodes=2", "--gpus-per-node=0", "--cpus-per-task=1", "--mem=4000M"]
VARIABLES = {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
ITERATIONS, SAVE_INTERVAL = 600, 100
NO_SIGNAL = "--signal=B:CONT@1"
"""Replaces SLURM's warning by a signal without effect, one second before the end."""


def settings(iterations: int = ITERATIONS, save_interval: int = SAVE_INTERVAL) -> list[str]:
    return [f"train.train_iters={iterations}", "data.allow_repeats=true", f"checkpoint.save_interval={save_interval}"]


@pytest.fixture(scope="module")
def uninterrupted(cluster: Cluster, data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run on two ranks. It asks for `cluster` so that it is skipped together with the tests."""
    run_dir = tmp_path_factory.mktemp("uninterrupted") / "run"
    run_on_ranks(data.config, run_dir, *settings(), num_ranks=2)
    return run_dir


@dataclass
class Training:
    """One training job."""

    cluster: Cluster
    run_dir: Path
    log: Path
    config: Path
    job: str = ""

    def submit(
        self,
        *overrides: str,
        options: tuple[str, ...] = ("--time=60",),
        iterations: int = ITERATIONS,
        ranks_per_node: int = 1,
        python: str = sys.executable,
        hook: Hook | None = None,
    ) -> None:
        """Submit by the script itself, which checks the settings first. Of two equal keys the later one counts."""
        options_text = " ".join([*TWO_NODES, f"--ntasks-per-node={ranks_per_node}", *options, f"--output={self.log}"])
        command = ["bash", str(PRETRAIN), f"run_dir={self.run_dir}", *settings(iterations), *overrides]
        variables = {**VARIABLES, "PYTHON": python, "SBATCH_OPTIONS": options_text, "CONFIG": str(self.config)}
        variables |= {} if hook is None else {"ALERT_WEBHOOK": f"{hook.address}/secret-path", "ALERT_INTERVAL": "1"}
        printed = self.cluster.run(*command, cwd=ROOT, **variables)
        assert f"{2 * ranks_per_node} ranks would start from iteration 0 of {iterations}" in printed
        self.job = printed.split()[-1]

    def logged(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def wait_for_iteration(self, iteration: int) -> None:
        metrics = self.run_dir / "metrics.jsonl"
        self.cluster.wait_until(
            lambda: metrics.exists() and len(metrics.read_text().splitlines()) > iteration, explain=self.logged
        )

    def wait_for_line(self, line: str) -> None:
        self.cluster.wait_until(lambda: line in self.logged(), seconds=300, explain=self.logged)

    def start_again(self) -> int:
        """Wait until the job is back in the queue, and start it soon. Returns the iteration from which it will resume."""
        self.cluster.start_again_soon(self.job, TimeLimit="60")
        checkpoint = latest_checkpoint(str(self.run_dir / "checkpoints"))
        return int(checkpoint[-7:]) if checkpoint else 0

    def check_ends_as(self, uninterrupted: Path, restarts: int) -> None:
        """Check that the job is complete after this number of restarts, with results equal to the last bit."""
        self.cluster.wait_for_end(self.job, seconds=600, explain=self.logged)
        ended = self.cluster.job(self.job)
        assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", str(restarts)), self.logged()
        assert "complete: iteration" in self.logged()
        assert curve(read_metrics(self.run_dir)) == curve(read_metrics(uninterrupted))
        found, expected = read_tensors(self.run_dir), read_tensors(uninterrupted)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.fixture
def training(cluster: Cluster, data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Training]:
    monkeypatch.setattr(tiny_runs, "SECONDS", 600)
    training = Training(cluster, tmp_path / "run", tmp_path / "job.log", data.config)
    yield training
    cluster.end_pretraining(training.job)


def test_signal_before_the_time_limit(training: Training, data: TinyData, tmp_path: Path) -> None:
    """SLURM signals the batch shell; the ranks, two per node, save; the job queues itself again, resumes and completes."""
    iterations, whole = 150, tmp_path / "whole"
    few_saves = settings(iterations, save_interval=iterations)
    run_on_ranks(data.config, whole, *few_saves, num_ranks=4)
    with receiving() as hook:
        training.submit(*few_saves, iterations=iterations, ranks_per_node=2, hook=hook)
        training.wait_for_iteration(5)
        training.cluster.run("scancel", "--batch", "--signal=USR1", training.job)
        training.wait_for_line("saved; queued again at iteration")
        stopped_at = training.start_again()
        assert 5 < stopped_at < iterations
        training.check_ends_as(whole, restarts=1)
    assert hook.changes() == ["stopped", "recovered", "finished"]
    assert {each["slurm_job_id"] for each in hook.messages} == {training.job}
    assert "secret-path" not in training.logged()
    assert f"at iteration {stopped_at}" in training.logged()
    assert re.search(r"start 2, 4 ranks on n\[1-2\]", training.logged())


@pytest.mark.slow
def test_trainer_exits_by_itself_before_the_time_limit(training: Training, uninterrupted: Path) -> None:
    """SLURM sends no signal: rank 0 asks for the end of the job."""
    training.submit("train.exit_before_limit_seconds=50", options=("--time=1", NO_SIGNAL))
    training.wait_for_line("saved; queued again at iteration")
    assert "s are left for training" in training.logged()
    assert "got SIG" not in training.logged()
    assert 0 < training.start_again() < ITERATIONS
    training.check_ends_as(uninterrupted, restarts=1)


@pytest.mark.slow
def test_time_limit_by_the_signal_of_slurm(training: Training, uninterrupted: Path) -> None:
    """SLURM sends the signal 60 to 120 s after the start. Until then the ranks are stopped, so that they are not done before."""
    warned = ("--time=3", "--signal=B:USR1@60")
    training.submit("train.exit_before_limit_seconds=0", options=warned)
    training.wait_for_iteration(5)
    ranks = _processes(training)
    for rank in ranks:
        os.kill(rank, signal.SIGSTOP)
    training.wait_for_line("time limit is near")
    for rank in ranks:
        os.kill(rank, signal.SIGCONT)
    training.wait_for_line("saved; queued again at iteration")
    assert "got SIGUSR1" in training.logged()
    assert 5 <= training.start_again() < ITERATIONS
    training.check_ends_as(uninterrupted, restarts=1)


@pytest.mark.slow
def test_signal_while_python_starts_loses_nothing(training: Training, uninterrupted: Path) -> None:  # house: it checks
    """The signal kills ranks without a handler, or stops them after a step; in both cases the job queues itself again."""
    training.submit()
    training.cluster.wait_until(lambda: "start 1, 2 ranks" in training.logged(), explain=training.logged)
    training.cluster.wait_until(lambda: bool(_processes(training)), explain=training.logged)
    training.cluster.run("scancel", "--batch", "--signal=USR1", training.job)
    training.wait_for_line("queued again")
    training.start_again()
    training.check_ends_as(uninterrupted, restarts=1)


def _processes(training: Training) -> list[int]:
    try:
        return [training.cluster.rank_process(training.run_dir, rank) for rank in (0, 1)]
    except ValueError:
        return []


@pytest.mark.slow
def test_preempted_job(training: Training, uninterrupted: Path, tmp_path: Path) -> None:
    """A job of higher priority takes the nodes; SLURM queues our job again, and the job does not queue itself as well."""
    with receiving() as hook:
        _preempt(training, uninterrupted, tmp_path, hook)
    assert "PREEMPT" in training.logged()
    assert "queued again" not in training.logged()
    assert hook.changes() == ["stopped", "recovered", "finished"]


def _preempt(training: Training, uninterrupted: Path, tmp_path: Path, hook: Hook) -> None:
    training.submit(hook=hook)
    training.wait_for_iteration(150)
    urgent = tmp_path / "urgent.sbatch"
    urgent.write_text("#!/bin/bash\nsleep 5\n")
    options = ["--partition=urgent", "--nodes=2", "--exclusive", f"--output={tmp_path}/urgent.log"]
    other = training.cluster.submit(urgent, options=options, cwd=tmp_path)
    training.cluster.wait_until(lambda: training.cluster.states(other) == ["RUNNING"], explain=training.logged)
    assert training.cluster.job(training.job)["Restarts"] == "1"
    training.cluster.wait_for_end(other)
    assert 100 <= training.start_again() < ITERATIONS
    training.check_ends_as(uninterrupted, restarts=1)


@pytest.mark.slow
def test_killed_rank(training: Training, uninterrupted: Path) -> None:
    """The other rank ends too, and the job resumes from the last checkpoint."""
    training.submit()
    training.wait_for_iteration(150)
    os.kill(training.cluster.rank_process(training.run_dir, 1), signal.SIGKILL)
    training.wait_for_line("failed with status 137: failure 1 since iteration")
    resumed_at = training.start_again()
    assert resumed_at >= 100
    assert resumed_at % SAVE_INTERVAL == 0
    training.check_ends_as(uninterrupted, restarts=1)


@pytest.mark.slow
def test_ranks_that_hang_when_another_has_ended(training: Training, tmp_path: Path) -> None:
    """An NCCL collective does not notice a lost rank: srun ends the waiting ranks a minute later."""
    ranks = tmp_path / "ranks"
    ranks.write_text(f"""#!/bin/bash
[[ " $* " == *" --check "* || " $* " == *" --progress "* ]] && exec {sys.executable} "$@"
((SLURM_PROCID == 1)) && exit 3
exec sleep 3000
""")
    ranks.chmod(0o755)
    training.submit(python=str(ranks))
    training.wait_for_line("failure 1 since iteration 0")
    assert re.search("failed with status (3|137)", training.logged())
    training.wait_for_line("queued again")


@pytest.mark.slow
def test_failed_node(training: Training, uninterrupted: Path) -> None:
    """SLURM ends the job on both nodes and queues it again."""
    training.submit()
    training.wait_for_iteration(150)
    try:
        training.cluster.run("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=test")
        training.wait_for_line("DUE TO NODE FAILURE")
        training.cluster.wait_until(lambda: training.cluster.states(training.job) == ["PENDING"], explain=training.logged)
    finally:
        training.cluster.run("scontrol", "update", "NodeName=n2", "State=RESUME")
    assert 100 <= training.start_again() < ITERATIONS
    training.check_ends_as(uninterrupted, restarts=1)


@pytest.mark.slow
def test_drained_node_keeps_the_job_until_it_ends(training: Training, uninterrupted: Path) -> None:
    """A drained node lets its job finish but accepts no other: after its stop the job waits until both nodes are available."""
    training.submit()
    training.wait_for_iteration(5)
    try:
        training.cluster.run("scontrol", "update", "NodeName=n2", "State=DRAIN", "Reason=test")
        training.wait_for_iteration(len(read_metrics(training.run_dir)) + 50)
        assert training.cluster.states(training.job) == ["RUNNING"]
        training.cluster.run("scancel", "--batch", "--signal=USR1", training.job)
        training.wait_for_line("saved; queued again at iteration")
        training.start_again()
        training.cluster.wait_until(
            lambda: training.cluster.job(training.job)["Reason"].startswith("Nodes_required_for_job_are_DOWN"),
            explain=lambda: str(training.cluster.job(training.job)),
        )
    finally:
        training.cluster.run("scontrol", "update", "NodeName=n2", "State=RESUME")
    training.check_ends_as(uninterrupted, restarts=1)


@pytest.mark.slow
def test_cancelled_job_is_not_queued_again(training: Training) -> None:
    """scancel sends TERM: the ranks save, and the job does not come back. The watcher tells it before SLURM ends it."""
    with receiving() as hook:
        training.submit(hook=hook)
        training.wait_for_iteration(5)
        training.cluster.run("scancel", training.job)
        training.cluster.wait_for_end(training.job)
    assert hook.changes() == ["stopped"], training.logged()
    ended = training.cluster.job(training.job)
    assert (ended["JobState"], ended["Restarts"]) == ("CANCELLED", "0"), training.logged()
    assert "queued again" not in training.logged()
    assert "got SIGTERM" in training.logged()

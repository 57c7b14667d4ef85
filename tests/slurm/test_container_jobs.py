"""The scripts of examples/slurm in a container under a real SLURM: bubblewrap, which needs neither an image nor privileges.

The image is the root of this machine, read-only except for mounts. Folders under names that only exist in the container show that the
commands run there. Apptainer and pyxis are not installable here; tests/unit/examples/test_containers.py records their words, and the
slow test below gives the real srun those of pyxis without the options that it does not know.
"""

import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_ledom.data.shards.shard import check_shard
from tests.slurm.cluster import Cluster
from tests.slurm.test_slurm_training import VARIABLES, Training, settings
from tests.support import tiny_runs
from tests.support.legible import legible_documents, legible_tokenizer, write_jsonl
from tests.support.paths import ROOT
from tests.support.tiny_runs import TinyData, run_on_ranks

INSIDE = "/ledom_test_runs"
"""A folder of the container that this machine does not have."""
ITERATIONS = 60

PYXIS = """#!/bin/bash
# a SLURM with pyxis: srun knows its options; the real srun then starts the tasks without them
[[ "$1" == --help ]] && exec echo "--container-image=[USER@][REGISTRY#]IMAGE[:TAG]|PATH"
words=()
while [[ "$1" == --* ]]; do
    [[ "$1" == --*container-* ]] && echo "$1" >> {record} || words+=("$1")
    shift
done
exec {srun} "${{words[@]}}" "$@"
"""

pytestmark = pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")


@pytest.fixture
def container(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """The cluster, with a container for every job that is submitted."""
    variables = {"CONTAINER": "/", "CONTAINER_RUNTIME": "bwrap", "CONTAINER_MOUNTS": f"{tmp_path}:{INSIDE}"}
    variables |= {"PYTHONPATH": str(ROOT)}  # the image has no installed package of its own
    for name, value in variables.items():
        monkeypatch.setitem(cluster.environment, name, value)
    return cluster


@pytest.fixture
def training(container: Cluster, data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Training]:
    monkeypatch.setattr(tiny_runs, "SECONDS", 600)
    training = Training(container, tmp_path / "run", tmp_path / "job.log", data.config)
    yield training
    container.end_pretraining(training.job)


def test_signal_in_a_container_saves_and_the_job_resumes_in_it(training: Training, data: TinyData, tmp_path: Path) -> None:
    """The check, the ranks on two nodes and the progress run in the container; the end is that of a run without one."""
    few_saves, whole = settings(ITERATIONS, save_interval=ITERATIONS), tmp_path / "whole"
    run_on_ranks(data.config, whole, *few_saves, num_ranks=2)
    training.submit(*few_saves, f"run_dir={INSIDE}/run", iterations=ITERATIONS)
    training.wait_for_iteration(3)
    training.cluster.run("scancel", "--batch", "--signal=USR1", training.job)
    training.wait_for_line("saved; queued again at iteration")
    assert 3 < training.start_again() < ITERATIONS
    training.check_ends_as(whole, restarts=1)
    assert "got SIGUSR1: saving and exiting" in training.logged()
    assert len(re.findall(r"in the container / \(bwrap\)", training.logged())) == 2
    assert not Path(INSIDE).exists()


@pytest.mark.slow
def test_steps_of_pyxis_check_train_save_and_resume(
    cluster: Cluster, data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check before the submission is a job of its own; the ranks and the progress are steps of the job."""
    monkeypatch.setattr(tiny_runs, "SECONDS", 600)
    srun, record = tmp_path / "srun", tmp_path / "words"
    srun.write_text(PYXIS.format(record=record, srun=shutil.which("srun")))
    srun.chmod(0o755)
    variables = {"CONTAINER": "nvcr.io#nvidia/cuda:13", "CONTAINER_SRUN_OPTIONS": "--mem=1000M", "PYTHONPATH": str(ROOT)}
    for name, value in variables.items() | {("PATH", f"{tmp_path}:{cluster.environment['PATH']}")}:
        monkeypatch.setitem(cluster.environment, name, value)
    training = Training(cluster, tmp_path / "run", tmp_path / "job.log", data.config)
    few_saves, whole = settings(ITERATIONS, save_interval=ITERATIONS), tmp_path / "whole"
    run_on_ranks(data.config, whole, *few_saves, num_ranks=2)
    training.submit(*few_saves, iterations=ITERATIONS)
    training.wait_for_iteration(3)
    cluster.run("scancel", "--batch", "--signal=USR1", training.job)
    training.wait_for_line("saved; queued again at iteration")
    training.start_again()
    training.check_ends_as(whole, restarts=1)
    steps = record.read_text().split("--container-image=nvcr.io#nvidia/cuda:13")
    assert len(steps) - 1 == 5, "the check, two starts of the ranks, and the progress after each"
    assert all("--container-readonly" in step for step in steps[1:])


def test_nodes_are_checked_from_outside_and_their_ranks_run_in_the_container(container: Cluster, tmp_path: Path) -> None:
    """The folder to write exists in the container only; the Python of the node has no packages (-S)."""
    bare = tmp_path / "bare"
    bare.write_text(f'#!/bin/bash\nexec {sys.executable} -S "$@"\n')
    bare.chmod(0o755)
    program = tmp_path / "python"  # the check of the nodes is this test's matter, not the training
    program.write_text(f'#!/bin/bash\n[[ "$*" == *pretrain* ]] && exit 2\nexec {sys.executable} "$@"\n')
    program.chmod(0o755)
    log = tmp_path / "log"
    variables = VARIABLES | {"PYTHON": f"{INSIDE}/python", "HOST_PYTHON": str(bare), "CHECK_NODES": "1"}
    variables["CHECK_FOLDERS"] = INSIDE
    options = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1", "--mem=1000M", f"--output={log}"]
    job = container.submit(ROOT / "examples/slurm/pretrain.sbatch", options=options, cwd=ROOT, **variables)
    container.wait_for_end(job, explain=lambda: log.read_text() if log.exists() else "")
    assert "2 of 2 nodes are healthy" in log.read_text()
    assert "warning" not in log.read_text()


def test_task_of_an_array_preprocesses_in_the_container(container: Cluster, tmp_path: Path) -> None:
    legible_tokenizer(tmp_path / "legible")
    write_jsonl(tmp_path / "a.jsonl", legible_documents(3, 5))
    variables = {
        "INPUT": f"{INSIDE}/a.jsonl",
        "TOKENIZER": f"{INSIDE}/legible",
        "OUTPUT_PREFIX": f"{INSIDE}/shard",
        "NUM_TASKS": "1",
    }
    log = tmp_path / "log"
    options = ["--cpus-per-task=1", "--mem=500M", "--array=0", f"--output={log}"]
    script = ROOT / "examples/slurm/preprocess.sbatch"
    job = container.submit(script, options=options, cwd=ROOT, **variables, **VARIABLES)
    container.wait_for_end(job)
    assert container.states(job) == ["COMPLETED"], log.read_text()
    assert check_shard(str(tmp_path / "shard")).num_tokens == 3 * 6

"""The scripts of examples/slurm under a real SLURM of two virtual nodes: training that is requeued, arrays, conversion."""

import signal
import sys
from pathlib import Path

import pytest
import torch

from megatron_ledom.data.shard import check_shard
from tests.legible import legible_documents, legible_tokenizer, write_jsonl
from tests.slurm.cluster import Cluster
from tests.tiny_runs import ROOT, TinyData, curve, read_metrics, read_tensors, run_on_ranks

SCRIPTS = sorted((ROOT / "examples/slurm").glob("*.sbatch"))
PRETRAIN = ROOT / "examples/slurm/pretrain.sbatch"
TWO_RANKS = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1", "--mem=2000M"]
VARIABLES = {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}


def settings(iterations: int) -> list[str]:
    return [f"train.train_iters={iterations}", "data.allow_repeats=true", f"checkpoint.save_interval={iterations}"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_sbatch_accepts_the_script(cluster: Cluster, script: Path, tmp_path: Path) -> None:
    small = ["--nodes=1", "--gpus-per-node=0", "--cpus-per-task=1", "--ntasks-per-node=1", "--mem=100M", "--test-only"]
    cluster.run("sbatch", *small, str(script), cwd=tmp_path)


@pytest.mark.parametrize(
    ("iterations", "by_the_limit"),
    [pytest.param(400, False, id="signal"), pytest.param(1500, True, id="time_limit", marks=pytest.mark.slow)],
)
def test_requeued_training_ends_as_an_uninterrupted_one(
    cluster: Cluster, data: TinyData, tmp_path: Path, iterations: int, by_the_limit: bool
) -> None:
    """SLURM wakes the batch shell, the ranks save, the job queues itself again, goes on and ends: bit for bit the same."""
    run_dir, uninterrupted, log = tmp_path / "run", tmp_path / "uninterrupted", tmp_path / "job.log"
    run_on_ranks(data.config, uninterrupted, *settings(iterations), num_ranks=2)
    limit = ["--time=1", "--signal=B:USR1@45"] if by_the_limit else ["--time=60"]
    options = [*TWO_RANKS, *limit, f"--output={log}"]
    variables = {**VARIABLES, "CONFIG": str(data.config)}
    job = cluster.submit(PRETRAIN, f"run_dir={run_dir}", *settings(iterations), options=options, cwd=ROOT, **variables)

    def logged() -> str:
        return log.read_text() if log.exists() else ""

    cluster.wait_until(lambda: (run_dir / "metrics.jsonl").exists() and len(read_metrics(run_dir)) > 5, explain=logged)
    if not by_the_limit:
        cluster.run("scancel", "--batch", f"--signal={signal.SIGUSR1.name.removeprefix('SIG')}", job)
    cluster.wait_until(lambda: "saved; queued again" in logged(), explain=logged)
    cluster.wait_until(lambda: cluster.job(job)["JobState"] == "PENDING", explain=logged)
    stopped_at = len(read_metrics(run_dir))
    assert 5 < stopped_at < iterations
    soon = "StartTime=now+4seconds"  # SLURM itself waits two minutes, since a start in the same second is taken for the old one
    cluster.run("scontrol", "update", f"jobid={job}", soon, "TimeLimit=60")
    cluster.wait_for_end(job, explain=logged)
    assert cluster.job(job)["JobState"] == "COMPLETED", logged()
    assert cluster.job(job)["Restarts"] == "1"
    assert f"at iteration {stopped_at}" in logged()
    assert "start 2, 2 ranks, n1 n2" in logged()
    assert curve(read_metrics(run_dir)) == curve(read_metrics(uninterrupted))
    found, expected = read_tensors(run_dir), read_tensors(uninterrupted)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_array_preprocesses_a_corpus_and_one_element_is_repeated_alone(cluster: Cluster, tmp_path: Path) -> None:
    tokenizer = legible_tokenizer(tmp_path / "legible")
    for part in range(3):
        write_jsonl(tmp_path / f"part{part}.jsonl", legible_documents(3, 5 + part))
    damaged = tmp_path / "part1.jsonl"
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:-5])
    variables = {"INPUT": str(tmp_path / "part*.jsonl"), "TOKENIZER": str(tokenizer), "NUM_TASKS": "3"}
    variables |= {"OUTPUT_PREFIX": str(tmp_path / "shard"), **VARIABLES}
    options = ["--cpus-per-task=1", "--mem=500M", f"--output={tmp_path}/%a.log"]
    script = ROOT / "examples/slurm/preprocess.sbatch"
    array = cluster.submit(script, options=[*options, "--array=0-2"], cwd=ROOT, **variables)
    cluster.wait_for_end(array)
    assert sorted(cluster.states(array)) == ["COMPLETED", "COMPLETED", "FAILED"]
    assert "part1.jsonl:3: malformed JSON" in (tmp_path / "1.log").read_text()
    assert not list(tmp_path.glob("shard-00001*"))
    damaged.write_bytes(whole)
    again = cluster.submit(script, options=[*options, "--array=1"], cwd=ROOT, **variables)
    cluster.wait_for_end(again)
    assert cluster.states(again) == ["COMPLETED"]
    assert [check_shard(f"{tmp_path}/shard-{task:05d}-of-00003").num_tokens for task in range(3)] == [18, 21, 24]


def test_conversion_job_exports_a_run(cluster: Cluster, data: TinyData, tmp_path: Path) -> None:
    run_on_ranks(data.config, tmp_path / "run")
    log, variables = tmp_path / "job.log", {"LOAD": str(tmp_path / "run"), "SAVE": str(tmp_path / "hf"), **VARIABLES}
    options = ["--cpus-per-task=1", "--mem=2000M", f"--output={log}"]
    job = cluster.submit(ROOT / "examples/slurm/convert.sbatch", options=options, cwd=ROOT, **variables)
    cluster.wait_for_end(job, explain=lambda: log.read_text() if log.exists() else "")
    assert cluster.states(job) == ["COMPLETED"], log.read_text()
    assert (tmp_path / "hf/model.safetensors").is_file()

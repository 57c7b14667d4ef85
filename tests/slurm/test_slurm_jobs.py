"""The scripts of examples/slurm under a real SLURM of two virtual nodes: training that is requeued, arrays, conversion."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_ledom.data.shard import ShardReader
from tests import tiny_runs
from tests.legible import legible_ids, legible_tokenizer, write_jsonl
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
    [pytest.param(400, False, id="signal"), pytest.param(8000, True, id="time_limit", marks=pytest.mark.slow)],
)
def test_requeued_training_ends_as_an_uninterrupted_one(
    cluster: Cluster,
    data: TinyData,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    iterations: int,
    by_the_limit: bool,
) -> None:
    """SLURM wakes the batch shell, the ranks save, the job queues itself again, goes on and ends: bit for bit the same."""
    run_dir, uninterrupted, log = tmp_path / "run", tmp_path / "uninterrupted", tmp_path / "job.log"
    monkeypatch.setattr(tiny_runs, "SECONDS", 600)
    run_on_ranks(data.config, uninterrupted, *settings(iterations), num_ranks=2)
    # SLURM may send the signal up to 60 s early: between 60 and 120 s after the start, when training is under way.
    limit = ["--time=3", "--signal=B:USR1@60"] if by_the_limit else ["--time=60"]
    options = [*TWO_RANKS, *limit, f"--output={log}"]
    variables = {**VARIABLES, "CONFIG": str(data.config)}
    job = cluster.submit(PRETRAIN, f"run_dir={run_dir}", *settings(iterations), options=options, cwd=ROOT, **variables)

    def logged() -> str:
        return log.read_text() if log.exists() else ""

    cluster.wait_until(lambda: (run_dir / "metrics.jsonl").exists() and len(read_metrics(run_dir)) > 5, explain=logged)
    if not by_the_limit:
        cluster.run("scancel", "--batch", f"--signal={signal.SIGUSR1.name.removeprefix('SIG')}", job)
    cluster.wait_until(lambda: "saved; queued again" in logged(), seconds=240, explain=logged)
    cluster.wait_until(lambda: cluster.job(job)["JobState"] == "PENDING", explain=logged)
    stopped_at = len(read_metrics(run_dir))
    assert 5 < stopped_at < iterations
    soon = "StartTime=now+4seconds"  # SLURM itself waits two minutes, since a start in the same second is taken for the old one
    cluster.run("scontrol", "update", f"jobid={job}", soon, "TimeLimit=60")
    cluster.wait_for_end(job, seconds=600, explain=logged)
    assert cluster.job(job)["JobState"] == "COMPLETED", logged()
    assert cluster.job(job)["Restarts"] == "1"
    assert f"at iteration {stopped_at}" in logged()
    assert "start 2, 2 ranks, n1 n2" in logged()
    assert curve(read_metrics(run_dir)) == curve(read_metrics(uninterrupted))
    found, expected = read_tensors(run_dir), read_tensors(uninterrupted)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_array_preprocesses_a_corpus_and_one_element_is_repeated_alone(cluster: Cluster, tmp_path: Path) -> None:
    """One element meets a bad record and fails, alone; the summary names it; it is submitted again so that it skips the record."""
    tokenizer = legible_tokenizer(tmp_path / "legible")
    texts = [" ".join(map(str, legible_ids(document % 10, 5 + document % 7))) for document in range(300)]
    write_jsonl(tmp_path / "a.jsonl", texts[:200])
    lines = write_jsonl(tmp_path / "b.jsonl", texts[200:]).read_text().splitlines()
    (tmp_path / "b.jsonl").write_text("\n".join([*lines[:50], "{", *lines[50:]]) + "\n")
    variables = {"INPUT": str(tmp_path / "?.jsonl"), "TOKENIZER": str(tokenizer), "NUM_TASKS": "4"}
    variables |= {"OUTPUT_PREFIX": str(tmp_path / "shard"), **VARIABLES}
    options = ["--cpus-per-task=1", "--mem=500M", f"--output={tmp_path}/%a.log"]
    script = ROOT / "examples/slurm/preprocess.sbatch"
    array = cluster.submit(script, options=[*options, "--array=0-3"], cwd=ROOT, **variables)
    cluster.wait_for_end(array)
    assert sorted(cluster.states(array)) == ["COMPLETED", "COMPLETED", "COMPLETED", "FAILED"]
    assert "b.jsonl:51: malformed JSON" in (tmp_path / "3.log").read_text()
    summarize = [sys.executable, "tools/summarize_tasks.py", str(tmp_path / "shard"), "--num-tasks", "4"]
    summary = subprocess.run(summarize, cwd=ROOT, capture_output=True, text=True, check=False)
    assert summary.returncode == 1
    assert "sbatch --array=3" in summary.stderr
    again = cluster.submit(script, "--on-error", "skip", options=[*options, "--array=3"], cwd=ROOT, **variables)
    cluster.wait_for_end(again)
    assert cluster.states(again) == ["COMPLETED"], (tmp_path / "3.log").read_text()
    summary = subprocess.run(summarize, cwd=ROOT, capture_output=True, text=True, check=False)
    assert summary.returncode == 0, summary.stderr
    assert "1 malformed_json" in summary.stdout
    shards = [ShardReader(f"{tmp_path}/shard-{task:05d}-of-00004") for task in range(4)]
    found = [reader.document(index)[-2::-1].tolist() for reader in shards for index in range(len(reader))]
    assert found == [[int(word) for word in text.split()] for text in texts]


def test_conversion_job_exports_a_run(cluster: Cluster, data: TinyData, tmp_path: Path) -> None:
    run_on_ranks(data.config, tmp_path / "run")
    log, variables = tmp_path / "job.log", {"LOAD": str(tmp_path / "run"), "SAVE": str(tmp_path / "hf"), **VARIABLES}
    options = ["--cpus-per-task=1", "--mem=2000M", f"--output={log}"]
    job = cluster.submit(ROOT / "examples/slurm/convert.sbatch", options=options, cwd=ROOT, **variables)
    cluster.wait_for_end(job, explain=lambda: log.read_text() if log.exists() else "")
    assert cluster.states(job) == ["COMPLETED"], log.read_text()
    assert (tmp_path / "hf/model.safetensors").is_file()

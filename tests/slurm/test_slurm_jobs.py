"""The other scripts of examples/slurm under a real SLURM of two virtual nodes: arrays of tasks, and conversion."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ledom.data.shards.shard import ShardReader
from tests.slurm.cluster import Cluster
from tests.support.evaluation_sets import write_sets
from tests.support.legible import legible_ids, legible_tokenizer, write_jsonl
from tests.support.paths import ROOT
from tests.support.tiny_models import random_model_folder
from tests.support.tiny_runs import TinyData, run_on_ranks

SCRIPTS = sorted((ROOT / "examples/slurm").glob("*.sbatch"))
VARIABLES = {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_sbatch_accepts_the_script(cluster: Cluster, script: Path, tmp_path: Path) -> None:  # house: `run` fails if refused
    small = ["--nodes=1", "--gpus-per-node=0", "--cpus-per-task=1", "--ntasks-per-node=1", "--mem=100M", "--test-only"]
    cluster.run("sbatch", *small, str(script), cwd=tmp_path)


def test_array_preprocesses_a_corpus_and_one_element_is_repeated_alone(cluster: Cluster, tmp_path: Path) -> None:
    """One element fails at a bad record, and the summary names it; submitted again, it skips the record."""
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


@pytest.mark.slow
def test_array_ranks_the_answers_of_each_file(cluster: Cluster, tmp_path: Path) -> None:
    """Started by hand, the script submits one array task per file; started again, it skips finished files."""
    for name in ("forward", "reverse"):
        random_model_folder(tmp_path / name, "sentencepiece", name)
    for name in ("a", "b"):
        records = [{"prompt": f"The capital of {name} is", "candidates": [" Paris", " Berlin"]}]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n")
    variables = {"INPUT": str(tmp_path / "?.jsonl"), "OUTPUT": str(tmp_path / "ranked"), **VARIABLES}
    variables |= {"FORWARD": str(tmp_path / "forward"), "REVERSE": str(tmp_path / "reverse")}
    options = f"--gpus-per-node=0 --cpus-per-task=1 --mem=2000M --output={tmp_path}/%a.log"
    command = ["bash", "examples/slurm/evaluate.sbatch", "--weight", "0.25"]
    for _ in range(2):
        array = cluster.run(*command, cwd=ROOT, SBATCH_OPTIONS=options, **variables).split()[-1]
        cluster.wait_for_end(array)
        assert cluster.states(array) == ["COMPLETED", "COMPLETED"], (tmp_path / "0.log").read_text()
    for name in ("a", "b"):
        (ranked,) = map(json.loads, (tmp_path / "ranked" / f"{name}.jsonl").read_text().splitlines())
        assert ranked["prompt"] == f"The capital of {name} is"
        assert sorted(ranked["ranking"]) == [0, 1]
    assert "exists already" in (tmp_path / "1.log").read_text()


def test_array_evaluates_each_task_in_a_folder_of_its_own(cluster: Cluster, python: Path, tmp_path: Path) -> None:
    model = random_model_folder(tmp_path / "forward", "byte_level", "forward")
    variables = {"MODEL": str(model), "TASKS": "piqa,boolq", "DATA": str(write_sets(tmp_path / "sets")), **VARIABLES}
    variables |= {"OUTPUT": str(tmp_path / "evaluated"), "PYTHON": str(python)}
    options = f"--gpus-per-node=0 --cpus-per-task=1 --mem=2000M --output={tmp_path}/%a.log"
    array = cluster.run("bash", "examples/slurm/evaluate_tasks.sbatch", cwd=ROOT, SBATCH_OPTIONS=options, **variables).split()[
        -1
    ]
    cluster.wait_for_end(array)
    assert cluster.states(array) == ["COMPLETED", "COMPLETED"], (tmp_path / "0.log").read_text()
    for task in ("piqa", "boolq"):
        assert list(json.loads((tmp_path / "evaluated" / task / "summary.json").read_text())["tasks"]) == [task]


def test_killed_preempted_and_repeated_evaluation_resumes(cluster: Cluster, python: Path, tmp_path: Path) -> None:
    """One task is killed, the other is preempted by a job of higher priority; a changed record of each shows that it is kept."""
    model, sets = random_model_folder(tmp_path / "forward", "byte_level", "forward"), write_sets(tmp_path / "sets")
    num_items = {"boolq": 4500, "openbookqa": 8000}
    for name, num in zip(("boolq_validation", "openbookqa_test"), num_items.values(), strict=True):
        rows = (sets / f"{name}.jsonl").read_text().splitlines()
        (sets / f"{name}.jsonl").write_text("\n".join((rows * num)[:num]) + "\n")
    output, options = tmp_path / "evaluated", f"--gpus-per-node=0 --cpus-per-task=1 --mem=2000M --output={tmp_path}/%a.log"
    variables = {"MODEL": str(model), "TASKS": "boolq,openbookqa", "DATA": str(sets), "OUTPUT": str(output)}
    variables |= {**VARIABLES, "PYTHON": str(python), "SBATCH_OPTIONS": options}
    command = ["bash", "examples/slurm/evaluate_tasks.sbatch", "--batch-size", "1"]
    items = {task: output / task / f"{task}.items.jsonl" for task in ("boolq", "openbookqa")}
    array = cluster.run(*command, cwd=ROOT, **variables).split()[-1]
    cluster.wait_until(items["boolq"].exists, explain=lambda: (tmp_path / "0.log").read_text())
    cluster.run("scancel", "--batch", "--signal=KILL", f"{array}_0")
    cluster.wait_until(items["openbookqa"].exists, explain=lambda: (tmp_path / "1.log").read_text())
    (tmp_path / "urgent.sbatch").write_text("#!/bin/bash\n")
    urgent = ["--partition=urgent", "--nodes=2", "--exclusive", f"--output={tmp_path}/urgent.log"]
    other = cluster.submit(tmp_path / "urgent.sbatch", options=urgent, cwd=tmp_path)
    cluster.wait_for_end(other)
    cluster.wait_until(lambda: cluster.states(f"{array}_1") == ["PENDING"])
    assert all(len(path.read_text().splitlines()) < num_items[task] for task, path in items.items())
    marked = {task: _with_a_changed_record(path) for task, path in items.items()}
    cluster.start_again_soon(f"{array}_1")
    cluster.wait_for_end(array)
    assert sorted(cluster.states(array)) == ["COMPLETED", "FAILED"]
    summarize = [python.parent / "ledom", "summarize-evaluation", str(output)]
    assert subprocess.run(summarize, cwd=ROOT, check=False).returncode == 1
    again = cluster.run(*command, cwd=ROOT, **variables).split()[-1]
    cluster.wait_for_end(again)
    assert cluster.states(again) == ["COMPLETED", "COMPLETED"], (tmp_path / "0.log").read_text()
    assert subprocess.run(summarize, cwd=ROOT, check=False).returncode == 0
    assert sorted(json.loads((output / "summary.json").read_text())["tasks"]) == ["boolq", "openbookqa"]
    for task, path in items.items():
        lines = path.read_text().splitlines(keepends=True)
        assert (lines[0], len(lines)) == (marked[task], num_items[task])


def _with_a_changed_record(path: Path) -> str:
    """Change a score in the first record of an evaluation; return the new line."""
    first, *others = path.read_text().splitlines(keepends=True)
    assert len(others) >= 63
    record = json.loads(first)
    next(iter(record["scores"].values()))["logprob"][0] = -1.5
    path.write_text("".join([json.dumps(record) + "\n", *others]))
    return json.dumps(record) + "\n"


def test_two_nodes_check_themselves_and_a_run_over_both(cluster: Cluster, tmp_path: Path) -> None:
    log, output = tmp_path / "job.log", tmp_path / "checked"
    options = ["--gpus-per-node=0", "--cpus-per-task=1", "--mem=4000M", f"--output={log}"]
    variables = {"OUTPUT": str(output), "MINUTES": "4", **VARIABLES}
    chosen = ["--device", "cpu", "--gpus", "1", "--only", "operators"]
    script = ROOT / "examples/slurm/check_hardware.sbatch"
    job = cluster.submit(script, *chosen, options=options, cwd=ROOT, **variables)
    cluster.wait_for_end(job, seconds=300, explain=lambda: log.read_text() if log.exists() else "")
    assert cluster.states(job) == ["COMPLETED"], log.read_text()
    reports = {name: json.loads((output / name / "report.json").read_text()) for name in ("node_0", "node_1", "nodes")}
    found = {name: {one["name"]: one["status"] for one in report["checks"]} for name, report in reports.items()}
    of_a_node = {"environment": "passed", "operators": "passed"}
    assert found == {"node_0": of_a_node, "node_1": of_a_node, "nodes": {"environment": "passed", "nodes": "passed"}}
    assert reports["nodes"]["checks"][1]["numbers"]["ranks"] == 2


NODES, TASKS = "#SBATCH --nodes=8", "#SBATCH --ntasks-per-node=8"
SPELLINGS = [
    ((NODES, TASKS), "--nodes=2 --ntasks-per-node=3"),
    ((NODES, TASKS), "--nodes 2 --ntasks-per-node 3"),
    ((NODES, TASKS), "-N 2 --ntasks-per-node=3"),
    ((NODES, TASKS), "-N2 -n5 -t 4:00:00"),
    ((NODES, TASKS), "-N 2 --ntasks 6 --time 1-0 -J name"),
    ((NODES, TASKS), "--nodes=1 -N 2 --ntasks-per-node=1 --ntasks-per-node 2"),
    (("#SBATCH -N2", "#SBATCH --ntasks-per-node 2"), ""),
    (("#SBATCH\t-N 2", "#SBATCH  --ntasks-per-node=3"), ""),
    (("#SBATCH --nodes 2 # -n 7", "#SBATCH -n 4"), ""),
    (("#SBATCH -N 1", "#SBATCH --ntasks-per-node 2"), "-N2"),
    ((NODES, TASKS), "--nodes=2 --ntasks-per-no=3"),
    ((NODES, TASKS), "-N2 -HJx --ntasks-per-node=3"),
]
"""Lines in place of two directives of pretrain.sbatch, and SBATCH_OPTIONS."""


def test_pretrain_by_hand_checks_as_many_ranks_as_slurm_starts(cluster: Cluster, tmp_path: Path) -> None:
    """Every spelling of sbatch, in directives and options: `echo` in place of Python prints the ranks that would be checked."""
    others = f"--hold --gpus-per-node=0 --cpus-per-task=1 --mem=100M --output={tmp_path}/log"
    found = {}
    for number, (lines, options) in enumerate(SPELLINGS):
        script = tmp_path / f"{number}.sbatch"
        text = (ROOT / "examples/slurm/pretrain.sbatch").read_text()
        script.write_text(text.replace(NODES, lines[0]).replace(TASKS, lines[1]))
        printed = cluster.run("bash", str(script), cwd=tmp_path, SBATCH_OPTIONS=f"{others} {options}", PYTHON="echo").split()
        found[lines, options] = (printed[printed.index("--check") + 1], cluster.job(printed[-1])["NumTasks"])
        cluster.run("scancel", printed[-1])
    assert {spelling: checked for spelling, (checked, _) in found.items()} == {
        spelling: started for spelling, (_, started) in found.items()
    }
    assert sorted({int(started) for _, started in found.values()}) == [4, 5, 6]

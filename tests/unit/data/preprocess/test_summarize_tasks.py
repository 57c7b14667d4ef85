"""ledom summarize-tasks: totals over an array, and the list of tasks to submit again."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from megatron_ledom.data.preprocess.task_summary import SummarySettings, collect, summarize_tasks
from megatron_ledom.data.shards.shard import Counts
from megatron_ledom.direction import Direction
from megatron_ledom.errors import UsageError, VerificationError
from tests.support.forked import run_forked
from tests.support.legible import legible_ids, legible_provenance, legible_shard
from tests.support.paths import ROOT


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run_forked([ROOT / "tools/summarize_tasks.py", *arguments])


@pytest.fixture
def array(tmp_path: Path) -> str:
    """Six tasks. Task t has one document of t + 3 tokens and its eod."""
    for task in range(6):
        counts = Counts(text_bytes=10 * task, skipped={"no_tokens": task} if task % 2 else {"too_long": 1})
        legible_shard(tmp_path / f"x-{task:05d}-of-00006", [legible_ids(task, task + 3)], counts=counts)
    return str(tmp_path / "x")


def change_manifest(prefix: str, **values: object) -> None:
    stored = json.loads(Path(f"{prefix}.json").read_text())
    Path(f"{prefix}.json").write_text(json.dumps({**stored, **values}))


def test_totals_of_a_complete_array(array: str, tmp_path: Path) -> None:
    done = run(array, "--json", str(tmp_path / "summary.json"))
    assert done.returncode == 0, done.stderr
    for words in (
        "tasks      6 of 6 finished",
        "documents  6",
        "tokens     39 with eods",
        "text       150 bytes",
        "skipped    9 no_tokens, 3 too_long",
    ):
        assert words in done.stdout
    assert "speed" not in done.stdout
    stored = json.loads((tmp_path / "summary.json").read_text())
    assert (stored["num_tokens"], stored["finished"], stored["array"]) == (39, [0, 1, 2, 3, 4, 5], "")
    assert not list(tmp_path.glob("*.part"))


def test_the_speed_is_reported_if_every_manifest_contains_its_time(array: str) -> None:
    for task in range(5):
        change_manifest(f"{array}-{task:05d}-of-00006", elapsed_seconds=task + 1)
    assert collect(array).elapsed_seconds is None
    change_manifest(f"{array}-00005-of-00006", elapsed_seconds=0.5)
    assert "3 tokens/s per task, 16 s in total; slowest: task 4 with 5 s" in run(array).stdout


def test_tasks_that_must_run_again_are_listed_in_the_syntax_of_sbatch(array: str, tmp_path: Path) -> None:
    for suffix in (".bin", ".idx", ".json"):
        Path(f"{array}-00000-of-00006{suffix}").unlink()
    for suffix in (".idx", ".json"):
        Path(f"{array}-00001-of-00006{suffix}").unlink()
    Path(f"{array}-00001-of-00006.bin").rename(f"{array}-00001-of-00006.bin.part")
    os.truncate(f"{array}-00002-of-00006.bin", 2)
    change_manifest(f"{array}-00005-of-00006", direction="forward")
    done = run(array, "--json", str(tmp_path / "summary.json"))
    assert done.returncode == 1
    for words in (
        "tasks      2 of 6 finished",
        "missing    0\n",
        "unfinished 1\n",
        "unusable   2: ",
        "x-00002-of-00006.bin is truncated: it has 2 bytes",
        "unusable   5: task 5 is forward, task 3 is reverse",
        "run again  --array=0-2,5",
    ):
        assert words in done.stdout
    assert "4 of 6 tasks have no usable shard; run them again with sbatch --array=0-2,5; remove the unusable" in done.stderr
    stored = json.loads((tmp_path / "summary.json").read_text())
    assert (stored["missing"], stored["unfinished"], stored["to_run_again"]) == ([0], [1], [0, 1, 2, 5])


def test_the_number_of_tasks_can_be_given_before_any_task_is_finished(tmp_path: Path) -> None:
    with pytest.raises(VerificationError, match=r"3 of 3 tasks .* --array=0-2"):
        summarize_tasks(SummarySettings(prefix=str(tmp_path / "x"), num_tasks=3))
    done = run(str(tmp_path / "x"))
    assert done.returncode == 2
    assert "found no files" in done.stderr
    with pytest.raises(UsageError, match="use 1 or more"):
        collect(str(tmp_path / "x"), 0)
    with pytest.raises(UsageError, match=r"folder of --json .* does not exist"):
        summarize_tasks(SummarySettings(prefix=str(tmp_path / "x"), num_tasks=3, json=str(tmp_path / "no/x.json")))


def test_two_arrays_of_one_prefix_are_distinguished(array: str) -> None:
    legible_shard(Path(f"{array}-00000-of-00002"), [legible_ids(0, 3)])
    legible_shard(Path(f"{array}-y-00000-of-00009"), [legible_ids(0, 3)], legible_provenance(Direction.FORWARD))
    with pytest.raises(UsageError, match="tasks of 2 and of 6; choose an array with --num-tasks"):
        collect(array)
    assert collect(array, 6).to_run_again == []
    assert collect(array, 2).missing == [1]

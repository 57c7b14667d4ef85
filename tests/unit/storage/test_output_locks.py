"""Every command locks its output, or is listed with the reason why it need not; two processes never write the same one."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from megatron_ledom.data.shards.shard import check_shard
from megatron_ledom.errors import UsageError
from megatron_ledom.storage.files import json_text, write_file
from megatron_ledom.storage.locks import LOCK_SUFFIX, output_file_lock, output_folder_lock
from tests.support.legible import file_bytes, legible_ids, legible_shard
from tests.support.output_commands import FILES, Arguments
from tests.support.paths import ROOT
from tests.support.tool_runs import run_tool

FOLDERS: dict[str, Arguments] = {
    "evaluate": lambda at, made: [
        *("--model", made["forward"], "--data", made["sets"], "--tasks", "piqa", "--output", str(at)),
    ],
    "compare_losses": lambda at, made: [
        *(made["forward"], made["reverse"], "--data", made["text"], "--output", str(at)),
    ],
    "make_analysis_data": lambda at, made: ["--task", "reversal", "--num", "64", "--output", str(at)],
    "decontaminate": lambda at, made: ["--input", made["text"], "--items", made["pairs"], "--output", str(at)],
    "report_rerank": lambda at, made: [made["ranked"], "--gold-key", "gold", "--output", str(at)],
    "report_run": lambda at, made: [made["run"], "--output", str(at)],
    "plan_run": lambda at, made: [
        *("--config", str(ROOT / "examples/configs/ledom_2b.yaml"), "--hardware", "h100-sxm", "--output", str(at)),
    ],
}
OTHER_LOCKS = {
    "preprocess_data": "holds the lock of PREFIX.work, see test_preprocess_resume.py",
    "corpus": "holds the lock of its output folder, shared by tasks of different sources, see tests/unit/corpus/test_corpus_build.py",
    "alert": "replaces a small file without a lock: a lock that a lost node leaves would end the alerts of the next start",
    "average_checkpoints": "holds the lock of the folder that it makes, as convert_checkpoint does",
    "convert_checkpoint": "holds the lock of the folder that it makes, see test_conversion_errors.py",
    "calibrate_hardware": "writes one file under the lock, after minutes of measuring",
    "check_hardware": "writes a report after each check under the lock of its folder, see test_runner.py",
    "check_nodes": "writes one file under the lock, after the check",
    "summarize_evaluation": "holds the lock of the folder that it reads, see test_joined_results.py",
    "validate_planner": "writes between marks of a document under its lock, after minutes of fitting",
}
WRITES_NOTHING = {"generate", "inspect_checkpoint", "plan_blend", "replay_step", "serve", "status"}


def test_every_tool_is_listed() -> None:
    tools = {path.stem for path in (ROOT / "tools").glob("*.py")}
    assert {*FILES, *FOLDERS, *OTHER_LOCKS, *WRITES_NOTHING} == tools


@pytest.mark.parametrize("tool", sorted(FILES))
def test_a_command_that_writes_a_file_refuses_one_that_another_process_writes(
    tool: str, made: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name, arguments = FILES[tool]
    command = arguments(tmp_path, made)
    if tool == "summarize_tasks":
        command[0] = made["shard"].removesuffix("-00000-of-00001")
    with output_file_lock(tmp_path / name):
        assert run_tool(monkeypatch, tool, *command) == 2
        assert [path.name for path in tmp_path.iterdir()] == [name + LOCK_SUFFIX]
    assert f"is being written by process {os.getpid()}" in capsys.readouterr().err
    assert run_tool(monkeypatch, tool, *command) == 0, capsys.readouterr().err
    assert not list(tmp_path.glob(f"*{LOCK_SUFFIX}"))


@pytest.mark.parametrize("tool", sorted(FOLDERS))
def test_a_command_that_writes_a_folder_refuses_one_that_another_process_writes(
    tool: str, made: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = FOLDERS[tool](tmp_path, made)
    with output_folder_lock(tmp_path):
        assert run_tool(monkeypatch, tool, *command) == 2
        assert [path.name for path in tmp_path.iterdir()] == [LOCK_SUFFIX]
    assert f"is being written by process {os.getpid()}" in capsys.readouterr().err


def both(command: list[str]) -> tuple[set[int], str]:
    """Return exit codes and messages of a command that two processes run at once."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    messages = [process.communicate(timeout=200)[1] for process in started]
    return {process.returncode for process in started}, "\n".join(messages)


def test_evaluate_started_twice_at_once_judges_each_item_once(made: dict[str, str], tmp_path: Path, python: Path) -> None:
    command = [str(python), str(ROOT / "tools/evaluate.py"), *FOLDERS["evaluate"](tmp_path / "twice", made)]
    codes, messages = both(command)
    assert codes in ({0, 2}, {0}), messages  # the second is refused, or runs after the first has finished
    lines = (tmp_path / "twice/piqa.items.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["item"] for line in lines] == [0, 1]


def test_merge_started_twice_at_once_leaves_one_whole_shard(tmp_path: Path) -> None:
    parts = [
        legible_shard(tmp_path / f"x-{n}", [legible_ids(document % 9, 40) for document in range(n, n + 5)])
        for n in range(0, 100, 5)
    ]
    command = [sys.executable, str(ROOT / "tools/merge_shards.py"), "--input", *parts, "--output-prefix", str(tmp_path / "all")]
    codes, messages = both(command)
    assert codes == {0, 2}, messages  # the second is refused, by the lock or by the existing output
    check_shard(str(tmp_path / "all"))
    assert file_bytes(str(tmp_path / "all")) == file_bytes(
        legible_shard(tmp_path / "once", [legible_ids(document % 9, 40) for document in range(100)])
    )


def test_the_lock_of_a_killed_process_is_free_and_one_file_has_one_lock_by_any_name(tmp_path: Path) -> None:
    output, link = tmp_path / "out.jsonl", tmp_path / "link.jsonl"
    link.symlink_to(output)
    holding = textwrap.dedent(f"""
        import time
        from megatron_ledom.storage.locks import output_file_lock
        with output_file_lock({str(output)!r}):
            print("held", flush=True)
            time.sleep(60)
    """)
    with subprocess.Popen([sys.executable, "-c", holding], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with (
            pytest.raises(UsageError, match=f"link.jsonl is being written by process {holder.pid} on "),
            output_file_lock(link),
        ):
            pass
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    assert (tmp_path / f"out.jsonl{LOCK_SUFFIX}").exists()
    with output_file_lock(output):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.jsonl"]


def test_a_file_that_cannot_be_written_is_named_and_the_old_one_stays(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    write_file(path, "old")
    (tmp_path / "summary.json.part").mkdir()
    with pytest.raises(ValueError, match=r"summary\.json cannot be written"):
        write_file(path, "new")
    assert path.read_text(encoding="utf-8") == "old"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_json_with_nan_or_infinity_is_refused_with_its_key(value: float) -> None:
    with pytest.raises(ValueError, match=r"out\.jsonl: scores\[1\]\.reward is not a finite number"):
        json_text({"scores": [{"reward": -1.0}, {"reward": value}]}, where="out.jsonl")

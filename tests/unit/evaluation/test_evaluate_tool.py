"""tools/evaluate.py: a tiny model of each direction on every kind of task, resuming, showing prompts, and refused input."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_ledom.direction import Direction
from megatron_ledom.errors import DataError
from megatron_ledom.evaluation.record_checks import item_check
from megatron_ledom.evaluation.tasks.loading import task_named
from megatron_ledom.evaluation.tasks.task import Item, LoadedTask
from tests.support.evaluation_sets import write_sets
from tests.support.paths import ROOT
from tests.support.tiny_models import random_model_folder
from tests.support.tool_runs import run_tool


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("evaluated")
    names = ("forward", "reverse")
    models = {name: str(random_model_folder(root / name, "byte_level", name)) for name in names}
    return {**models, "data": str(write_sets(root / "data"))}


def summary(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return found


def test_the_tool_evaluates_a_tiny_model_as_a_user_starts_it(folders: dict[str, str], tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools" / "evaluate.py"), "--model", folders["reverse"], "--data", folders["data"]]
    command += ["--tasks", "svamp,boolq,humaneval", "--limit", "2", "--max-new-tokens", "8", "--output", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--allow-code-execution"], capture_output=True, text=True, env=environment, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "svamp: the items of svamp.jsonl are different from the published ones" in done.stderr
    tasks = summary(tmp_path)["tasks"]
    assert set(tasks) == {"svamp", "boolq", "humaneval"}
    assert tasks["svamp"]["metrics"]["accuracy"]["num_items"] == 2
    assert tasks["boolq"]["main"] == "joint/raw"
    assert f"| boolq | {tasks['boolq']['main']} |" in (tmp_path / "summary.md").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in (tmp_path / "humaneval.items.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["is_right"] for line in lines] == [False, False]


def test_every_task_runs_in_both_directions(
    folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from megatron_ledom.evaluation.tasks.benchmarks import TASKS

    for direction in ("forward", "reverse"):
        options = ["--model", folders[direction], "--data", folders["data"], "--output", str(tmp_path / direction)]
        options += ["--tasks", ",".join(task.name for task in TASKS), "--limit", "1", "--max-new-tokens", "4"]
        assert run_tool(monkeypatch, "evaluate", *options, "--allow-code-execution") == 0, capsys.readouterr().err
        found = summary(tmp_path / direction)
        assert len(found["tasks"]) == len(TASKS)
        assert run_tool(monkeypatch, "evaluate", *options, "--allow-code-execution") == 0, (
            capsys.readouterr().err
        )  # all lines are resumed
        assert summary(tmp_path / direction) == found


def test_a_killed_evaluation_resumes_with_the_same_lines(
    folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_ledom.evaluation import evaluate_command, task_evaluation

    for module in (task_evaluation, evaluate_command):
        monkeypatch.setattr(module, "WINDOW_ITEMS", 2)
    options = ["--model", folders["reverse"], "--data", folders["data"], "--tasks", "svamp,openbookqa"]
    options += ["--max-new-tokens", "4"]
    assert run_tool(monkeypatch, "evaluate", *options, "--output", str(tmp_path / "whole")) == 0
    whole = (tmp_path / "whole" / "svamp.items.jsonl").read_bytes()
    assert run_tool(monkeypatch, "evaluate", *options, "--output", str(tmp_path / "killed")) == 0
    cut = whole.splitlines(keepends=True)
    assert len(cut) == 3
    changed = {**json.loads(cut[0]), "written": "kept"}  # a kept record is not computed again
    (tmp_path / "killed" / "svamp.items.jsonl").write_bytes(json.dumps(changed).encode() + b"\n" + cut[1] + cut[2][:20])
    assert run_tool(monkeypatch, "evaluate", *options, "--output", str(tmp_path / "killed")) == 0
    found = (tmp_path / "killed" / "svamp.items.jsonl").read_bytes().splitlines(keepends=True)
    assert found[1:] == cut[1:]
    assert json.loads(found[0])["written"] == "kept"


def test_a_run_without_records_does_not_block_a_later_one(
    folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--model", folders["reverse"], "--data", folders["data"], "--tasks", "svamp", "--output", str(tmp_path)]
    assert run_tool(monkeypatch, "evaluate", *options, "--max-new-tokens", "600") == 2
    assert run_tool(monkeypatch, "evaluate", *options, "--max-new-tokens", "4") == 0
    assert len((tmp_path / "svamp.items.jsonl").read_text().splitlines()) == 3


def test_another_setting_on_the_same_output_is_refused_and_a_larger_limit_resumes(
    folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model", folders["forward"], "--data", folders["data"], "--tasks", "piqa", "--output", str(tmp_path)]
    assert run_tool(monkeypatch, "evaluate", *options, "--limit", "1") == 0
    assert run_tool(monkeypatch, "evaluate", *options, "--limit", "2") == 0
    assert summary(tmp_path)["tasks"]["piqa"]["metrics"]["choice_given_context/raw"]["num_items"] == 2
    assert run_tool(monkeypatch, "evaluate", *options, "--seed", "5") == 1
    assert "seed was 0 and is 5" in capsys.readouterr().err


def test_a_few_items_of_another_model_are_never_deleted(
    folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--data", folders["data"], "--tasks", "openbookqa", "--output", str(tmp_path)]
    assert run_tool(monkeypatch, "evaluate", *options, "--model", folders["forward"], "--limit", "1") == 0
    kept = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert run_tool(monkeypatch, "evaluate", *options, "--model", folders["reverse"]) == 1
    error = capsys.readouterr().err
    assert "openbookqa.items.jsonl was made with different settings (" in error
    assert "direction was 'forward' and is 'reverse'" in error
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == kept
    (tmp_path / "openbookqa.items.json").unlink()
    assert run_tool(monkeypatch, "evaluate", *options, "--model", folders["forward"], "--limit", "1") == 1
    assert "openbookqa.items.json is missing, so the settings of openbookqa.items.jsonl are unknown" in capsys.readouterr().err


def test_a_refused_task_does_not_change_the_items_of_other_tasks(
    folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--model", folders["forward"], "--data", folders["data"], "--output", str(tmp_path)]
    assert run_tool(monkeypatch, "evaluate", *options, "--tasks", "openbookqa,piqa", "--limit", "1") == 0
    kept = (tmp_path / "openbookqa.items.jsonl").read_bytes()
    (tmp_path / "piqa.items.jsonl").write_text("{}\n")
    assert (
        run_tool(monkeypatch, "evaluate", *options, "--tasks", "openbookqa,piqa", "--limit", "2") == 0
    )  # the first window is computed again
    (tmp_path / "openbookqa.items.jsonl").write_bytes(kept)
    (tmp_path / "piqa.items.jsonl").write_text("{}\n{}\n")
    assert run_tool(monkeypatch, "evaluate", *options, "--tasks", "openbookqa,piqa", "--limit", "2") == 1
    assert (tmp_path / "openbookqa.items.jsonl").read_bytes() == kept


CHOICE, WRITTEN, PROGRAM = "piqa", "svamp", "humaneval"


@pytest.fixture(scope="module")
def evaluated(folders: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished evaluation of a task of each kind."""
    output = tmp_path_factory.mktemp("evaluated")
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert run_tool(monkeypatch, "evaluate", *evaluate_options(folders, output, ",".join((CHOICE, WRITTEN, PROGRAM)))) == 0
    return output


def evaluate_options(folders: dict[str, str], output: Path, tasks: str) -> list[str]:
    options = ["--model", folders["forward"], "--data", folders["data"], "--tasks", tasks, "--max-new-tokens", "4"]
    return [*options, "--allow-code-execution", "--output", str(output)]


def changed_line(line: str, change: dict[str, Any]) -> str:
    """Return the line with values set at dotted keys.

    None removes the key; a text that begins with = is written without quotes.
    """
    record = json.loads(line)
    for key, value in change.items():
        *outer, name = key.split(".")
        place = record
        for part in outer:
            place = place[part]
        place[name] = value
        if value is None:
            del place[name]
    return re.sub('"=([^"]*)"', r"\1", json.dumps(record))


WAY = "scores.choice_given_context"


@pytest.mark.parametrize(
    ("task", "change", "message"),
    [
        (CHOICE, {f"{WAY}.logprob": ["=NaN", -1.0]}, "is damaged (NaN is not a finite number)"),
        (CHOICE, {f"{WAY}.logprob": ["=-1e999", -1.0]}, "is damaged (-1e999 is not a finite number)"),
        (CHOICE, {f"{WAY}.logprob": ["=-" + "9" * 400, -1.0]}, "larger than any count"),
        (CHOICE, {f"{WAY}.logprob": ["-1.0", -1.0]}, f'{WAY}.logprob[0] is "-1.0", expected a log-likelihood'),
        (CHOICE, {f"{WAY}.logprob": [True, -1.0]}, f"{WAY}.logprob[0] is true"),
        (CHOICE, {f"{WAY}.logprob": [3.0, -1.0]}, f"{WAY}.logprob[0] is 3.0"),
        (CHOICE, {f"{WAY}.logprob": [-1.0]}, f"{WAY}.logprob is [-1.0], expected a list of 2 values"),
        (CHOICE, {f"{WAY}.logprob": -1.0}, f"{WAY}.logprob is -1.0, expected a list of 2 values"),
        (CHOICE, {f"{WAY}.logprob": None}, f"{WAY} has no field 'logprob'"),
        (CHOICE, {f"{WAY}.tokens": [1.5, 2]}, f"{WAY}.tokens[0] is 1.5, expected a count"),
        (CHOICE, {"scores.joint": {}}, "scores has the field 'joint'"),
        (CHOICE, {"scores": []}, "scores is [], expected an object"),
        (CHOICE, {"gold": 99}, "gold is 99, expected 0"),
        (CHOICE, {"gold": False}, "gold is false, expected 0"),
        (CHOICE, {"item": None}, "has no number under 'item', expected item 1"),
        (CHOICE, {"item": True}, "is of item True, expected item 1"),
        (WRITTEN, {"is_right": "yes"}, 'is_right is "yes", expected true or false'),
        (WRITTEN, {"is_right": True, "answer": "=null"}, "is_right is true and answer is null"),
        (WRITTEN, {"gold": ["7"]}, 'gold is ["7"], expected ["2"]'),
        (WRITTEN, {"answer": None}, "the line has no field 'answer'"),
        (PROGRAM, {"reason": 0}, "reason is 0, expected a text"),
    ],
)
def test_a_line_that_the_command_cannot_have_written_is_not_resumed(
    task: str,
    change: dict[str, Any],
    message: str,
    evaluated: Path,
    folders: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = shutil.copytree(evaluated, tmp_path / "out")
    path = output / f"{task}.items.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()
    lines[1] = changed_line(lines[1], change)
    path.write_text("\n".join([*lines, ""]), encoding="utf-8")
    assert run_tool(monkeypatch, "evaluate", *evaluate_options(folders, output, task)) == 1
    error = capsys.readouterr().err
    assert f"{path}:2" in error
    assert message in error
    assert f"remove {path} to start again" in error


def test_a_written_question_is_checked_against_its_solution() -> None:
    item = Item(values={"question": ""}, gold=("2 + 3 = 5. The answer is 5.",), kept={"group": "one", "gold_answer": "5"})
    task = LoadedTask(task=task_named("question_from_answer"), items=(item,))
    record = {"item": 0, **item.kept, "written": "Question: x", "answer": "x", "gold": list(item.gold), "solved": item.gold[0]}
    record |= {"has_answer": True, "is_right": True, "is_copy": False}
    check = item_check(task, Direction.REVERSE)
    check(0, record)
    for wrong in ({"is_right": False}, {"solved": None}, {"group": "two"}, {"is_copy": 0}):
        with pytest.raises(DataError, match=next(iter(wrong)) if "solved" not in wrong else "is_right"):
            check(0, {**record, **wrong})


def test_show_prints_both_orders_without_weights(
    folders: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (bare / name).write_bytes((Path(folders["reverse"]) / name).read_bytes())
    options = ["--model", str(bare), "--data", folders["data"], "--tasks", "svamp,boolq", "--show", "1"]
    assert run_tool(monkeypatch, "evaluate", *options, "--num-fewshot", "1") == 0
    shown = capsys.readouterr().out
    assert "⟦Answer: 5\nReasoning: ( 2 + 3 )\n⟧That is how the answer is found.\nQuestion: Ann has 2 pears." in shown
    as_seen = shown.split("--- in model order")[1]
    assert as_seen.index("7") < as_seen.index("2")  # the few-shot example's question comes before the query's
    assert "context_given_choice" in shown
    assert (
        run_tool(monkeypatch, "evaluate", *options[:-2], "--output", str(tmp_path / "out")) == 1
    )  # the evaluation needs weights


def test_list_compares_hashes(
    folders: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_tool(monkeypatch, "evaluate", "--list", "--data", folders["data"]) == 0
    output = capsys.readouterr().out
    assert "https://github.com/openai/grade-school-math" in output
    assert "found     gsm8k_test.jsonl, 2 items, different from the published ones: content " in output
    assert "content   unknown\n  found     nothing in" in output  # synthetic sets


@pytest.mark.parametrize(
    ("changed", "code", "message"),
    [
        ({"--tasks": "gsm"}, 2, "no task 'gsm'; did you mean gsm8k?"),
        ({"--tasks": "humaneval"}, 2, "humaneval runs code that a model wrote"),
        ({"--limit": "0"}, 2, "limit=0 must be at least 1"),
        ({"--num-fewshot": "9"}, 2, "9 few-shot examples need 10"),
        ({"--data": "nowhere"}, 2, "svamp needs its items in nowhere/svamp"),
        ({"--direction": "reverse"}, 1, "records the direction forward"),
        ({"--eod-id": "3"}, 2, "remove it"),
        ({"--batch-size": "0"}, 2, "batch_size=0"),
        ({"--max-new-tokens": "600"}, 2, "svamp: "),
    ],
)
def test_bad_input_has_its_message_and_exit_code(
    changed: dict[str, str],
    code: int,
    message: str,
    folders: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = {"--model": folders["forward"], "--data": folders["data"], "--tasks": "svamp", "--output": str(tmp_path / "out")}
    arguments = [word for pair in {**options, **changed}.items() for word in pair]
    assert run_tool(monkeypatch, "evaluate", *arguments) == code
    assert message in capsys.readouterr().err

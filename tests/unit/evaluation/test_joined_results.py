"""ledom summarize-evaluation: results of tasks that were evaluated one by one become one summary."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_ledom.cli.main import run
from megatron_ledom.errors import DataError, MismatchError, UsageError, VerificationError
from megatron_ledom.storage.locks import output_folder_lock
from tests.support.evaluation_sets import write_sets
from tests.support.tiny_models import random_model_folder


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders `model`, `other` and `sets`, and `evaluated` with a folder for each of two tasks."""
    root = tmp_path_factory.mktemp("joined")
    for name in ("model", "other"):
        random_model_folder(root / name, "byte_level", "forward")
    write_sets(root / "sets")
    for task in ("boolq", "piqa"):
        evaluate(root, task, root / "evaluated" / task)
    return root


@pytest.fixture
def evaluated(inputs: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(inputs / "evaluated", tmp_path / "evaluated"))


def evaluate(root: Path, tasks: str, output: Path, *options: str, model: str = "model") -> None:
    run(
        [
            "evaluate",
            "--model",
            f"{root}/{model}",
            "--data",
            f"{root}/sets",
            "--tasks",
            tasks,
            "--output",
            str(output),
            *options,
        ]
    )


def summary(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return found


def test_joined_summary_is_that_of_one_command(inputs: Path, evaluated: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate(inputs, "boolq,piqa", inputs / "together")
    capsys.readouterr()
    run(["summarize-evaluation", str(evaluated)])
    assert summary(evaluated) == summary(inputs / "together")
    markdown = [(folder / "summary.md").read_text(encoding="utf-8") for folder in (evaluated, inputs / "together")]
    assert markdown[0] == markdown[1] == capsys.readouterr().out.removesuffix("\n")


def test_task_without_a_result_is_named_after_the_others_are_joined(evaluated: Path) -> None:
    """The script makes the folder of each task before it submits; a killed task has records but no summary."""
    (evaluated / "svamp").mkdir()
    (evaluated / "logs").mkdir()
    (evaluated / "piqa/summary.json").unlink()
    with pytest.raises(VerificationError, match=r"^2 of 3 tasks have no result: svamp,piqa; .* TASKS=svamp,piqa"):
        run(["summarize-evaluation", str(evaluated)])
    assert list(summary(evaluated)["tasks"]) == ["boolq"]


def test_batch_size_of_one_task_is_written_with_it(inputs: Path, evaluated: Path) -> None:
    shutil.rmtree(evaluated / "piqa")
    evaluate(inputs, "piqa", evaluated / "piqa", "--batch-size", "3")
    run(["summarize-evaluation", str(evaluated)])
    joined = summary(evaluated)
    assert "batch_size" not in joined
    assert {task: found["batch_size"] for task, found in joined["tasks"].items()} == {"boolq": 16, "piqa": 3}


def test_tasks_of_two_models_are_refused(inputs: Path, evaluated: Path) -> None:
    shutil.rmtree(evaluated / "piqa")
    evaluate(inputs, "piqa", evaluated / "piqa", model="other")
    with pytest.raises(MismatchError, match=r"piqa is of another model than .*boolq \(model was .*other"):
        run(["summarize-evaluation", str(evaluated)])
    assert not (evaluated / "summary.json").exists()


@pytest.mark.parametrize(
    "content", ["{", '{"tasks": {"piqa": {}}}', '{"tasks": {"boolq": {"main": "a", "metrics": {}}}}', "[]"]
)
def test_damaged_summary_is_named(evaluated: Path, content: str) -> None:
    (evaluated / "piqa/summary.json").write_text(content)
    with pytest.raises(DataError, match=r"piqa/summary.json is not the summary of the task piqa"):
        run(["summarize-evaluation", str(evaluated)])


def test_folder_that_another_process_writes_is_refused(evaluated: Path) -> None:
    with output_folder_lock(evaluated), pytest.raises(UsageError, match="is being written by"):
        run(["summarize-evaluation", str(evaluated)])
    assert not (evaluated / "summary.json").exists()


def test_other_folders_are_refused(inputs: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has no folder of a task"):
        run(["summarize-evaluation", str(tmp_path)])
    with pytest.raises(UsageError, match="is not a folder"):
        run(["summarize-evaluation", str(tmp_path / "gone")])
    with pytest.raises(UsageError, match=r"boolq.items.jsonl, so one command"):
        run(["summarize-evaluation", str(inputs / "evaluated/boolq")])

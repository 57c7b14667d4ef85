"""Models and items that are replaced during a job, or between two starts of it, never count as the same."""

import importlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megatron_ledom.callbacks.tasks import check_files
from megatron_ledom.config.load import load_config
from megatron_ledom.data.blends.sources import load_sources
from megatron_ledom.direction import Direction
from megatron_ledom.errors import DataError, MismatchError
from megatron_ledom.evaluation import evaluate_command, loss_comparison
from megatron_ledom.evaluation.tasks import loading as task_files
from megatron_ledom.inference.model_folder import SMALL_FILES, check_unchanged, folder_facts
from megatron_ledom.inference.reverse_reward import command as rerank_command
from megatron_ledom.reports.losses import compare_losses
from megatron_ledom.training.held_out import check_held_out
from tests.support.evaluation_sets import write_sets
from tests.support.tiny_models import random_model_folder
from tests.support.tiny_runs import TinyData, documents, write_shard, write_tiny_data


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: random_model_folder(root / name, "byte_level", name) for name in ("forward", "reverse")}


def rewrite(folder: Path) -> None:
    """Write the weights again, as a conversion into the same folder does."""
    path = folder / "model.safetensors"
    state = path.stat()
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns + 1))


def evaluate(models: dict[str, Path], tmp_path: Path) -> None:
    options = {"model": str(models["reverse"]), "tasks": "boolq", "data": str(write_sets(tmp_path / "sets")), "limit": 2}
    options |= {"output": str(tmp_path / "found"), "list": False, "show": None, "direction": None, "eod_id": None}
    options |= {"batch_size": 4, "num_fewshot": 0, "seed": 0, "max_new_tokens": None, "allow_code_execution": False}
    evaluate_command.evaluate_command(options)


def compare(models: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one two"}\n')
    options: dict[str, Any] = {name: str(path) for name, path in models.items()}
    options |= {"data": str(tmp_path / "a.jsonl"), "output": str(tmp_path / "found"), "text_key": "text", "domain_key": None}
    options |= {"limit": None, "direction": None, "eod_id": None, "context": 16, "batch_size": 4, "seed": 0}
    compare_losses({**options, "different_tokenizers": False})


def rerank(models: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "one", "candidates": ["two", "three"]}\n')
    files = ["--input", str(tmp_path / "a.jsonl"), "--output", str(tmp_path / "found.jsonl")]
    folders = [word for side, path in models.items() for word in (f"--{side}", str(path))]
    rerank_command.rerank_command(tool_options("rerank", [*files, *folders, "--weight", "1.0"]))


def tool_options(tool: str, arguments: list[str]) -> dict[str, Any]:
    """Return the arguments as the parser of the command returns them."""
    command = importlib.import_module(f"megatron_ledom.cli.{tool}")
    return vars(command.build_parser().parse_args(arguments))


@pytest.mark.parametrize(
    ("command", "module", "side"),
    [(evaluate, evaluate_command, "reverse"), (compare, loss_comparison, "forward"), (rerank, rerank_command, "reverse")],
)
def test_a_model_rewritten_while_it_is_loaded_is_not_judged(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Any, module: Any, side: str
) -> None:
    """The state of the folder is recorded before loading, and the change comes after that."""
    facts = module.folder_facts

    def noted(folder: Path) -> dict[str, Any]:
        found: dict[str, Any] = facts(folder)
        if folder == models[side]:
            rewrite(folder)
        return found

    monkeypatch.setattr(module, "folder_facts", noted)
    with pytest.raises(DataError, match=rf"model folder .*{side} was changed while it was read \(model\.safetensors\)"):
        command(models, tmp_path)


@pytest.mark.parametrize("name", [name for name in SMALL_FILES if name != "model.safetensors.index.json"])
def test_whatever_decides_the_figures_is_noted_of_a_model(tmp_path: Path, name: str) -> None:
    for file in (*SMALL_FILES, "model.safetensors"):
        (tmp_path / file).write_text("{}")
    known = folder_facts(tmp_path)
    check_unchanged(tmp_path, json.loads(json.dumps(known)))
    (tmp_path / name).write_text("{ }")
    with pytest.raises(DataError, match=rf"changed while it was read \({name}\)"):
        check_unchanged(tmp_path, known)
    assert folder_facts(tmp_path) != known, "a later start would resume with metrics of another model"


def test_items_replaced_while_they_are_read_are_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_sets(tmp_path / "sets")
    path = task_files.find_file(task_files.task_named("boolq"), folder, task_files.task_named("boolq").file)
    read = task_files._items

    def read_then_replaced(*arguments: Any) -> Any:
        found = read(*arguments)
        path.write_bytes(path.read_bytes() + b"\n")
        return found

    monkeypatch.setattr(task_files, "_items", read_then_replaced)
    with pytest.raises(DataError, match=r"boolq.* was replaced while it was read"):
        task_files.load_task("boolq", folder)


def test_tasks_replaced_while_a_run_starts_end_it() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        check_files({"boolq": {"boolq.jsonl": "a"}}, {"boolq": {"boolq.jsonl": "a"}}, "data")
        with pytest.raises(DataError, match=r"files of train\.tasks in data were replaced while the run started"):
            check_files({"boolq": {"boolq.jsonl": "b"}}, {"boolq": {"boolq.jsonl": "a"}}, "data")
    finally:
        dist.destroy_process_group()


def test_a_run_resumes_only_with_the_held_out_data_of_its_evaluations(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Across restarts. A new set may be added, a new run starts fresh, and a change can be allowed by name."""
    data: TinyData = write_tiny_data(tmp_path / "own")
    prefix, run_dir = data.shard("reverse_valid"), tmp_path / "run"
    run_dir.mkdir()

    def start(*more: str, tasks: dict[str, dict[str, str]] | None = None, is_new: bool = False) -> None:
        config = load_config(str(data.config), [f"run_dir={run_dir}", f"data.valid_blend=[[1.0, {prefix}]]", *more])
        check_held_out(config, load_sources(config), tasks or {}, is_new=is_new)

    start(tasks={"boolq": {"boolq.jsonl": "a"}})
    start()
    start(tasks={"boolq": {"boolq.jsonl": "a"}, "svamp": {"svamp.jsonl": "b"}})
    with pytest.raises(MismatchError, match=r"task boolq: the content has changed since this run last used it"):
        start(tasks={"boolq": {"boolq.jsonl": "c"}})
    for path in data.folder.glob("reverse_valid.*"):
        path.unlink()
    write_shard(Path(prefix), documents(30, 3), Direction.REVERSE, data.folder / "legible")
    with pytest.raises(
        MismatchError, match=rf"validation set {prefix}: the content has changed .*data\.allow_changed_data=true"
    ):
        start()
    start("data.allow_changed_data=true")
    assert f"OTHER HELD-OUT DATA than before, allowed by data.allow_changed_data=true: validation set {prefix}" in caplog.text
    start()
    start(tasks={"boolq": {"boolq.jsonl": "c"}}, is_new=True)
    (run_dir / "held_out.json").write_text("{")
    with pytest.raises(MismatchError, match=r"held_out\.json is damaged"):
        start()

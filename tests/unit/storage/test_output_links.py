"""An output that is a link stays a link, and its target is written, so that large files can be on another disk."""

import json
import os
from pathlib import Path

import pytest

from megatron_ledom.config.load import load_config, save_config
from megatron_ledom.data.shards.shard import check_shard
from megatron_ledom.errors import UsageError
from megatron_ledom.storage.files import real_path, write_file
from megatron_ledom.storage.locks import output_file_lock
from megatron_ledom.storage.records import append_record, drop_after, read_records
from megatron_ledom.tokenizers.corpus_tokenizer import load_tokenizer
from tests.support.legible import legible_ids, legible_shard
from tests.support.output_commands import FILES
from tests.support.paths import ROOT
from tests.support.tiny_models import random_model_folder
from tests.support.tool_runs import run_tool

ENDINGS = {
    "merge_shards": (".bin", ".idx", ".json"),
    "reverse_shards": (".bin", ".idx", ".json"),
    "preprocess_data": (".bin", ".idx", ".json"),
    "prepare_pairs": (".bin", ".idx", ".json", ".targets"),
    "export_preferences": (".jsonl", ".parquet", ".json"),
}


def command_of(tool: str, at: Path, made: dict[str, str]) -> tuple[str, list[str]]:
    """Return the name of the output in the folder `at`, and the command line that writes it."""
    if tool == "preprocess_data":
        return "out", [
            "--input",
            made["text"],
            "--tokenizer",
            made["reverse"],
            "--output-prefix",
            f"{at}/out",
            "--workers",
            "1",
        ]
    name, arguments = FILES[tool]
    command = arguments(at, made)
    if tool == "summarize_tasks":
        command[0] = made["shard"].removesuffix("-00000-of-00001")
    return name, command


def linked(folder: Path, target_folder: Path, names: list[str], content: str | None) -> dict[Path, Path]:
    """Make each name in `folder` a link to a file with `content`, or to a missing file for None."""
    links = {folder / name: target_folder / f"real_{name}" for name in names}
    for link, target in links.items():
        link.parent.mkdir(exist_ok=True)
        target.parent.mkdir(exist_ok=True)
        if content is not None:
            target.write_text(content, encoding="utf-8")
        link.symlink_to(os.path.relpath(target, folder))
    return links


def check_links(links: dict[Path, Path], content: str | None) -> None:
    """Check that each link is still one, its target was written, and no unfinished file is left."""
    for link, target in links.items():
        assert link.is_symlink()
        assert link.resolve() == target.resolve()
        assert target.exists()
        assert target.is_dir() or target.read_bytes() != (content or "").encode()
        assert not [*link.parent.glob("*.part"), *target.parent.glob("*.part")]


@pytest.mark.parametrize("tool", sorted({*FILES, "preprocess_data"}))
def test_a_link_to_a_new_file_is_followed(
    tool: str, made: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name, command = command_of(tool, tmp_path / "here", made)
    links = linked(tmp_path / "here", tmp_path / "disk", [name + ending for ending in ENDINGS.get(tool, ("",))], None)
    assert run_tool(monkeypatch, tool, *command) == 0, capsys.readouterr().err
    check_links(links, None)
    if ".idx" in ENDINGS.get(tool, ()):
        check_shard(f"{tmp_path}/here/out")


@pytest.mark.parametrize("tool", [*ENDINGS, "rerank", "summarize_tasks"])
def test_overwriting_a_link_writes_its_target(
    tool: str, made: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name, command = command_of(tool, tmp_path / "here", made)
    links = linked(tmp_path / "here", tmp_path / "disk", [name + ending for ending in ENDINGS.get(tool, ("",))], "old")
    if tool != "summarize_tasks":
        assert run_tool(monkeypatch, tool, *command) != 0
        assert {target.read_text(encoding="utf-8") for target in links.values()} == {"old"}
        command.append("--overwrite")
    assert run_tool(monkeypatch, tool, *command) == 0, capsys.readouterr().err
    check_links(links, "old")


def test_a_reranking_is_complete_by_both_names_of_its_output(
    made: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name, command = command_of("rerank", tmp_path / "here", made)
    ((link, target),) = linked(tmp_path / "here", tmp_path / "disk", [name], None).items()
    assert run_tool(monkeypatch, "rerank", *command) == 0
    for output in (link, target):
        assert run_tool(monkeypatch, "rerank", *command[:-1], str(output)) == 0
        assert "is complete; nothing to do" in capsys.readouterr().err
    assert run_tool(monkeypatch, "rerank", *command[:-1], str(target), "--weight", "0.9", "--overwrite") == 0
    assert run_tool(monkeypatch, "rerank", *command) == 2  # the notes are those of the newest content
    assert "was made with different settings" in capsys.readouterr().err


@pytest.mark.parametrize("tool", ["merge_shards", "rerank", "train_tokenizer"])
def test_a_link_into_a_missing_folder_is_refused(
    tool: str, made: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name, command = command_of(tool, tmp_path, made)
    link = tmp_path / (name + ENDINGS.get(tool, ("",))[0])
    link.symlink_to("unmounted/file")
    assert run_tool(monkeypatch, tool, *command) == 2
    assert f"{link} is a link to unmounted/file, where no file can be made" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [link.name]


def test_small_files_of_a_run_follow_links(tmp_path: Path) -> None:
    config = load_config(str(ROOT / "examples/configs/quickstart_reverse.yaml"), [f"run_dir={tmp_path}"])
    tokenizer = load_tokenizer(str(random_model_folder(tmp_path / "model", "byte_level", "reverse")))
    links = linked(tmp_path / "run", tmp_path / "disk", ["config.yaml", "note.txt", "tokenizer.json", "steps.jsonl"], "")
    save_config(config, str(tmp_path / "run/config.yaml"))
    write_file(tmp_path / "run/note.txt", "new")
    tokenizer.save(tmp_path / "run")
    steps = str(tmp_path / "run/steps.jsonl")
    for iteration in (1, 2):
        append_record(steps, {"iteration": iteration})
    drop_after(steps, 1)
    check_links(links, "")
    assert read_records(steps) == [{"iteration": 1}]
    assert load_config(str(tmp_path / "disk/real_config.yaml")) == config


def test_links_in_a_circle_and_special_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match="is a link to b, where no file can be made"):
        write_file(tmp_path / "a", "new")
    with pytest.raises(UsageError, match="is not a regular file"):
        write_file(tmp_path / "pipe", "new")
    assert real_path(tmp_path / "new") == str(tmp_path.resolve() / "new")


def test_a_shard_is_not_written_over_its_input_or_by_two_through_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = legible_shard(tmp_path / "x", [legible_ids(document, 4) for document in range(5)])
    before = Path(f"{shard}.bin").read_bytes()
    (tmp_path / "out.bin").symlink_to("x.bin")
    merge = ["--output-prefix", f"{tmp_path}/out", "--overwrite", "--input"]
    assert run_tool(monkeypatch, "merge_shards", *merge, shard) == 2
    assert "is one of the inputs" in capsys.readouterr().err
    assert Path(f"{shard}.bin").read_bytes() == before
    other = legible_shard(tmp_path / "y", [legible_ids(document, 4) for document in range(5)])
    with output_file_lock(shard):
        assert run_tool(monkeypatch, "merge_shards", *merge, other) == 2
        assert "is being written by process" in capsys.readouterr().err
    (tmp_path / "out.idx").symlink_to("x.bin")
    assert run_tool(monkeypatch, "merge_shards", *merge, other) == 2
    assert "are links to one file" in capsys.readouterr().err
    assert Path(f"{shard}.bin").read_bytes() == before
    assert json.loads(Path(f"{shard}.json").read_bytes())["num_documents"] == 5

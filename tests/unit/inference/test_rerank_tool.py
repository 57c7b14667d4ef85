"""The command lines tools/rerank.py and tools/generate.py: results, exit codes, speed of --help, no remaining files."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.paths import ROOT
from tests.support.tiny_models import random_model_folder
from tests.support.tool_runs import run_tool


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    root = tmp_path_factory.mktemp("models")
    names = ("forward", "reverse")
    forward, reverse = [str(random_model_folder(root / name, "sentencepiece", name)) for name in names]
    return forward, reverse


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_text(json.dumps({"prompt": "The capital of France is", "candidates": [" Paris", " 漢字"]}) + "\n")
    return path


def run_process(tool: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the tool as a user does, with UTF-8 output."""
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tools" / tool), *arguments]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", env=environment, timeout=120, check=False)


@pytest.mark.parametrize("tool", ["rerank.py", "generate.py"])
def test_help_answers_at_once(tool: str) -> None:
    start = time.monotonic()
    result = run_process(tool, "--help")
    assert result.returncode == 0
    assert "--seed" in result.stdout
    assert time.monotonic() - start < 2


def test_rerank_writes_the_ranking_to_a_new_folder_and_a_summary_to_stderr(
    folders: tuple[str, str], source: Path, tmp_path: Path
) -> None:
    output = tmp_path / "new" / "folder" / "out.jsonl"
    paths = ["--input", str(source), "--output", str(output)]
    result = run_process("rerank.py", "--forward", folders[0], "--reverse", folders[1], *paths, "--weight", "0.25")
    assert (result.returncode, result.stdout) == (0, "")
    assert result.stderr.startswith(
        f"{output}: ranked at weight 0.25 (0 forward only, 1 reverse only); lines: 1, candidates: 2, "
    )
    assert result.stderr.count("\n") == 1
    line = json.loads(output.read_text(encoding="utf-8"))
    assert sorted(line["ranking"]) == [0, 1]
    score = line["scores"][0]
    assert score["reward"] == pytest.approx(0.75 * score["forward_logprob"] + 0.25 * score["reverse_logprob"])


def test_rerank_replaces_an_output_of_another_weight_only_with_overwrite(
    folders: tuple[str, str], source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.jsonl"
    command = ["--forward", folders[0], "--reverse", folders[1], "--input", str(source), "--output", str(output)]
    assert run_tool(monkeypatch, "rerank", *command) == 0
    before = output.read_bytes()
    assert run_tool(monkeypatch, "rerank", *command, "--weight", "1") == 2
    assert (
        "was made with different settings (settings.reward.weight was 0.5 and is 1.0); pass --overwrite"
        in capsys.readouterr().err
    )
    assert output.read_bytes() == before
    assert run_tool(monkeypatch, "rerank", *command) == 0
    assert "is complete; nothing to do" in capsys.readouterr().err
    assert run_tool(monkeypatch, "rerank", *command, "--weight", "1", "--overwrite") == 0
    assert "ranked at weight 1 (" in capsys.readouterr().err
    assert output.read_bytes() != before


def test_generate_prints_a_text_that_ends_with_the_given_one(
    folders: tuple[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--following", "é 漢 of Paris 🙂", "--max-new-tokens", "5"]
    assert run_tool(monkeypatch, "generate", "--model", folders[1], *options) == 0
    printed = capsys.readouterr()
    assert printed.out.endswith("é 漢 of Paris 🙂\n")
    assert printed.err == ""


def test_generate_prints_each_sample(
    folders: tuple[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [
        "--num-samples",
        "2",
        "--temperature",
        "1",
        "--seed",
        "3",
        "--max-new-tokens",
        "4",
        "--top-k",
        "20",
        "--top-p",
        ".9",
    ]
    printed = []
    for _ in range(2):
        assert run_tool(monkeypatch, "generate", "--model", folders[1], "--following", "The end.", *options) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    assert printed[0].count("The end.\n") == 2
    assert "--- 1 of 2" in printed[0]


def test_rerank_samples_and_repeats_with_a_seed(
    folders: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": "The capital of"}\n')
    common = ["--forward", folders[0], "--reverse", folders[1], "--input", str(tmp_path / "in.jsonl")]
    sampling = ["--sample", "3", "--max-new-tokens", "4", "--seed", "5", "--top-p", "0.9", "--temperature", "0.8"]
    for name in ("a", "b"):
        assert run_tool(monkeypatch, "rerank", *common, "--output", str(tmp_path / name), *sampling) == 0
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert len(json.loads((tmp_path / "a").read_text(encoding="utf-8"))["candidates"]) == 3


@pytest.mark.parametrize(
    ("changed", "code", "message"),
    [
        ({"--input": "missing.jsonl"}, 2, "missing.jsonl is not a file"),
        ({"--weight": "1.5"}, 2, "weight=1.5 is outside [0, 1]"),
        ({"--weight": "half"}, 2, "invalid float value"),
        ({"--batch-size": "0"}, 2, "batch_size=0"),
        ({"--sample": "0"}, 2, "0 samples"),
        ({"--sample": "2"}, 1, "in.jsonl:1: has candidates already"),
        ({"--seed": "1"}, 2, "--seed needs --sample"),
        ({"--reverse": "FORWARD"}, 1, "ReverseLM needs a reverse model"),
        ({"--forward": "REVERSE"}, 1, "ForwardLM needs a forward model"),
        ({"--forward": "REVERSE", "--reverse": "FORWARD"}, 1, "--forward and --reverse are swapped"),
        ({"--forward": "no-folder"}, 2, "no-folder is not a model folder"),
        ({"--output": "in.jsonl/out.jsonl"}, 2, "in.jsonl is not a folder"),
        ({"--too-long": "cut"}, 2, "invalid choice"),
        ({"--forward-server": "ftp://node/v1"}, 2, "not the address of a server"),
    ],
)
def test_bad_input_has_its_message_and_exit_code_and_leaves_nothing(
    changed: dict[str, str],
    code: int,
    message: str,
    folders: tuple[str, str],
    source: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(source.parent)
    options = {"--forward": "FORWARD", "--reverse": "REVERSE", "--input": str(source), "--output": "out.jsonl", **changed}
    named = {"FORWARD": folders[0], "REVERSE": folders[1]}
    arguments = [word for pair in options.items() for word in (pair[0], named.get(pair[1], pair[1]))]
    assert run_tool(monkeypatch, "rerank", *arguments) == code
    assert message in capsys.readouterr().err
    assert [path.name for path in source.parent.iterdir()] == ["in.jsonl"]


def test_the_error_for_lines_without_candidates_names_the_option_that_writes_them(
    folders: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": "The capital of"}\n')
    paths = ["--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl")]
    assert run_tool(monkeypatch, "rerank", "--forward", folders[0], "--reverse", folders[1], *paths) == 1
    assert "pass --sample N to let the forward model write N" in capsys.readouterr().err


def test_generate_refuses_a_forward_model_and_an_empty_text(
    folders: tuple[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_tool(monkeypatch, "generate", "--model", folders[0], "--following", "x") == 1
    assert "records the direction forward" in capsys.readouterr().err
    assert run_tool(monkeypatch, "generate", "--model", folders[1], "--following", "") == 2
    assert "empty following text" in capsys.readouterr().err

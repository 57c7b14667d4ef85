"""Folders like that of the published reverse model.

Every command gets the ids of SentencePiece, the commands of docs/tutorials/published_model.md run, and no code of a folder runs,
although the user at the terminal allows it.
"""

import json
import re
import shlex
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from megatron_ledom.cli.main import main
from megatron_ledom.data.shards.shard import ShardReader
from megatron_ledom.direction import Direction, to_model_order
from megatron_ledom.errors import MismatchError
from megatron_ledom.evaluation.harness.model import LedomLM
from megatron_ledom.inference import ForwardLM, ReverseLM
from megatron_ledom.tokenizers.corpus_tokenizer import load_tokenizer
from tests.support.evaluation_sets import write_sets
from tests.support.harness_tasks import write_tasks
from tests.support.paths import ROOT
from tests.support.published_folder import EOD_ID, published_folder, sentencepiece_model, terminal_that_answers_yes, texts
from tests.support.tiny_models import random_model_folder
from tests.support.tool_runs import run_tool

PAGE = (ROOT / "docs/tutorials/published_model.md").read_text(encoding="utf-8")
PROMPT, ANSWER = "The capital of France is", " Paris, 漢字."
LIBRARY = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return published_folder(tmp_path_factory.mktemp("published") / "reverse_7b")


@pytest.fixture(autouse=True)
def terminal(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Iterator[None]:
    """Give every test a terminal at which a user allows all code to run; check at the end that none ran."""
    with terminal_that_answers_yes() as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        yield
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("with_code", [True, False])
def test_every_reader_gives_the_ids_of_sentencepiece_on_a_thousand_texts(tmp_path: Path, folder: Path, with_code: bool) -> None:
    folder = folder if with_code else published_folder(tmp_path / "reverse_7b", with_code=False)
    asked = texts(1000)
    expected = [LIBRARY.encode(text) for text in asked]
    ids, offsets = load_tokenizer(str(folder)).encode_batch(asked)
    assert [ids[begin:end].tolist() for begin, end in pairwise(offsets)] == expected
    model = ReverseLM.from_pretrained(folder, direction="reverse", eod_id=EOD_ID)
    assert [model.tokenizer.encode(text) for text in asked] == expected
    forward = ForwardLM.from_pretrained(folder)  # like stock transformers, it cuts special tokens out of a text
    plain = [(text, known) for text, known in zip(asked, expected, strict=True) if "<" not in text]
    assert [forward.tokenizer.encode(text) for text, _ in plain] == [known for _, known in plain]
    assert len(plain) > 500


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def run_here(monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    """Run a command of the page in this process, with the eod of the tiny folder; it must succeed."""
    words = shlex.split(command.replace("64002", str(EOD_ID)))
    assert words[0] == "ledom"
    if words[1] == "harness":
        run_harness(words)
        return
    found = [str(path) for word in words for path in (sorted(Path().glob(word)) if "*" in word else [word])]
    monkeypatch.setattr(sys, "argv", found)
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code, command


def run_harness(words: list[str]) -> None:
    """Run the harness without its command, which first reads thousands of task files."""
    options = dict(zip(words[2::2], words[3::2], strict=True))
    model: dict[str, Any] = dict(pair.split("=") for pair in options["--model_args"].split(","))
    lm = LedomLM(**{**model, "eod_id": int(model["eod_id"])})
    assert lm._lm.direction is Direction.REVERSE
    tasks = TaskManager(include_path=options["--include_path"], include_defaults=False)
    found = simple_evaluate(model=lm, tasks=["tiny_choices"], task_manager=tasks, bootstrap_iters=0)
    assert 0 <= found["results"]["tiny_choices"]["acc,none"] <= 1


@pytest.fixture
def place(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a working folder with all files that the commands of the page read."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models/reverse_7b").symlink_to(folder)
    random_model_folder(tmp_path / "models/forward", "byte_level", None)
    write_sets(tmp_path / "evaluation_sets")
    write_tasks(tmp_path / "my_tasks")
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": PROMPT, "candidates": [ANSWER, " the mat"]}) + "\n")
    for name in ("corpus", "data", "runs"):
        (tmp_path / name).mkdir()
    (tmp_path / "corpus/a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(60)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_commands_of_the_page_run_on_a_folder_of_that_layout(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = [line for block in blocks("bash") for line in block.replace("\\\n", " ").splitlines()]
    for command in commands:
        run_here(monkeypatch, command)
        if command.startswith("ledom rerank"):
            run_here(monkeypatch, f"{command} --token-values --output again.jsonl")
    assert {command.split()[1] for command in commands} > {"generate", "rerank", "evaluate"}
    score = json.loads((place / "again.jsonl").read_text(encoding="utf-8"))["scores"][0]
    ids = LIBRARY.encode(PROMPT + ANSWER)
    assert score["reverse_token_ids"] == ids[: len(score["reverse_token_ids"])]
    reader = ShardReader("data/more")
    stored = [to_model_order(LIBRARY.encode(text), Direction.REVERSE) for text in texts(60) if text]
    assert [reader.document(number).tolist() for number in range(reader.manifest.num_documents)] == [
        [*ids, EOD_ID] for ids in stored
    ]
    exported = ReverseLM.from_pretrained("models/reverse")
    assert exported.stop_ids == [EOD_ID]
    assert [exported.tokenizer.encode(text) for text in texts(200)] == [LIBRARY.encode(text) for text in texts(200)]


def test_the_python_of_the_page_scores_without_a_forward_model(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = blocks("python")
    exec(compile(code.replace("64002", str(EOD_ID)), "page", "exec"), {})
    scores = json.loads(capsys.readouterr().out)
    assert len(scores) == 2
    assert all(score < 0 for score in scores)


def test_the_readme_links_to_the_page() -> None:
    assert "docs/tutorials/published_model.md" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_a_model_type_that_needs_code_of_the_folder_is_refused_without_a_prompt(tmp_path: Path) -> None:
    folder = published_folder(tmp_path / "reverse_7b", model_type="own_model", architectures=["OwnModel"])
    with pytest.raises(MismatchError, match=r"model_type 'own_model'.* own code is never run"):
        ReverseLM.from_pretrained(folder, direction="reverse", eod_id=EOD_ID)
    assert not (folder / "ran").exists()


def test_advice_names_only_options_that_the_command_has(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The eos of the folder is ambiguous: each command names the option to choose one, each adapter the argument."""
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "x", "prompt": "p", "candidates": ["x", "y"]}\n', encoding="utf-8")
    forward = random_model_folder(tmp_path / "forward", "byte_level", "forward")
    sets = write_sets(tmp_path / "sets")
    commands: dict[str, list[str]] = {
        "generate": ["--model", str(folder), "--following", "x"],
        "evaluate": ["--model", str(folder), "--data", str(sets), "--tasks", "piqa", "--output", str(tmp_path / "e")],
        "compare_losses": [str(forward), str(folder), "--data", str(text), "--output", str(tmp_path / "c")],
        "rerank": [
            *("--forward", str(forward), "--reverse", str(folder), "--input", str(text)),
            *("--output", str(tmp_path / "r.jsonl")),
        ],
    }
    for tool, arguments in commands.items():
        if tool != "rerank":  # it has one option for both
            arguments += ["--direction", "reverse"]
        assert run_tool(monkeypatch, tool, *arguments) != 0
        run_tool(monkeypatch, tool, "--help")
        shown, told = capsys.readouterr()
        named = set(re.findall(r"--[a-z_]+(?:-[a-z]+)*", told))
        assert ("--reverse-eod-id" if tool == "rerank" else "--eod-id") in named, told
        assert named <= set(re.findall(r"--[a-z_]+(?:-[a-z]+)*", shown)), told
        assert "eod_id=" not in told
    with pytest.raises(MismatchError, match=r"in training \(eod_id=ID\)$"):
        ReverseLM.from_pretrained(folder, direction="reverse")
    with pytest.raises(MismatchError, match=r"\(eod_id=ID in --model_args\)$"):
        LedomLM(str(folder), direction="reverse")

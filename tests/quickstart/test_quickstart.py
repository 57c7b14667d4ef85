"""The small quickstart from beginning to end: every step with its real command line, on text of this machine."""

import contextlib
import json
import math
import os
import re
import shlex
import subprocess
import termios
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.forked import run_forked
from tests.support.paths import ROOT

LEDOM = ["-c", "from megatron_ledom.cli.main import main; main()"]
TUTORIAL = (ROOT / "docs/tutorials/own_corpus.md").read_text(encoding="utf-8")


@dataclass(frozen=True, slots=True)
class Run:
    """A finished small quickstart: its working folder, output and report."""

    folder: Path
    stdout: str
    terminal: str
    """Its stderr, which was a terminal."""
    report: dict[str, Any]


def start(folder: Path, python: Path, environment: dict[str, str], *options: str) -> subprocess.CompletedProcess[str]:
    """Run the quickstart with a terminal as its stderr."""
    command = [str(python), str(ROOT / "examples/quickstart/run.py"), *options]
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (24, 120))
    received: list[bytes] = []
    process = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=theirs, text=True)
    os.close(theirs)
    reader = threading.Thread(target=_receive, args=(ours, received))
    reader.start()
    stdout, _ = process.communicate()
    reader.join()
    return subprocess.CompletedProcess(command, process.returncode, stdout, b"".join(received).decode(errors="replace"))


def _receive(terminal: int, received: list[bytes]) -> None:
    """Receive everything that is written to a terminal until no process has it open."""
    with contextlib.suppress(OSError):  # Linux raises OSError when the other side is closed
        while block := os.read(terminal, 1 << 16):
            received.append(block)
    os.close(terminal)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, python: Path, environment_with_gpus: dict[str, str]) -> Run:
    folder = tmp_path_factory.mktemp("quickstart")
    done = start(folder, python, environment_with_gpus, "--size", "small")
    assert done.returncode == 0, done.stdout + done.stderr
    return Run(folder, done.stdout, done.stderr, json.loads((folder / "quickstart/report.json").read_text()))


@pytest.mark.parametrize("name", ["read", "preprocess", "train reverse", "train forward", "train reverse problems"])
def test_long_steps_show_a_bar_with_rate_and_time_left(run: Run, name: str) -> None:
    shown = [line for line in re.split(r"[\r\n]", run.terminal) if line.replace("\x1b[A", "").startswith(f"{name}:")]
    assert shown, run.terminal[-3000:]
    if name == "read":  # the number of texts is unknown before they are read
        assert any(re.search(r"\d+ documents \[\d\d:\d\d, [\d.,k]+ documents/s\]", line) for line in shown)
    else:
        assert any(re.search(r"\d+%.*\[\d\d:\d\d<\d\d:\d\d, +[\d.]+[kM]?\w+/s", line) for line in shown), shown[-3:]
    if name.startswith("train"):
        assert any(re.search(r"iteration=\d+/(120|60), loss=\d\.\d{3}", line) for line in shown), shown[-3:]


def test_no_warning_of_a_library_is_shown(run: Run) -> None:
    """Of running commands, since their imports are done before; `tests/packaging` starts the same commands in new processes."""
    shown = run.stdout + run.terminal
    assert [line for line in shown.splitlines() if "Warning" in line or "site-packages" in line or "FSDP" in line] == []


def test_without_a_terminal_training_prints_iteration_loss_and_time_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples/quickstart"))
    import twins

    monkeypatch.setattr(twins, "REPORT_SECONDS", 0.0)
    monkeypatch.setattr(twins.Training, "start", lambda self: None)
    training = twins.Training(
        "reverse",
        ROOT / "examples/configs/quickstart_reverse.yaml",
        [f"run_dir={tmp_path}", "train.train_iters=400", "optimizer.lr_warmup_iters=1"],
    )
    training.begin(0)  # pytest's stderr is not a terminal
    assert training.iteration() == 0
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"iteration": 100, "lm_loss": 5.25}) + "\n")
    training.began -= 60
    assert training.iteration() == 100
    assert capsys.readouterr().out == "train reverse: iteration 100 of 400, loss 5.250, 03:00 left\n"


def test_both_twins_learn(run: Run) -> None:
    for model in run.report["models"].values():
        assert math.isfinite(model["valid_loss"])
        assert math.isfinite(model["train_loss"])
        assert model["valid_loss"] < model["first_loss"] - 0.5
        assert model["train_loss"] < model["first_loss"] - 0.5
        assert 0 < model["bits_per_byte"] < 8
        assert len(model["validations"]) >= 2


def test_twins_are_of_the_same_size_and_saw_as_many_tokens(run: Run) -> None:
    reverse, forward = (run.report["models"][name] for name in ("reverse", "forward"))
    for key in ("parameters", "trained_tokens", "shard_tokens", "iterations"):
        assert reverse[key] == forward[key]


def test_reverse_run_was_stopped_and_resumed_by_the_same_command(run: Run) -> None:
    assert run.report["resumed"] is True
    assert 0 < run.report["resumed_at"] < run.report["models"]["reverse"]["iterations"]
    resumed = (run.folder / "quickstart/logs/train_reverse_start_2.log").read_text()
    assert f"at iteration {run.report['resumed_at']}" in resumed


def test_exports_passed_the_parity_check(run: Run) -> None:
    assert all(model["largest_logit_difference"] <= 1e-4 for model in run.report["models"].values())


def test_three_endings_got_a_beginning(run: Run) -> None:
    generated = run.report["generated"]
    assert [text["kind"] for text in generated] == ["code", "prose", "licence"]
    for text in generated:
        assert text["text"].endswith(text["following"])
        assert len(text["text"]) > len(text["following"])


def test_eight_candidates_are_ranked_by_reward(run: Run) -> None:
    reranked = run.report["reranked"]
    assert len(reranked["candidates"]) == len(reranked["scores"]) == 8
    assert sorted(reranked["ranking"]) == list(range(8))
    rewards = [reranked["scores"][index]["reward"] for index in reranked["ranking"]]
    known = [reward for reward in rewards if reward is not None]
    assert known == sorted(known, reverse=True)
    assert reranked["best"] == reranked["candidates"][reranked["ranking"][0]]


def test_the_report_begins_with_the_choice_of_answers_to_word_problems(run: Run) -> None:
    found = run.report["problems"]
    assert (found["num_questions"], found["num_candidates"]) == (10, 4)
    first = (run.folder / "quickstart/report.md").read_text(encoding="utf-8").split("\n\n")[1]
    assert re.match(r"\*\*On 10 word problems, Reverse Reward is right in \d", first)
    (gain,) = [row["difference"] for row in found["comparisons"] if row["against"] == "majority vote"]
    assert gain == pytest.approx(found["methods"]["Reverse Reward"]["accuracy"] - found["methods"]["majority vote"]["accuracy"])
    assert f"{100 * gain:+.1f} (" in first


def test_held_out_files_are_not_in_the_training_part(run: Run) -> None:
    corpus = run.folder / "quickstart/corpus"
    train, valid = (
        [json.loads(line) for line in (corpus / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]
        for split in ("train", "valid")
    )
    for key in ("source", "text"):
        values = [record[key] for record in train + valid]
        assert len(set(values)) == len(values)
    assert valid


def test_report_names_every_path_and_draws_the_curves(run: Run) -> None:
    assert all((run.folder / path).exists() for path in run.report["paths"].values())
    assert (run.folder / "quickstart/loss_curves.png").read_bytes().startswith(b"\x89PNG")
    assert "bits per byte" in (run.folder / "quickstart/report.md").read_text(encoding="utf-8")
    assert set(run.report["phases"]) == {
        *("collect", "tokenizer", "preprocess", "train", "export", "generate", "rerank"),
        *("problems", "choose"),
    }


def test_keep_continues_after_the_finished_phases(run: Run, python: Path, environment_with_gpus: dict[str, str]) -> None:
    (run.folder / "quickstart/phases/choose.json").unlink()
    again = start(run.folder, python, environment_with_gpus, "--size", "small", "--keep")
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("finished before") == 8
    assert " rerank --forward " in again.stdout


def test_too_little_text_is_refused_with_both_amounts(tmp_path: Path) -> None:
    command = [str(ROOT / "examples/quickstart/collect.py"), "--output", str(tmp_path / "corpus")]
    done = run_forked([*command, "--most-megabytes", "1"])
    assert done.returncode == 1
    assert re.search(r"only \d\.\d MB of text found .* at least 20 MB are needed", done.stderr)
    assert not (tmp_path / "corpus").exists()


@pytest.mark.parametrize("page", ["README.md", "docs/tutorials/own_corpus.md"])
def test_pipeline_commands_of_the_pages_are_those_that_ran(run: Run, page: str) -> None:
    """The same commands with the same options, apart from numbers that depend on the size."""
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = re.findall(r"<!-- run by the quickstart -->\n```bash\n(.*?)```", text, re.DOTALL)
    shown = {_shape(line) for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()}
    ran = {_shape(line.removeprefix("$ ")) for line in run.stdout.splitlines() if line.startswith("$ ")}
    assert shown
    assert shown <= ran


def _shape(command: str) -> tuple[str, ...]:
    """Return the script, or the command of `ledom`, with its options and its paths below quickstart/."""
    words = [word.removeprefix("../" * word.count("../")) for word in shlex.split(command)]
    kept = [word for word in words if word.startswith(("--", "quickstart/", "mcore-to-hf"))]
    names = [Path(word).name for word in words if word.endswith((".py", ".yaml"))]
    names += [words[index + 1] for index, word in enumerate(words) if word.endswith(("ledom", "main()"))]
    return tuple(names + sorted(kept))


def test_the_tutorials_python_runs_on_the_exported_model(run: Run) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", TUTORIAL, re.DOTALL)
    done = run_forked(["-c", code], folder=run.folder)
    assert done.returncode == 0, done.stderr
    text, logprob = done.stdout.strip().rsplit("\n", 1)
    assert text.endswith("return total / len(values)")
    assert float(logprob) < 0


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        ("ledom inspect-checkpoint quickstart/runs/reverse --verify", "verified"),
        ("ledom report-run quickstart/runs/reverse quickstart/runs/forward --output report --smooth 5", "report"),
    ],
)
def test_the_tutorials_looks_at_runs_work(run: Run, command: str, shown: str) -> None:
    assert command in TUTORIAL
    done = run_forked([*LEDOM, *command.split()[1:]], folder=run.folder)
    assert done.returncode == 0, done.stderr
    assert shown in done.stdout + done.stderr


def test_the_tutorials_look_at_a_shard_shows_its_text(run: Run) -> None:
    command = "ledom inspect-shard quickstart/shards/reverse/valid --show 2"
    assert command in TUTORIAL
    done = run_forked([*LEDOM, *command.split()[1:]], folder=run.folder)
    assert done.returncode == 0, done.stderr
    lines = (run.folder / "quickstart/corpus/valid.jsonl").read_text(encoding="utf-8").splitlines()
    first = next(line.strip() for line in json.loads(lines[0])["text"].splitlines() if line.strip())
    assert first in done.stdout

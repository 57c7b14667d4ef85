"""Reverse Reward: the formula, the ranking, the file format and errors in it."""

import json
import math
import os
import shutil
import signal
import subprocess
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ledom.errors import DataError, MismatchError, UsageError
from megatron_ledom.inference import ForwardLM, ReverseLM
from megatron_ledom.inference.engines.transformers_engine import TransformersEngine
from megatron_ledom.inference.generation import Sampling
from megatron_ledom.inference.reverse_reward.reranking import RerankSettings, rerank_file
from megatron_ledom.inference.reverse_reward.reward import (
    Candidate,
    CandidateScore,
    RewardSettings,
    rank,
    reverse_reward,
    score_questions,
)
from megatron_ledom.inference.scoring import SpanScore
from tests.support.paths import ROOT
from tests.support.tiny_models import forward_and_reverse
from tests.support.tool_runs import run_tool

PROMPT = "What is the capital of France? "
ANSWERS = ["Paris.", "The cat sat on the mat", "漢字 🙂", "Paris."]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return a forward and a reverse model with different tokenizers."""
    return forward_and_reverse(tmp_path_factory.mktemp("models"), "byte_level", "sentencepiece")


@pytest.fixture(scope="module")
def models(folders: tuple[Path, Path]) -> tuple[ForwardLM, ReverseLM]:
    return ForwardLM.from_pretrained(folders[0], device="cpu"), ReverseLM.from_pretrained(folders[1], device="cpu")


def rerank(
    models: tuple[ForwardLM, ReverseLM],
    source: Path,
    output: Path,
    weight: float = 0.5,
    sampling: Sampling | None = None,
    window: int = 512,
) -> int:
    settings = RerankSettings(reward=RewardSettings(weight=weight), sampling=sampling, window_candidates=window)
    return rerank_file(lambda: engines(models), source, output, settings)


def engines(models: tuple[ForwardLM, ReverseLM], batch_size: int = 16) -> tuple[TransformersEngine, TransformersEngine]:
    return TransformersEngine(models[0], batch_size), TransformersEngine(models[1], batch_size)


class FailingEngine(TransformersEngine):
    """Scores as usual, but raises an error for answers called broken."""

    def score(self, pairs: Sequence[tuple[str, str]], *, include_end: bool = False) -> list[SpanScore]:
        if any("broken" in answer for _, answer in pairs):
            raise DataError("broken weights")
        return super().score(pairs, include_end=include_end)


def failing_engines(models: tuple[ForwardLM, ReverseLM]) -> tuple[TransformersEngine, TransformersEngine]:
    return TransformersEngine(models[0]), FailingEngine(models[1])


def score_one(
    models: tuple[ForwardLM, ReverseLM], candidates: list[Candidate], settings: RewardSettings, batch_size: int = 16
) -> list[CandidateScore]:
    (scores,) = score_questions(*engines(models, batch_size), [(PROMPT, candidates)], settings)
    return scores


def write_lines(path: Path, *lines: Any) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_reward_is_the_weighted_sum_of_logs() -> None:
    assert reverse_reward(-4.0, -8.0, 0.25) == -5.0
    assert math.exp(reverse_reward(math.log(0.5), math.log(0.125), 0.5)) == pytest.approx(0.5**0.5 * 0.125**0.5)
    assert reverse_reward(-4.0, -math.inf, 0.0) == -4.0
    assert reverse_reward(-math.inf, -8.0, 1.0) == -8.0
    assert reverse_reward(-4.0, -math.inf, 0.5) == -math.inf


def test_ranking_on_hand_made_numbers() -> None:
    forward, backwards = [-1.0, -2.0, -9.0], [-9.0, -5.0, -1.0]
    rewards = {
        weight: [reverse_reward(f, r, weight) for f, r in zip(forward, backwards, strict=True)] for weight in (0, 0.5, 1)
    }
    assert rank(list(rewards[0])) == [0, 1, 2]
    assert rank(list(rewards[1])) == [2, 1, 0]
    assert rank(list(rewards[0.5])) == [1, 0, 2]
    assert rank([-1.0, None, -math.inf, -1.0, 0.0]) == [4, 0, 3, 2, 1]


def test_scores_are_the_two_models_log_likelihoods(models: tuple[ForwardLM, ReverseLM]) -> None:
    forward, reverse = models
    scores = score_one(models, [Candidate(text) for text in ANSWERS], RewardSettings(weight=0.3), batch_size=3)
    for text, score in zip(ANSWERS, scores, strict=True):
        one, other = forward.log_likelihood(PROMPT, text), reverse.log_likelihood(PROMPT, text)
        assert score.forward_logprob == pytest.approx(one.logprob, abs=1e-4)
        assert score.reverse_logprob == pytest.approx(other.logprob, abs=1e-4)
        assert (score.forward_tokens, score.reverse_tokens) == (one.num_tokens, other.num_tokens)
        assert score.reward == pytest.approx(0.7 * one.logprob + 0.3 * other.logprob, abs=1e-4)


def test_the_extreme_weights_rank_by_one_model(models: tuple[ForwardLM, ReverseLM], tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", {"prompt": PROMPT, "candidates": ANSWERS[:3]})
    for weight, field in ((0.0, "forward_logprob"), (1.0, "reverse_logprob")):
        rerank(models, source, tmp_path / f"{field}.jsonl", weight=weight)
        (line,) = read_lines(tmp_path / f"{field}.jsonl")
        values = [score[field] for score in line["scores"]]
        assert line["ranking"] == sorted(range(3), key=lambda i, values=values: -values[i])
        assert line["best"] == ANSWERS[line["ranking"][0]]
        assert [score["reward"] for score in line["scores"]] == values


def test_the_file_keeps_its_fields_and_a_given_forward_logprob(models: tuple[ForwardLM, ReverseLM], tmp_path: Path) -> None:
    given = {"text": "Paris.", "forward_logprob": -1.25}
    record = {"id": 7, "prompt": PROMPT, "candidates": [given, "Berlin é", ""], "gold": None}
    source = write_lines(tmp_path / "in.jsonl", record, "", {"prompt": "x", "candidates": ["y"]})
    assert rerank(models, source, tmp_path / "out.jsonl") == 2
    first, second = read_lines(tmp_path / "out.jsonl")
    assert {key: first[key] for key in record} == record
    assert set(first["scores"][0]) == {"forward_logprob", "reverse_logprob", "forward_tokens", "reverse_tokens", "reward"}
    assert (first["scores"][0]["forward_logprob"], first["scores"][0]["forward_tokens"]) == (-1.25, None)
    assert first["scores"][1]["forward_tokens"] > 0
    assert (first["scores"][2]["reward"], first["ranking"][-1]) == (None, 2)
    assert second["best"] == "y"
    assert not (tmp_path / "out.jsonl.part").exists()


def test_sampling_is_repeatable(models: tuple[ForwardLM, ReverseLM], tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", {"prompt": PROMPT}, {"prompt": PROMPT})
    outputs = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        sampling = Sampling(num_return_sequences=4, temperature=1.0, max_new_tokens=6, seed=seed)
        rerank(models, source, tmp_path / name, sampling=sampling)
        outputs.append((tmp_path / name).read_text(encoding="utf-8"))
    assert outputs[0] == outputs[1] != outputs[2]
    first, second = read_lines(tmp_path / "a")
    assert len(first["candidates"]) == 4 == len(first["scores"])
    assert sorted(first["ranking"]) == [0, 1, 2, 3]
    assert first["candidates"] != second["candidates"]
    assert first["best"] == first["candidates"][first["ranking"][0]]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not a line of JSON"),
        ("[]", "expected an object"),
        ({"candidates": ["a"]}, '"prompt"'),
        ({"prompt": "", "candidates": ["a"]}, '"prompt"'),
        ({"prompt": "x"}, '"candidates"'),
        ({"prompt": "x", "candidates": []}, '"candidates"'),
        ({"prompt": "x", "candidates": "a"}, '"candidates"'),
        ({"prompt": "x", "candidates": ["a", 3]}, "candidate 1"),
        ({"prompt": "x", "candidates": [{"text": "a", "forward_logprob": "-1"}]}, "candidate 0: forward_logprob='-1'"),
        ({"prompt": "x", "candidates": [{"text": "a", "forward_logprob": 0.5}]}, "forward_logprob=0.5"),
        ({"prompt": "x", "candidates": [{"text": "a", "forward_logprob": float("nan")}]}, "forward_logprob=nan"),
        ({"prompt": "x", "candidates": ["\ud800"]}, "surrogate"),
        ({"prompt": "x", "candidates": ["漢" * 600]}, "exceeds the 512 positions"),
    ],
)
def test_a_bad_line_is_named_and_leaves_nothing(
    line: Any, message: str, models: tuple[ForwardLM, ReverseLM], tmp_path: Path
) -> None:
    source = write_lines(tmp_path / "in.jsonl", {"prompt": "x", "candidates": ["y"]}, line)
    with pytest.raises(DataError) as caught:
        rerank(models, source, tmp_path / "out.jsonl")
    assert str(caught.value).startswith(f"{source}:2: ")
    assert message in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_bytes_that_are_no_utf8_are_named(models: tuple[ForwardLM, ReverseLM], tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(b'{"prompt": "x", "candidates": ["\xff"]}\n')
    with pytest.raises(DataError, match=r"in\.jsonl:1: .*UTF-8"):
        rerank(models, tmp_path / "in.jsonl", tmp_path / "out.jsonl")


def test_candidates_and_sampling_together_are_refused(models: tuple[ForwardLM, ReverseLM], tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", {"prompt": "x", "candidates": ["y"]})
    with pytest.raises(DataError, match="has candidates already"):
        rerank(models, source, tmp_path / "out.jsonl", sampling=Sampling(num_return_sequences=2, temperature=1.0))


@pytest.mark.parametrize("weight", [-0.1, 1.1, float("nan")])
def test_a_weight_outside_0_to_1_is_refused(weight: float) -> None:
    with pytest.raises(UsageError, match=r"outside \[0, 1\]"):
        RewardSettings(weight=weight)


def test_paths_that_cannot_work_are_refused_before_a_model_is_loaded(tmp_path: Path) -> None:
    def never() -> tuple[TransformersEngine, TransformersEngine]:
        pytest.fail("a model was loaded")

    source = write_lines(tmp_path / "in.jsonl", {"prompt": "x", "candidates": ["y"]})
    for input_path, output_path in (
        (tmp_path / "missing", tmp_path / "out.jsonl"),
        (source, source),
        (source, tmp_path),
    ):
        with pytest.raises(UsageError):
            rerank_file(never, input_path, output_path, RerankSettings())


KILLED_RUN = """
import os, runpy, sys
from megatron_ledom.inference.line_output import UnfinishedOutput
plain, calls = UnfinishedOutput.append, []
def append(self, window):
    if len(calls) == 2:  # half a line of the third window reaches the disk, then the process is killed
        with self._part.open("a", encoding="utf-8") as output:
            output.write("{" + '"prompt": "half a li')
        os.kill(os.getpid(), 9)
    calls.append(1)
    plain(self, window)
UnfinishedOutput.append = append
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("mode", [["--sample", "3"], ["--beam", "2", "--expansions", "2", "--step-delimiter", "regex:[aeiou]"]])
def test_a_killed_rerank_resumes_to_the_identical_file(
    mode: list[str], folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, python: Path
) -> None:
    source = write_lines(tmp_path / "in.jsonl", *({"id": n, "prompt": PROMPT[: n + 3]} for n in range(7)))
    tool = str(ROOT / "tools/rerank.py")
    options = [*mode, "--max-new-tokens", "6", "--token-values", "--greedy", "--batch-size", "2", "--input", str(source)]
    command = [tool, "--forward", str(folders[0]), "--reverse", str(folders[1]), *options, "--output"]

    def finish(name: str) -> None:
        assert run_tool(monkeypatch, "rerank", *command[1:], tmp_path / name) == 0

    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONPATH": str(ROOT)}
    killed = [str(python), "-c", KILLED_RUN, *command, str(tmp_path / "killed")]
    assert subprocess.run(killed, env=environment, timeout=120, check=False).returncode == -signal.SIGKILL
    assert not (tmp_path / "killed").exists()
    finish("killed")
    finish("whole")
    assert len(read_lines(tmp_path / "whole")) == 7  # three windows if answers are sampled: 3, 3 and 1
    assert (tmp_path / "killed").read_bytes() == (tmp_path / "whole").read_bytes()
    spent = [json.loads((tmp_path / f"{name}.spent.json").read_text()) for name in ("whole", "killed")]
    assert spent[0]["forward_tokens"] == spent[1]["forward_tokens"] > 0
    assert spent[0]["reverse_tokens"] == spent[1]["reverse_tokens"] > 0
    assert not list(tmp_path.glob("*.part*"))


def test_unfinished_work_of_another_input_or_of_other_settings_is_refused(
    models: tuple[ForwardLM, ReverseLM], tmp_path: Path
) -> None:
    by_line = partial(rerank, window=1)
    good = [{"prompt": "x", "candidates": ["y", "z"]}, {"prompt": "u", "candidates": ["v"]}]
    source = write_lines(tmp_path / "in.jsonl", *good, {"prompt": "x", "candidates": ["broken"]})
    with pytest.raises(DataError, match=r"in\.jsonl:3: .*broken weights"):
        rerank_file(lambda: failing_engines(models), source, tmp_path / "out.jsonl", RerankSettings(window_candidates=1))
    assert len(read_lines(tmp_path / "out.jsonl.part")) == 2  # finished lines are kept
    with pytest.raises(MismatchError, match=r"weight was 0\.5 and is 0\.25"):
        by_line(models, source, tmp_path / "out.jsonl", weight=0.25)
    write_lines(source, {"prompt": "other", "candidates": ["y"]}, *good)
    with pytest.raises(MismatchError, match=r"another input than .*in\.jsonl:1"):
        by_line(models, source, tmp_path / "out.jsonl")
    write_lines(source, *good, {"prompt": "x", "candidates": ["w"]})
    assert by_line(models, source, tmp_path / "out.jsonl") == 3
    by_line(models, source, tmp_path / "anew.jsonl")
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "anew.jsonl").read_bytes()


def test_a_ranked_file_is_ranked_again_and_resumed(models: tuple[ForwardLM, ReverseLM], tmp_path: Path) -> None:
    lines = [{"prompt": text, "candidates": ["y", "z"]} for text in ("x", "u")]
    once = write_lines(tmp_path / "in.jsonl", *lines)
    rerank(models, once, tmp_path / "once.jsonl")
    bad = write_lines(tmp_path / "bad.jsonl", *read_lines(tmp_path / "once.jsonl"), {"prompt": "x", "candidates": ["broken"]})
    settings = RerankSettings(reward=RewardSettings(weight=0.25), window_candidates=1)
    with pytest.raises(DataError, match="broken weights"):
        rerank_file(lambda: failing_engines(models), bad, tmp_path / "again.jsonl", settings)
    assert len(read_lines(tmp_path / "again.jsonl.part")) == 2
    write_lines(bad, *read_lines(tmp_path / "once.jsonl"))
    assert rerank(models, bad, tmp_path / "again.jsonl", weight=0.25, window=1) == 2
    rerank(models, once, tmp_path / "plain.jsonl", weight=0.25, window=1)
    assert read_lines(tmp_path / "again.jsonl") == read_lines(tmp_path / "plain.jsonl")


def test_notes_without_a_part_do_not_stop_the_next_run(models: tuple[ForwardLM, ReverseLM], tmp_path: Path) -> None:
    """State after a kill between the last two operations: the output has its name, and the notes still exist."""
    source = write_lines(tmp_path / "in.jsonl", {"prompt": "x", "candidates": ["y"]})
    (tmp_path / "out.jsonl.part.notes").write_text(json.dumps({"made_by": {}}) + "\n{}\n")
    assert rerank(models, source, tmp_path / "out.jsonl") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl", "out.jsonl.spent.json"]


def test_a_public_reverse_checkpoint_ranks_as_the_same_model_that_records_its_direction(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    public = shutil.copytree(folders[1], tmp_path / "public")
    config = json.loads((public / "config.json").read_text())
    eod_id = config["eod_id"]
    stock = {key: value for key, value in config.items() if key not in ("direction", "eod_id", "tokenizer_sha256")}
    (public / "config.json").write_text(json.dumps(stock))
    source = write_lines(tmp_path / "in.jsonl", {"prompt": PROMPT, "candidates": ANSWERS})

    def ranked(folder: Path, *more: str) -> list[dict[str, Any]]:
        output = tmp_path / f"{folder.name}.jsonl"
        models = ["--forward", folders[0], "--reverse", folder]
        code = run_tool(monkeypatch, "rerank", *models, "--input", source, "--output", output, *more)
        return [] if code else read_lines(output)

    assert ranked(public) == []
    assert ranked(public, "--reverse-eod-id", str(eod_id)) == ranked(folders[1]) != []

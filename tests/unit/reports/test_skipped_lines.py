"""Prompts and candidates that a reranking skipped: omitted from comparisons (with a note) and explanations, and skipped again."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_ledom.errors import DataError
from megatron_ledom.evaluation.grading.answers import answers_by
from megatron_ledom.evaluation.selection_methods import load_questions
from megatron_ledom.inference import ForwardLM, ReverseLM
from megatron_ledom.inference.engines.transformers_engine import TransformersEngine
from megatron_ledom.inference.generation import Sampling
from megatron_ledom.inference.reverse_reward.reranking import RerankSettings, rerank_file
from megatron_ledom.inference.reverse_reward.reward import RewardSettings
from tests.support.tiny_models import random_model_folder
from tests.support.tool_runs import run_tool

SCORE = {"forward_logprob": -1.0, "reverse_logprob": -2.0, "forward_tokens": 3, "reverse_tokens": 4, "reward": -1.5}
NO_ROOM = "90 tokens and 40 new ones exceed the 100 positions of the forward model"
SKIPPED_SCORE = {**dict.fromkeys(SCORE), "skipped": "a text of 120 tokens exceeds the 64 positions of the reverse model"}
SCORE_METHODS = (
    "forward likelihood, sum",
    "forward likelihood, mean",
    "reverse only",
    "Reverse Reward",
    "reverse-weighted majority",
)


def answered(number: int, **more: Any) -> dict[str, Any]:
    line = {"prompt": f"q{number}", "gold": "18", "candidates": ["18", "17"], "scores": [SCORE, {**SCORE, "reward": -2.0}]}
    return {**line, "ranking": [0, 1], "best": "18", "greedy": "18", **more}


def unanswered(number: int) -> dict[str, Any]:
    """Return the line that a sampling run with --too-long skip writes for a prompt without room."""
    line = {"prompt": f"q{number}", "gold": "18", "candidates": [], "scores": [], "ranking": []}
    return {**line, "best": None, "skipped": NO_ROOM}


def write(path: Path, lines: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_questions_that_any_seed_skipped_are_omitted_for_all_files_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("scipy")
    first = write(tmp_path / "1.jsonl", [unanswered(0), answered(1), answered(2), answered(3), answered(4)])
    other = [answered(0), {**unanswered(1)}, *(answered(n, greedy="17") for n in (2, 3, 4))]
    second = write(tmp_path / "2.jsonl", other)
    no_best = {"best": None, "scores": [SKIPPED_SCORE] * 2, "num_skipped": 2, "ranking": [0, 1]}
    beam = write(tmp_path / "beam.jsonl", [unanswered(0), answered(1), answered(2), answered(3, **no_best), unanswered(4)])
    output = tmp_path / "report"
    options = ["--output", str(output), "--gold-key", "gold", "--beam", beam, "--folds", "2"]
    assert run_tool(monkeypatch, "report_rerank", first, second, *options) == 0
    report = json.loads((output / "report.json").read_text())
    assert report["num_questions"] == 3
    assert (
        report["methods"]["greedy"]["accuracy"] == 0.5
    )  # a skipped line has no greedy answer; the greedy answers of others still count
    assert report["methods"]["beam by Reverse Reward"]["accuracy"] == pytest.approx(1 / 3)
    printed, markdown, page = (
        capsys.readouterr().out,
        (output / "report.md").read_text(),
        (output / "report.html").read_text(),
    )
    for note in ("Note: 2 of 5 questions were skipped by the reranking", "Note: 2 of 3 beam searches chose no answer"):
        assert any(one.startswith(note) for one in report["notes"])
        assert all(note in text for text in (printed, markdown, page))


def test_a_null_best_of_a_beam_that_skipped_nothing_is_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "x.jsonl", [answered(1), answered(2)])
    for scores in ([SCORE], None, 5):
        beam = write(tmp_path / "beam.jsonl", [answered(1), answered(2, best=None, scores=scores)])
        with pytest.raises(DataError, match=r"beam.jsonl:2: best is not a text"):
            load_questions(source, "gold", answers_by("number"), RewardSettings(), beam)


def test_empty_candidates_without_a_reason_are_refused_and_the_error_for_too_few_questions_names_the_skipped_ones(
    tmp_path: Path,
) -> None:
    for line in ({**unanswered(2), "skipped": None}, {**unanswered(2), "skipped": 3}):
        source = write(tmp_path / "x.jsonl", [answered(1), line])
        with pytest.raises(DataError, match=r"x.jsonl:2: candidates is empty; remove the line"):
            load_questions(source, "gold", answers_by("number"), RewardSettings())
    source = write(tmp_path / "x.jsonl", [answered(1), unanswered(2)])
    with pytest.raises(DataError, match=r"has 1 questions \(and 1 skipped\); a comparison needs at least 2"):
        load_questions(source, "gold", answers_by("number"), RewardSettings())


def test_a_skipped_candidate_is_below_an_impossible_one_and_never_chosen(tmp_path: Path) -> None:
    """The skipped candidate is the right one, alone or with one of probability 0; no method chooses it."""
    names = ["forward_logprob", "reverse_logprob", "reward"]
    impossible = {**SCORE, **dict.fromkeys(names), "minus_infinity": names}
    lines = [answered(1, scores=[SKIPPED_SCORE, impossible]), answered(2, candidates=["18"], scores=[SKIPPED_SCORE])]
    questions = load_questions(write(tmp_path / "x.jsonl", lines), "gold", answers_by("number"), RewardSettings())
    for method in SCORE_METHODS:
        assert [question.outcome(method, len(question.is_right), 10) for question in questions] == [0.0, 0.0], method
        assert questions[0].outcome(method, 1, 10) == 0.0
    assert questions[1].outcome("majority vote", 1, 10) == 1.0  # votes need no scores
    contradiction = {**SKIPPED_SCORE, "reward": -1.0}
    source = write(tmp_path / "x.jsonl", [answered(1), answered(2, scores=[SCORE, contradiction])])
    with pytest.raises(DataError, match=r"x.jsonl:2: scores\[1\].reward is -1.0 in a skipped candidate, expected null"):
        load_questions(source, "gold", answers_by("number"), RewardSettings())


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return the folders of a forward model of 160 positions and a reverse model of 64."""
    folders = []
    for direction, num_positions in (("forward", 160), ("reverse", 64)):
        folder = random_model_folder(tmp_path_factory.mktemp("model") / direction, "byte_level", direction)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": num_positions}))
        folders.append(folder)
    return folders[0], folders[1]


def engines_of(models: tuple[Path, Path]) -> tuple[TransformersEngine, TransformersEngine]:
    forward = ForwardLM.from_pretrained(models[0], device="cpu")
    return TransformersEngine(forward, 4), TransformersEngine(ReverseLM.from_pretrained(models[1], device="cpu"), 4)


def test_an_explanation_omits_skipped_candidates_and_names_them(
    models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    long = "very long " * 400
    line = answered(1, candidates=["18", long], scores=[SCORE, SKIPPED_SCORE])
    source = write(
        tmp_path / "x.jsonl", [line, unanswered(2), answered(3, ranking=["0", "1"]), answered(4, candidates=["18", long])]
    )
    options = ["--output", str(tmp_path / "why"), "--reverse", str(models[1])]
    assert run_tool(monkeypatch, "report_rerank", source, "--explain", "1", *options) == 0
    told = f"2. candidate 1, reward none; skipped by the ranking and not scored here: {SKIPPED_SCORE['skipped']}"
    printed = capsys.readouterr().out
    assert told in printed
    assert "very long" not in printed
    assert told in (tmp_path / "why/explain_1.html").read_text()
    for number, message in (
        ("2", f"x.jsonl:2: the prompt was skipped and has no candidates ({NO_ROOM})"),
        ("3", 'the ranking ["0", "1"]'),
        ("4", "x.jsonl:4: a text of"),
    ):
        assert run_tool(monkeypatch, "report_rerank", source, "--explain", number, *options) == 1
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("too_long", ["refuse", "skip"])
def test_a_skipped_prompt_stays_skipped_when_its_file_is_ranked_again(
    too_long: str, models: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, once, again = (tmp_path / f"{name}.jsonl" for name in ("in", "once", "again"))
    write(source, [{"prompt": "ab", "id": 1}, {"prompt": "the " * 200, "id": 2}])
    sampling = Sampling(num_return_sequences=2, temperature=1.0, max_new_tokens=4, seed=1)
    rerank_file(lambda: engines_of(models), source, once, RerankSettings(sampling=sampling, too_long="skip"))
    lines = [json.loads(line) for line in once.read_text().splitlines()]
    assert "skipped" in lines[1]
    capsys.readouterr()
    settings = RerankSettings(reward=RewardSettings(weight=1.0), too_long=too_long, window_candidates=1)
    assert rerank_file(lambda: engines_of(models), once, again, settings) == 2
    first, second = (json.loads(line) for line in again.read_text().splitlines())
    assert second == lines[1]
    assert (first["candidates"], first["id"]) == (lines[0]["candidates"], 1)
    assert f"skipped: {once}:2: prompt: {lines[1]['skipped']}" in capsys.readouterr().err
    assert json.loads((tmp_path / "again.jsonl.spent.json").read_text())["num_skipped_prompts"] == 1
    assert rerank_file(lambda: pytest.fail("a model was loaded"), once, again, settings) == 2


def test_a_killed_ranking_of_skipped_prompts_resumes(models: tuple[Path, Path], tmp_path: Path) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    record = {"prompt": "x", "candidates": [{"text": "y", "forward_logprob": -1.0}]}
    lines = [unanswered(1), record, unanswered(2), unanswered(3), record, unanswered(4)]
    write(source, lines)

    class Killed(TransformersEngine):
        """Raises an error at the second window."""

        num_calls = 0

        def score(self, pairs: Any, **options: Any) -> Any:
            self.num_calls += bool(pairs)
            if self.num_calls > 1:
                raise KeyboardInterrupt
            return super().score(pairs, **options)

    forward, reverse = engines_of(models)
    settings = RerankSettings(window_candidates=1)
    with pytest.raises(KeyboardInterrupt):
        rerank_file(lambda: (forward, Killed(ReverseLM.from_pretrained(models[1], device="cpu"), 4)), source, output, settings)
    assert len((tmp_path / "out.jsonl.part").read_text().splitlines()) == 2
    assert rerank_file(lambda: (forward, reverse), source, output, settings) == 6
    written = [json.loads(line) for line in output.read_text().splitlines()]
    assert [written[n] for n in (0, 2, 3, 5)] == [lines[n] for n in (0, 2, 3, 5)]
    for line in ({**unanswered(1), "skipped": None}, {"prompt": "x", "candidates": []}):
        write(source, [line])
        with pytest.raises(DataError, match=r'in\.jsonl:1: expected a list of at least one answer under "candidates"'):
            rerank_file(lambda: (forward, reverse), source, tmp_path / "other.jsonl", settings)

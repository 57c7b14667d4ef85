"""Errors in a reranked file name the line and the field, and a report notes what it omits."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_ledom.errors import DataError, UsageError
from megatron_ledom.evaluation.grading.answers import answers_by
from megatron_ledom.evaluation.selection_methods import load_questions
from megatron_ledom.inference.reverse_reward.reward import RewardSettings
from megatron_ledom.reports.method_comparison import ReportSettings, report_selection
from megatron_ledom.reports.rerank import recorded_reward, recorded_weight

SCORE = {"forward_logprob": -1.0, "reverse_logprob": -2.0, "forward_tokens": 3, "reverse_tokens": 4, "reward": -1.5}
LINE: dict[str, Any] = {"prompt": "q", "candidates": ["18", "17"], "scores": [SCORE, SCORE], "gold": "#### 18"}


def write(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in LINE.items() if key != name}


def scored(**changed: Any) -> dict[str, Any]:
    return {**LINE, "scores": [SCORE, {**SCORE, **changed}]}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (without("prompt"), "has no field 'prompt'"),
        (without("candidates"), "has no field 'candidates'"),
        (without("gold"), "has no field 'gold' with the right answer"),
        ({**LINE, "prompt": 5}, "prompt is 5, expected a text"),
        ({**LINE, "candidates": [], "scores": []}, "candidates is empty"),
        ({**LINE, "candidates": ["18", None]}, r"candidates\[1\] is null, expected a text"),
        ({**LINE, "candidates": ["18", {"texts": "17"}]}, r"candidates\[1\] is {\"texts\""),
        ({**LINE, "candidates": ["18"]}, "scores has 2 entries for 1 candidates"),
        ({**LINE, "scores": None}, "scores is null, expected a list"),
        ({**LINE, "scores": [SCORE, 3]}, r"scores\[1\] is 3, expected an object"),
        (scored(forward_logprob="-1"), r"scores\[1\].forward_logprob is \"-1\", expected a number"),
        (scored(forward_logprob=None), r"scores\[1\].forward_logprob is null, expected a number"),
        (scored(forward_logprob=float("nan")), r"scores\[1\].forward_logprob is nan"),
        (scored(reward=float("nan")), r"scores\[1\].reward is nan"),
        (scored(reverse_logprob=float("inf")), r"scores\[1\].reverse_logprob is inf"),
        (scored(reverse_tokens=True), r"scores\[1\].reverse_tokens is true, expected a number of tokens"),
        (scored(minus_infinity=None), r"scores\[1\].minus_infinity is null, expected a list of names"),
        (scored(minus_infinity=[["reward"]]), r"scores\[1\].minus_infinity is .*, expected a list of names"),
        (scored(minus_infinity=["reward"]), r"scores\[1\].reward is -1.5, and minus_infinity names it"),
        (scored(skipped=True), r"scores\[1\].skipped is true, expected the reason"),
        (scored(reward=10**400), r"scores\[1\].reward is 1000"),
        (scored(forward_logprob=10**400), r"scores\[1\].forward_logprob is 1000"),
        (scored(forward_tokens=10**400), r"scores\[1\].forward_tokens is 1000.*, expected a number of tokens"),
        ({**LINE, "gold": 10**400}, "gold is 1000.*, expected one right answer"),
        (scored(forward_tokens=-1), r"scores\[1\].forward_tokens is -1, expected a number of tokens"),
        ({**LINE, "scores": [SCORE, {"forward_logprob": -1}]}, r"scores\[1\] has no field 'reverse_logprob'"),
        ({**LINE, "greedy": None}, "greedy is null, expected a text"),
        ({**LINE, "gold": None}, "gold is null, expected one right answer"),
        ({**LINE, "gold": ["18", "20"]}, "gold is .*, expected one right answer"),
        ({**LINE, "gold": {"value": 18, "unit": "m2"}}, "gold is .*, expected one right answer"),
        ({**LINE, "gold": True}, "gold is true, expected one right answer"),
        ({**LINE, "gold": float("nan")}, "gold is NaN, expected one right answer"),
        ({**LINE, "gold": "7\\pi"}, "1 of 3 right answers cannot be read: .*x.jsonl:2: '7"),
    ],
)
def test_an_invalid_line_is_named_with_its_field(line: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", [LINE, line, LINE])
    with pytest.raises(DataError, match=message) as raised:
        load_questions(path, "gold", answers_by("number"), RewardSettings())
    assert "x.jsonl:2" in str(raised.value)


def test_numbers_are_right_answers_and_an_impossible_token_is_a_score(tmp_path: Path) -> None:
    named = {**SCORE, "reverse_logprob": None, "minus_infinity": ["reverse_logprob"]}
    lines = [
        {**LINE, "gold": 18},
        {**LINE, "gold": 18.0},
        scored(reverse_logprob=float("-inf")),
        {**LINE, "scores": [SCORE, named]},
    ]
    questions = load_questions(write(tmp_path / "x.jsonl", lines), "gold", answers_by("number"), RewardSettings())
    assert all(question.is_right.tolist() == [True, False] for question in questions)
    assert [question.reverse[1] for question in questions] == [-2.0, -2.0, float("-inf"), float("-inf")]
    assert all(
        question.outcome("reverse only", 2, 0) == share for question, share in zip(questions, (0.5, 0.5, 1, 1), strict=True)
    )


def test_a_skipped_candidate_has_no_scores_and_is_never_chosen_by_them(tmp_path: Path) -> None:
    skipped = {**dict.fromkeys(SCORE), "skipped": "200 tokens, 100 fit"}
    lines = [LINE, {**LINE, "candidates": ["17", "18"], "scores": [skipped, SCORE]}]
    question = load_questions(write(tmp_path / "x.jsonl", lines), "gold", answers_by("number"), RewardSettings())[1]
    for method in ("forward likelihood, sum", "forward likelihood, mean", "reverse only", "Reverse Reward"):
        assert question.outcome(method, 2, 10) == 1.0


@pytest.mark.parametrize("normalization", ["none", "byte"])
def test_half_of_a_surrogate_pair_has_a_length(normalization: str, tmp_path: Path) -> None:
    """It counts as three bytes with the byte normalization."""
    line = {**LINE, "prompt": "q\ud83d", "candidates": ["18\udc80", "17"]}
    settings = RewardSettings(forward_normalization=normalization, reverse_normalization=normalization)
    question = load_questions(write(tmp_path / "x.jsonl", [line, line]), "gold", answers_by("number"), settings)[0]
    lengths = (5, 4) if normalization == "byte" else (1, 1)
    assert question.rewards[:, 0].tolist()[::20] == pytest.approx([-1.0 / lengths[0], -2.0 / lengths[1]])


def reported(tmp_path: Path, *lines: list[dict[str, Any]]) -> dict[str, Any]:
    pytest.importorskip("scipy")
    files = [write(tmp_path / f"{number}.jsonl", run) for number, run in enumerate(lines)]
    settings = ReportSettings(gold_key="gold", reward=RewardSettings(), num_folds=2, num_resamples=50)
    return report_selection(files, tmp_path / "report", settings)


def test_candidates_beyond_the_smallest_number_are_noted_and_still_count(tmp_path: Path) -> None:
    """The last of three candidates is right and best: with N = 1 it is chosen in a third of the cases."""
    more = {**LINE, "candidates": ["17", "16", "18"], "scores": [SCORE, SCORE, {**SCORE, "reverse_logprob": -1.0}]}
    fewer = {**LINE, "candidates": ["18"], "scores": [SCORE]}
    report = reported(tmp_path, [more, more, fewer])
    (note,) = [note for note in report["notes"] if "1 to 3 candidates" in note]
    assert "For the 2 lines with more, every method gets 1 of them" in note
    assert note in (tmp_path / "report/report.md").read_text()
    assert report["methods"]["Reverse Reward"]["accuracy"] == pytest.approx((1 / 3 + 1 / 3 + 1) / 3)


def test_greedy_answers_of_some_lines_and_candidates_without_a_reverse_score_are_noted(tmp_path: Path) -> None:
    unjudged = {**SCORE, "reverse_logprob": None, "reward": None}
    notes = reported(tmp_path, [{**LINE, "greedy": "18"}, {**LINE, "scores": [SCORE, unjudged]}])["notes"]
    assert any("1 of 2 lines have no greedy answer" in note for note in notes)
    assert any("1 of 4 candidates have no reverse score" in note for note in notes)


def test_files_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"1.jsonl is identical to .*0.jsonl"):
        reported(tmp_path, [LINE, LINE], [LINE, LINE])
    with pytest.raises(DataError, match=r"1.jsonl:2: has another right answer than .*0.jsonl"):
        reported(tmp_path, [LINE, LINE], [LINE, {**LINE, "gold": "17"}])
    beam = write(
        tmp_path / "beam.jsonl", [{"prompt": "q", "scores": [], "best": "18"}, {"prompt": "q", "scores": [], "best": None}]
    )
    with pytest.raises(DataError, match=r"beam.jsonl:2: best is not a text"):
        load_questions(tmp_path / "0.jsonl", "gold", answers_by("number"), RewardSettings(), beam)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "{}",
        "[]",
        *(
            json.dumps({"made_by": {"settings": {"reward": reward}}})
            for reward in (
                3,
                {"x": 1},
                {"temperature": 1.0},
                {"weight": 0.5, "x": 1},
                {"weight": "0.5"},
                {"weight": None},
                {"weight": 10**400},
                {"weight": 0.5, "language_model_weight": 10**400},
                {"weight": 0.5, "forward_normalization": []},
            )
        ),
    ],
)
def test_a_spent_file_without_reward_settings_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl.spent.json").write_text(text)
    with pytest.raises(DataError, match=r"x.jsonl.spent.json: .*rerank again"):
        recorded_reward([str(tmp_path / "x.jsonl")])
    with pytest.raises(DataError, match=r"x.jsonl.spent.json: .*rerank again"):
        recorded_weight(str(tmp_path / "x.jsonl"))

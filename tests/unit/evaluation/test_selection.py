"""Baselines, held-out lambda, intervals and the report, on outcomes that can be computed by hand."""

import html
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_ledom.errors import DataError, UsageError
from megatron_ledom.evaluation.grading.answers import answers_by, classes_of
from megatron_ledom.evaluation.selection_methods import GRID, Question, chosen_weights, load_questions
from megatron_ledom.inference.engines.engine import StepDelimiter
from megatron_ledom.inference.engines.transformers_engine import TransformersEngine
from megatron_ledom.inference.language_model import ReverseLM
from megatron_ledom.inference.reverse_reward.reward import RewardSettings
from megatron_ledom.reports.explanation import as_html, as_terminal, explain
from megatron_ledom.reports.method_comparison import (
    MAIN,
    ReportSettings,
    affordable_num,
    compare,
    outcomes_of,
    report_selection,
    sentences,
    verdict,
)
from tests.support.tiny_models import random_model_folder
from tests.support.tool_runs import run_tool

HALF = GRID.index(0.5)


def line(number: int, gold: int, answers: list[int], forward: list[float], reverse: list[float], **more: Any) -> dict[str, Any]:
    """Return a reranked line with candidates "It is 7." and so on, of 10 tokens each. The prompt has 20 tokens."""
    scores = [
        {"forward_logprob": f, "reverse_logprob": r, "forward_tokens": 10, "reverse_tokens": 20, "reward": (f + r) / 2}
        for f, r in zip(forward, reverse, strict=True)
    ]
    ranking = sorted(range(len(scores)), key=lambda i: -scores[i]["reward"])
    texts = [f"It is {answer}." for answer in answers]
    record = {"prompt": f"Question {number}: ", "gold": f"so it is #### {gold}", "candidates": texts, "scores": scores}
    return {**record, "ranking": ranking, "best": texts[ranking[0]], **more}


def write(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in lines))
    return path


def questions_of(tmp_path: Path, lines: list[dict[str, Any]], **settings: Any) -> list[Question]:
    return load_questions(write(tmp_path / "x.jsonl", lines), "gold", answers_by("number"), RewardSettings(**settings))


def test_each_method_on_numbers_computed_by_hand(tmp_path: Path) -> None:
    """The right answer is 7. Forward prefers a 3, reverse a 7, equal weights a 5. 3 is the most frequent answer."""
    record = line(1, 7, [3, 3, 7, 5], [-1.0, -8.0, -9.0, -2.0], [-9.0, -8.0, -3.0, -3.5], greedy="7")
    (question, _) = questions_of(tmp_path, [record, record])
    expected = {
        "greedy": 1.0,
        "random of N": 0.25,
        "forward likelihood, sum": 0.0,
        "forward likelihood, mean": 0.0,
        "majority vote": 0.0,
        "reverse only": 1.0,
        MAIN: 0.0,
        "oracle": 1.0,
        "beam by Reverse Reward": None,
    }
    assert {name: question.outcome(name, 4, HALF) for name in expected} == expected
    assert question.outcome(MAIN, 4, len(GRID) - 1) == 1.0
    assert [question.outcome("oracle", num, HALF) for num in (1, 2, 3)] == [1 / 4, 1 / 2, 3 / 4]


def test_votes_are_weighted_by_the_exponential_of_the_reward(tmp_path: Path) -> None:
    """Rewards -1 for a 3, and -1.5 twice for a 7: 0.37 against 2 * 0.22.

    At a low temperature only the best one counts.
    """
    record = line(1, 7, [3, 7, 7], [-1.0, -1.5, -1.5], [-1.0, -1.5, -1.5])
    assert questions_of(tmp_path, [record] * 2)[0].outcome("reverse-weighted majority", 3, HALF) == 1.0
    sharp = questions_of(tmp_path, [record] * 2, temperature=0.1)[0]
    assert sharp.outcome("reverse-weighted majority", 3, HALF) == 0.0
    assert sharp.outcome("majority vote", 3, HALF) == 1.0


def test_an_answer_that_cannot_be_read_has_no_vote_and_is_wrong(tmp_path: Path) -> None:
    record = line(1, 7, [3, 3, 7], [-1.0] * 3, [-1.0] * 3)
    record["candidates"] = ["none", "none at all", "7"]
    (question, _) = questions_of(tmp_path, [record, record])
    assert question.outcome("majority vote", 3, HALF) == 1.0
    assert question.outcome("random of N", 3, HALF) == pytest.approx(1 / 3)
    assert question.outcome("majority vote", 2, HALF) == pytest.approx(2 / 3)  # two of three pairs contain the 7


def random_lines(num: int, seed: int, reverse_knows: bool) -> list[dict[str, Any]]:
    """Return questions with 8 candidates, a third of them right.

    reverse_knows: right ones get a higher reverse likelihood.
    """
    rng = random.Random(seed)
    lines = []
    for number in range(num):
        answers = [7 if rng.random() < 0.33 else rng.randint(10, 30) for _ in range(8)]
        reverse = [rng.gauss(2.0 if reverse_knows and answer == 7 else 0.0, 1.0) - 30 for answer in answers]
        lines.append(line(number, 7, answers, [rng.gauss(-30, 1) for _ in answers], reverse, greedy=f"{rng.choice([7, 8])}"))
    return lines


def test_lambda_is_never_chosen_on_the_question_it_is_used_for(tmp_path: Path) -> None:
    """Inverting the outcome of one question changes no lambda of its own fold, but one of another fold."""
    lines = random_lines(6, 4, reverse_knows=False)
    before = chosen_weights(questions_of(tmp_path, lines), 8, 3, seed=0)
    folds = np.random.default_rng(0).permutation(6) % 3
    changed = False
    for number, record in enumerate(lines):
        others = [{**r, "gold": f"{r['candidates'][0][6:-1]}"} if n == number else r for n, r in enumerate(lines)]
        after = chosen_weights(questions_of(tmp_path, others), 8, 3, seed=0)
        own = folds == folds[number]
        assert (after[own] == before[own]).all(), record
        changed = changed or bool((after != before).any())
    assert changed


def settings(**changed: Any) -> ReportSettings:
    return ReportSettings(**{"gold_key": "gold", "reward": RewardSettings(), "num_resamples": 2000, **changed})


def test_a_reverse_model_that_knows_is_significantly_better_and_one_that_does_not_is_not(tmp_path: Path) -> None:
    pytest.importorskip("scipy")
    for knows in (True, False):
        runs = [questions_of(tmp_path, random_lines(120, seed, knows)) for seed in (1, 2)]
        report = compare(runs, settings())
        by_name = {row["against"]: row for row in report["comparisons"]}
        assert by_name["forward likelihood, sum"]["is_significant"] is knows
        assert by_name["random of N"]["is_significant"] is knows
        widened = 0
        for row in report["comparisons"]:
            low, high = row["interval"]
            wide_low, wide_high = row["simultaneous_interval"]
            assert wide_low <= low <= row["difference"] <= high <= wide_high
            widened += (high - low) < (wide_high - wide_low)
            assert row["is_significant"] == (wide_low > 0 or wide_high < 0)
        assert widened >= 4  # of 7; a method may be right on exactly the same questions
        accuracies = {name: found["accuracy"] for name, found in report["methods"].items()}
        assert accuracies["oracle"] >= max(accuracies.values())
        text = " ".join(sentences(report))
        assert ("significantly above forward likelihood, sum" in text) is knows
        assert "not significantly different" in text or knows
        assert report["over_n"]["oracle"][-1] == [8, accuracies["oracle"]]
        assert len(report["over_lambda"]) == len(GRID)
        assert len(report["methods"][MAIN]["by_seed"]) == 2


def test_equal_tokens_leave_the_methods_with_a_reverse_pass_fewer_candidates(tmp_path: Path) -> None:
    """A candidate takes 10 tokens to write and 10 + 20 to score: the tokens of 8 are enough to write and score two."""
    pytest.importorskip("scipy")
    runs = [questions_of(tmp_path, random_lines(20, 1, reverse_knows=True))]
    rows = {row["method"]: row for row in compare(runs, settings())["equal_tokens"]}
    assert (rows[MAIN]["num_candidates"], rows[MAIN]["tokens"]) == (2, 80.0)
    assert (rows["majority vote"]["num_candidates"], rows["majority vote"]["tokens"]) == (8, 80.0)
    assert rows["greedy"]["num_candidates"] == 1


def test_a_difference_at_equal_n_can_have_the_opposite_sign_at_equal_tokens(tmp_path: Path) -> None:
    """Five of eight candidates are right, and the reverse model recognizes one of them.

    It finds this one among eight. Of the 28 pairs, 7 contain it; the others are drawn from seven candidates, four of
    them right, so it is right in 1/4 + 3/4 * 4/7 = 19/28 of the pairs. The majority vote has eight candidates for the
    same tokens. Every tenth question is the opposite, and the second seed equals the first.
    """
    pytest.importorskip("scipy")
    usual = line(1, 7, [3, 3, 3, 7, 7, 7, 7, 7], [-1.0] * 8, [-9.0] * 7 + [-1.0], greedy="3")
    lines = [{**usual, "gold": "3"} if number % 10 == 0 else usual for number in range(40)]
    report = compare([questions_of(tmp_path, lines)] * 2, settings())
    lines_of_report = sentences(report)
    found = {}
    for budget in ("comparisons", "comparisons_at_equal_tokens"):
        found[budget] = {row["against"]: row for row in report[budget]}
        assert not {MAIN, "oracle", "beam by Reverse Reward"} & set(found[budget])
    assert found["comparisons"]["majority vote"]["difference"] == 0.0
    row = found["comparisons_at_equal_tokens"]["majority vote"]
    accuracies = {row["method"]: row["accuracy"] for row in report["equal_tokens"]}
    with_two = 0.9 * 19 / 28 + 0.1 * 9 / 28
    assert row["difference"] == pytest.approx(with_two - 0.9) == pytest.approx(accuracies[MAIN] - accuracies["majority vote"])
    assert row["is_significant"]
    (low, high), (wide_low, wide_high) = row["interval"], row["simultaneous_interval"]
    assert -1 <= wide_low <= low < row["difference"] < high <= wide_high < 0
    assert wide_high - wide_low > high - low
    assert any(
        one.startswith("At equal N, Reverse Reward is not significantly") and "majority vote: +0.0 points" in one
        for one in lines_of_report
    )
    assert "At equal tokens, Reverse Reward (2) is significantly below majority vote (8): -25.7 points" in " ".join(
        lines_of_report
    )
    assert "At equal tokens, Reverse Reward (2) is significantly above greedy (1): +54.3 points" in " ".join(lines_of_report)
    assert sum("not significantly different" in one for one in lines_of_report) == 2
    assert "Reverse Reward is right in 90.0 % with 8 candidate(s)" in verdict(report)
    assert "At equal tokens, 64.3 % with 2: significantly above 4 (greedy; random of N;" in verdict(report)
    assert verdict(report).endswith(" and below 1 (majority vote) of the 7 other methods.")


def test_a_report_notes_words_that_are_counted_as_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three of the 80 candidates have no number of tokens. Every form of the report notes it."""
    pytest.importorskip("scipy")
    lines = random_lines(10, 1, reverse_knows=True)
    assert compare([questions_of(tmp_path, lines)], settings())["notes"] == []
    for record in lines[:3]:
        record["scores"][0]["forward_tokens"] = None
    source, output = write(tmp_path / "x.jsonl", lines), tmp_path / "report"
    assert run_tool(monkeypatch, "report_rerank", str(source), "--output", str(output), "--gold-key", "gold") == 0
    (note,) = json.loads((output / "report.json").read_text())["notes"]
    assert "3 of 80 candidates have no forward_tokens" in note
    assert note in (output / "report.md").read_text()
    assert html.escape(note) in (output / "report.html").read_text()
    assert note in capsys.readouterr().out


def test_a_report_notes_that_one_scored_candidate_takes_more_tokens_than_the_vote(tmp_path: Path) -> None:
    """Writing two candidates takes 20 tokens, writing and scoring one takes 10 + 10 + 20."""
    pytest.importorskip("scipy")
    lines = [line(number, 7, [7, 3], [-1.0, -2.0], [-1.0, -2.0]) for number in range(4)]
    (note,) = compare([questions_of(tmp_path, lines)], settings(num_folds=2))["notes"]
    assert "spends 40 tokens a question at equal tokens, the majority vote 20" in note


def test_rounding_of_means_over_subsets_is_not_a_significant_difference(tmp_path: Path) -> None:
    """A vote and a choice with the same accuracy, computed by different sums."""
    pytest.importorskip("scipy")
    report = compare([questions_of(tmp_path, random_lines(20, 2, reverse_knows=True))], settings())
    rows = {row["against"]: row for row in report["comparisons_at_equal_tokens"]}
    assert (rows["reverse-weighted majority"]["difference"], rows["reverse-weighted majority"]["is_significant"]) == (
        0.0,
        False,
    )


def test_intervals_are_those_of_paired_differences(tmp_path: Path) -> None:
    """Two methods that are right on the same questions differ by exactly 0, however much each varies over questions."""
    pytest.importorskip("scipy")
    lines = random_lines(40, 3, reverse_knows=False)
    for record in lines:
        for score in record["scores"]:
            score["reverse_logprob"] = score["forward_logprob"]
    report = compare([questions_of(tmp_path, lines)], settings())
    row = next(row for row in report["comparisons"] if row["against"] == "forward likelihood, sum")
    assert (row["difference"], row["interval"], row["is_significant"]) == (0.0, [0.0, 0.0], False)
    low, high = report["methods"][MAIN]["interval"]
    assert low < report["methods"][MAIN]["accuracy"] < high


def test_effects_shared_by_all_questions_of_a_seed_are_in_the_intervals(tmp_path: Path) -> None:
    """One seed has every question right, the other none. The mean is the same for all questions, but uncertain."""
    pytest.importorskip("scipy")
    runs = [questions_of(tmp_path, [line(n, gold, [7], [-1.0], [-1.0]) for n in range(5)]) for gold in (7, 8)]
    report = compare(runs, settings())
    assert report["methods"]["majority vote"]["interval"] == [0.0, 1.0]
    assert report["methods"]["majority vote"]["by_seed"] == [1.0, 0.0]


@pytest.mark.parametrize(
    ("num_seeds", "expected"), [(1, "do not include the spread between seeds"), (2, "bootstrap over seeds and questions")]
)
def test_a_report_describes_its_intervals(num_seeds: int, expected: str, tmp_path: Path) -> None:
    pytest.importorskip("scipy")
    files = [write(tmp_path / f"{seed}.jsonl", random_lines(5, seed, reverse_knows=True)) for seed in range(num_seeds)]
    report_selection(files, tmp_path / "report", settings(num_resamples=10))
    assert expected in (tmp_path / "report/report.md").read_text()


def test_lambda_is_chosen_for_the_given_number_of_candidates(tmp_path: Path) -> None:
    """Forward ranks one 7 first and the other last. Reverse ranks both after a 5 and before the 3s.

    Of all five, forward chooses a 7 and reverse the 5. Of ten pairs, forward is right in the four with its first 7,
    reverse in the five with a 7 and without the 5.
    """
    known = line(1, 7, [3, 3, 7, 7, 5], [-1.002, -1.003, -1.001, -1.005, -1.004], [-50.0, -60.0, -30.0, -20.0, -10.0])
    questions = questions_of(tmp_path, [known, known])
    by_lambda = [[questions[0].outcome(MAIN, num, weight) for weight in (0, 1, 20)] for num in (1, 2, 5)]
    assert np.allclose(by_lambda, [[0.4, 0.4, 0.4], [0.4, 0.5, 0.5], [1.0, 0.0, 0.0]])
    for num, expected in ((1, 0.4), (2, 0.5), (5, 1.0), (None, 1.0)):
        assert np.allclose(outcomes_of(MAIN, [questions], settings(), [questions], num), expected)
    for num in (0, 6):
        with pytest.raises(UsageError, match=f"{num} candidates requested, but the questions have 5; give 1 to 5"):
            outcomes_of(MAIN, [questions], settings(), [questions], num)


def test_equal_tokens_give_whole_candidates() -> None:
    """At least one candidate, at most all sampled ones. 0.3 is three times 0.1, despite rounding."""
    assert [affordable_num(tokens, 26, 8) for tokens in (10, 51, 52, 79, 1000)] == [1, 1, 2, 3, 8]
    assert affordable_num(0.3, 0.1, 8) == 3


def test_answers_are_read_and_compared() -> None:
    number = answers_by("number")
    assert number.read("7 apples and 1,200.50 pears") == number.read("#### 1200.5 is it, not 3")
    assert number.read("none") is None
    assert (number.read("10-3"), number.read("it is -3.")) == (None, -3)
    assert classes_of(["3", "x", "3.0", "4"], number) == [0, None, 0, 1]
    assert answers_by("text").read("  ") is None
    with pytest.raises(UsageError, match="number, text, math"):
        answers_by("numbers")


def test_math_answers_are_those_of_math_verify() -> None:
    pytest.importorskip("math_verify")
    answers = answers_by("math")
    half, same, other = (answers.read(text) for text in (r"so it is $\frac{1}{2}$", r"\boxed{0.5}", "$0.6$"))
    assert answers.is_same(half, same)
    assert not answers.is_same(half, other)


def test_the_tool_writes_three_reports_that_agree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("scipy")
    files = [str(write(tmp_path / f"{seed}.jsonl", random_lines(30, seed, reverse_knows=True))) for seed in (1, 2)]
    beam = write(tmp_path / "beam.jsonl", random_lines(30, 5, reverse_knows=True))
    output = tmp_path / "report"
    options = ["--output", str(output), "--gold-key", "gold", "--beam", str(beam)]
    assert run_tool(monkeypatch, "report_rerank", *files, *options) == 0
    report = json.loads((output / "report.json").read_text())
    markdown, page = ((output / name).read_text() for name in ("report.md", "report.html"))
    assert "beam by Reverse Reward" in report["methods"]
    assert {sentence.split(",")[0] for sentence in sentences(report)} == {"At equal N", "At equal tokens"}
    for sentence in sentences(report):
        assert sentence in markdown
        assert sentence in page
    assert f"{100 * report['methods'][MAIN]['accuracy']:.1f}" in markdown
    assert page.count("data:image/png;base64,") == 4
    assert "http://" not in page
    assert "https://" not in page
    printed = capsys.readouterr().out
    assert sentences(report)[0] in printed
    assert printed.startswith(verdict(report))
    assert markdown.splitlines()[2] == f"**{verdict(report)}**"
    assert page.count("<caption>") == 2
    assert '<td class="words">highest log P_R(x|y)</td>' in page


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ([], 2, "needs --gold-key"),
        (["--gold-key", "answer"], 1, "x.jsonl:1: has no field 'answer'"),
        (["--gold-key", "gold", "--folds", "1"], 2, "--folds 1 must be 2 to 4"),
        (["--gold-key", "gold", "--beam", "missing"], 2, "missing is not a file"),
        (["--explain", "1"], 2, "--explain needs --reverse"),
        (["--explain", "9", "--reverse", "none"], 2, "has lines 1 to 4"),
    ],
)
def test_impossible_reports_are_refused_with_a_message(
    options: list[str],
    code: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = write(tmp_path / "x.jsonl", random_lines(4, 1, reverse_knows=True))
    assert run_tool(monkeypatch, "report_rerank", str(source), "--output", str(tmp_path / "report"), *options) == code
    assert message in capsys.readouterr().err


def test_runs_of_different_prompts_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = random_lines(4, 1, reverse_knows=True)
    files = [str(write(tmp_path / "a.jsonl", lines)), str(write(tmp_path / "b.jsonl", list(reversed(lines))))]
    assert run_tool(monkeypatch, "report_rerank", *files, "--output", str(tmp_path / "r"), "--gold-key", "gold") == 1
    with pytest.raises(DataError, match="at least 2"):
        questions_of(tmp_path, lines[:1])


def test_steps_together_are_the_answer() -> None:
    delimiter = StepDelimiter()
    for answer in ("a\nb\n\nc", "a\nb\n \n", "\n\na", "", " ", "one"):
        assert "".join(delimiter.steps_of(answer)) == answer
    assert delimiter.steps_of("a\nb\n \n") == ["a\n", "b\n \n"]


BREAKS = "a\u2028b\u2029c\u0085d"
"""Characters that are line breaks for str.splitlines and ordinary characters in JSON."""


def test_texts_with_unicode_line_breaks_are_compared(tmp_path: Path) -> None:
    lines = [{**line(n, 7, [7, 3], [-1.0, -2.0], [-1.0, -2.0]), "prompt": f"{n} {BREAKS}"} for n in (1, 2)]
    path = tmp_path / "x.jsonl"
    path.write_bytes("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in lines).encode())
    found = load_questions(path, "gold", answers_by("number"), RewardSettings(), beam=path)
    assert [question.prompt for question in found] == [f"1 {BREAKS}", f"2 {BREAKS}"]


def test_a_choice_with_unicode_line_breaks_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = random_model_folder(tmp_path / "reverse", "byte_level", "reverse")
    texts = [f"{BREAKS}1", f"{BREAKS}2"]
    records = [{"prompt": text, "candidates": [text], "scores": [{"reward": -2.0}], "ranking": [0]} for text in texts]
    source = tmp_path / "x.jsonl"
    source.write_bytes("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode())
    arguments = [str(source), "--output", str(tmp_path / "why"), "--explain", "2", "--reverse", str(folder)]
    assert run_tool(monkeypatch, "report_rerank", *arguments) == 0
    assert "d2" in capsys.readouterr().out


@pytest.mark.parametrize("options", [["--gold-key", "gold"], ["--explain", "1", "--reverse", "none"]])
def test_a_line_that_is_cut_is_named(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "x.jsonl", random_lines(2, 1, reverse_knows=True))
    source.write_bytes(source.read_bytes()[:-9])
    assert run_tool(monkeypatch, "report_rerank", str(source), "--output", str(tmp_path / "report"), *options) == 1
    assert "x.jsonl:2: not a line of JSON" in capsys.readouterr().err


def test_a_choice_is_explained_by_the_likelihood_of_the_question_after_each_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = random_model_folder(tmp_path / "reverse", "byte_level", "reverse")
    reverse = ReverseLM.from_pretrained(folder, device="cpu")
    answers = ["The cat\nsat <b>\n", "", "\x1b[31mParis"]
    found = explain(TransformersEngine(reverse), "Who? ", answers, [-2.0, None, -1.0], [2, 0, 1], StepDelimiter())
    assert [[step.text for step in steps] for steps in found.candidates] == [["\x1b[31mParis"], ["The cat\n", "sat <b>\n"], []]
    values = [step.reverse_logprob for step in found.candidates[1]]
    assert values == pytest.approx(
        [reverse.log_likelihood("Who? ", text).logprob for text in ("The cat\n", answers[0])], abs=1e-4
    )
    every = [step.reverse_logprob for steps in found.candidates for step in steps]
    assert found.shade(max(every)) != found.shade(min(every))
    assert "<b>" not in as_html(found)
    assert "\ufffd[31mParis" in as_terminal(found)
    record = {"prompt": "Who? ", "candidates": answers[:1], "scores": [{"reward": -2.0}], "ranking": [0]}
    source = write(tmp_path / "x.jsonl", [record])
    arguments = [str(source), "--output", str(tmp_path / "why"), "--explain", "1", "--reverse", str(folder)]
    assert run_tool(monkeypatch, "report_rerank", *arguments) == 0
    assert f"{values[1]:.2f}" in capsys.readouterr().out
    assert f"{values[1]:.2f}" in (tmp_path / "why/explain_1.html").read_text()

"""The report of a comparison of methods that choose answers: accuracies with intervals, and sentences on significant differences."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ledom.errors import DataError, UsageError
from megatron_ledom.evaluation.grading.answers import answers_by
from megatron_ledom.evaluation.intervals import Values, crossed_interval
from megatron_ledom.evaluation.selection_methods import (
    GRID,
    METHODS,
    MOST_SUBSETS,
    WITH_REVERSE,
    Question,
    best_weight,
    chosen_weights,
    load_seeds,
)
from megatron_ledom.inference.reverse_reward.ranked_lines import check_distinct
from megatron_ledom.inference.reverse_reward.reward import RewardSettings
from megatron_ledom.reports import pages
from megatron_ledom.reports.pages import bullets, interval, paragraph
from megatron_ledom.storage.files import json_text, write_file
from megatron_ledom.tables import markdown_table

MAIN = "Reverse Reward"
LEVEL = 0.95
Report = dict[str, Any]
Seeds = Sequence[Sequence[Question]]
"""The same questions with the candidates of each seed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportSettings:
    """Settings of a comparison.

    reward: its weight is not used, because lambda is chosen on held-out questions. ranked_at: the weight at which each file was
    ranked, None if it is not recorded; a note compares it with the chosen lambda.
    """

    gold_key: str
    answers: str = "number"
    reward: RewardSettings
    num_folds: int = 5
    num_resamples: int = 10_000
    seed: int = 0
    ranked_at: tuple[float | None, ...] = ()


def report_selection(
    runs: Sequence[str | Path], output: str | Path, settings: ReportSettings, *, beam: str | Path | None = None
) -> Report:
    """Compare the methods over reranked files, one for each sampling seed; write report.json, report.md and report.html.

    All files, and `beam`, the output of a beam search, if passed, must have the same prompts in the same order.
    """
    answers = answers_by(settings.answers)
    check_distinct(runs)
    seeds, skipped = load_seeds(runs, settings.gold_key, answers, settings.reward, beam)
    report = compare(seeds, settings)
    report["notes"] = [*skipped, *report["notes"]]
    if any(weight is not None for weight in settings.ranked_at):
        report["notes"].insert(0, weight_note(report, settings.ranked_at))
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    path = output / "report.json"
    write_file(path, json_text(report, where=path, indent=1, ensure_ascii=True))
    write_file(output / "report.md", _markdown(report))
    write_file(output / "report.html", _html(report))
    return report


def compare(seeds: Seeds, settings: ReportSettings, development: Seeds | None = None) -> Report:
    """Return accuracies, paired differences from Reverse Reward with intervals at equal N and at equal tokens, and the curves.

    development: other questions for each seed, on which its lambda is chosen; without them lambda is cross-fitted.
    """
    num = num_candidates(seeds)
    weights = _weights(seeds, num, settings, development)
    outcomes = {name: _outcomes(seeds, name, num, weights) for name in METHODS}
    known = {name: values for name, values in outcomes.items() if values is not None}
    equal_tokens, at_equal_tokens = _equal_tokens(seeds, num, settings, development)
    return {
        "num_questions": len(seeds[0]),
        "num_candidates": num,
        "num_seeds": len(seeds),
        "answers": settings.answers,
        "notes": _notes(seeds, equal_tokens),
        "held_out": {
            "num_folds": None if development is not None else settings.num_folds,
            "lambdas": [[GRID[w] for w in np.unique(row)] for row in weights],
        },
        "methods": {name: _summary(values, settings) for name, values in known.items()},
        "comparisons": _comparisons(known, settings),
        "equal_tokens": equal_tokens,
        "comparisons_at_equal_tokens": _comparisons(at_equal_tokens, settings),
        "over_n": _over_n(seeds, list(known), num, settings, development),
        "over_lambda": [
            [weight, _mean(_outcomes(seeds, MAIN, num, np.full_like(weights, index)))] for index, weight in enumerate(GRID)
        ],
    }


def _notes(seeds: Seeds, equal_tokens: list[Report]) -> list[str]:
    """Return notes on properties of these files that affect the results."""
    every = [question for questions in seeds for question in questions]
    sizes = sorted({len(question.is_right) for question in every})
    notes = [] if len(sizes) == 1 else [_about_uneven(every, sizes)]
    without = sum(question.greedy is None for question in every)
    if 0 < without < len(every):
        notes.append(f"Note: {without} of {len(every)} lines have no greedy answer, so greedy is not compared.")
    total = sum(len(question.is_right) for question in every)
    num_skipped = sum(int(question.is_skipped.sum()) for question in every)
    if num_skipped:
        notes.append(
            f"Note: {num_skipped} of {total} candidates were skipped and have no scores, so no method with scores chooses them. Greedy"
            " answers, majority vote, random of N and oracle do not depend on scores."
        )
    unjudged = sum(int((np.isneginf(question.reverse) & ~question.is_skipped).sum()) for question in every)
    if unjudged:
        notes.append(
            f"Note: {unjudged} of {total} candidates have no reverse score above -inf; the reverse score ranks them last, in any order."
        )
    by_words = sum(question.num_by_words for question in every)
    if by_words:
        notes.append(
            f"Note: {by_words} of {total} candidates have no forward_tokens. Their words are counted instead of tokens: 'forward"
            " likelihood, mean' divides by the number of words, and it is the cost of writing at equal tokens."
        )
    tokens = {row["method"]: row["tokens"] for row in equal_tokens}
    if tokens[MAIN] > tokens["majority vote"]:
        notes.append(
            f"Note: the tokens of the other methods do not suffice to write and judge one candidate: {MAIN} spends"
            f" {tokens[MAIN]:.0f} tokens a question at equal tokens, the majority vote {tokens['majority vote']:.0f}."
        )
    return notes


def weight_note(report: dict[str, Any], ranked_at: Sequence[float | None]) -> str:
    """Return a note with the accuracy at the weights of the files, and the accuracy at the lambda chosen on held-out questions.

    ranked_at: the weight of each file, None if it is not recorded; at least one is recorded.
    """
    chosen = sorted({value for row in report["held_out"]["lambdas"] for value in row})
    held_out = f"{', '.join(f'{value:.2f}' for value in chosen)} ({100 * report['methods'][MAIN]['accuracy']:.1f} % right)"
    weights = sorted({weight for weight in ranked_at if weight is not None})
    own = ", ".join(_at(weight, report["over_lambda"]) for weight in weights)
    return (
        f"Note: The files were ranked at weight {own}; {MAIN} in this report uses the lambda chosen on held-out questions,"
        f" {held_out}. To use that lambda, rank again with --weight."
    )


def _at(weight: float, over_lambda: list[list[float]]) -> str:
    nearest, accuracy = min(over_lambda, key=lambda point: abs(point[0] - weight))
    said = "" if abs(nearest - weight) < 1e-9 else f" at {nearest:.2f}, the nearest that was tried"
    return f"{weight:g} ({100 * accuracy:.1f} % right{said})"


def _about_uneven(questions: Sequence[Question], sizes: list[int]) -> str:
    more = sum(len(question.is_right) > sizes[0] for question in questions)
    return (
        f"Note: the questions have {sizes[0]} to {sizes[-1]} candidates. N is the smallest number, {sizes[0]}. For the {more} lines with"
        f" more, every method gets {sizes[0]} of them, and its accuracy is the mean over all choices."
    )


def outcomes_of(
    method: str, seeds: Seeds, settings: ReportSettings, development: Seeds | None = None, num: int | None = None
) -> Values:
    """Return the outcomes [seeds, questions], 0 to 1, of one of METHODS with `num` candidates (None: all).

    Raises DataError if a question lacks the data that the method needs, UsageError if a question has fewer candidates.
    """
    most = num_candidates(seeds)
    num = most if num is None else num
    if not 1 <= num <= most:
        raise UsageError(f"{num} candidates requested, but the questions have {most}; give 1 to {most}")
    outcomes = _outcomes(seeds, method, num, _weights(seeds, num, settings, development))
    if outcomes is None:
        raise DataError(f"the files lack the data that {method!r} needs for every question; create them again with it")
    return outcomes


def num_candidates(seeds: Seeds) -> int:
    """Return the smallest number of candidates of any question."""
    return min(len(question.is_right) for questions in seeds for question in questions)


def candidate_tokens(seeds: Seeds) -> tuple[float, float]:
    """Return the mean cost of a candidate in tokens: to write it, and to score it with the reverse model."""
    every = [question for questions in seeds for question in questions]
    return float(np.mean([q.sample_tokens for q in every])), float(np.mean([q.reverse_tokens for q in every]))


def affordable_num(tokens: float, candidate: float, most: int) -> int:
    """Return the number of candidates, of `candidate` tokens each, for `tokens`: at most `most`, and 1 even if it costs more."""
    return max(1, min(most, int(tokens / candidate * (1 + 1e-12))))  # the factor corrects rounding of the means


def _weights(seeds: Seeds, num: int, settings: ReportSettings, development: Seeds | None = None) -> Any:
    """Return the chosen lambdas as indices of GRID [seeds, questions]; without `development`, each seed has its own folds."""
    if development is not None:
        rows = zip(seeds, development, strict=True)
        return np.array([np.full(len(questions), best_weight(other, num)) for questions, other in rows])
    return np.array([chosen_weights(qs, num, settings.num_folds, settings.seed + i) for i, qs in enumerate(seeds)])


def _outcomes(seeds: Seeds, method: str, num: int, weights: Any) -> Values | None:
    """Return the outcomes [seeds, questions]; None if a question lacks the data that the method needs."""
    rows = [
        [question.outcome(method, num, int(weight)) for question, weight in zip(questions, own, strict=True)]
        for questions, own in zip(seeds, weights, strict=True)
    ]
    return None if any(value is None for row in rows for value in row) else np.array(rows, dtype=np.float64)


def _mean(outcomes: Values | None) -> float:
    return float("nan") if outcomes is None else float(outcomes.mean())


def _summary(outcomes: Values, settings: ReportSettings) -> Report:
    return {
        "accuracy": float(outcomes.mean()),
        "interval": interval_of(outcomes, LEVEL, settings),
        "by_seed": outcomes.mean(axis=1).tolist(),
    }


def _comparisons(outcomes: dict[str, Values], settings: ReportSettings) -> list[Report]:
    """Compare Reverse Reward with each other method at one budget, question by question.

    A difference is significant if 0 is outside an interval that is widened for the number of comparisons (Bonferroni). So at
    least one of them is wrong in at most about 5 of 100 cases; in more with two seeds that differ much (`crossed_interval`).
    """
    others = [name for name in outcomes if name not in (MAIN, "oracle")]
    found = []
    for name in others:
        difference = np.round(outcomes[MAIN] - outcomes[name], 12) + 0.0  # rounding of means is not a difference
        low, high = interval_of(difference, 1 - (1 - LEVEL) / len(others), settings)
        found.append(
            {
                "against": name,
                "difference": float(difference.mean()),
                "interval": interval_of(difference, LEVEL, settings),
                "simultaneous_interval": [low, high],
                "is_significant": bool(low > 0 or high < 0),
            }
        )
    return found


def interval_of(outcomes: Values, level: float, settings: ReportSettings) -> list[float]:
    """Return the bootstrap interval of the mean of values [seeds, questions], over both; with one seed, over questions only."""
    return crossed_interval(outcomes, level=level, num_resamples=settings.num_resamples, seed=settings.seed)


def _equal_tokens(
    seeds: Seeds, num: int, settings: ReportSettings, development: Seeds | None
) -> tuple[list[Report], dict[str, Values]]:
    """Return the accuracy of each method, if each may use the tokens of sampling `num` candidates, and the outcomes.

    Methods with a reverse pass get fewer candidates. A token that is read costs as much as one that is written; in practice
    reading is cheaper, so this underestimates Reverse Reward.
    """
    sample, judge = candidate_tokens(seeds)
    fewer = affordable_num(num * sample, sample + judge, num)
    weights = {size: _weights(seeds, size, settings, development) for size in (1, fewer, num)}
    rows, known = [], {}
    for name in METHODS:
        affordable = 1 if name == "greedy" else fewer if name in WITH_REVERSE else num
        outcomes = _outcomes(seeds, name, affordable, weights[affordable])
        if outcomes is not None and name != "beam by Reverse Reward":
            known[name] = outcomes
            tokens = affordable * (sample + (judge if name in WITH_REVERSE else 0.0))
            row = {"method": name, "num_candidates": affordable, "tokens": tokens, "accuracy": float(outcomes.mean())}
            rows.append({**row, "interval": interval_of(outcomes, LEVEL, settings)})
    return rows, known


def _over_n(seeds: Seeds, names: list[str], num: int, settings: ReportSettings, development: Seeds | None) -> Report:
    sizes = sorted({2**power for power in range(num.bit_length()) if 2**power <= num} | {num})
    curves: dict[str, list[list[float]]] = {name: [] for name in names}
    for size in sizes:
        weights = _weights(seeds, size, settings, development)
        for name in names:
            curves[name].append([size, _mean(_outcomes(seeds, name, size, weights))])
    return curves


def verdict(report: Report) -> str:
    """Return one line: the accuracy of Reverse Reward, and the methods that it is significantly above and below."""
    main = report["methods"][MAIN]["accuracy"]
    at_equal_tokens = next(row for row in report["equal_tokens"] if row["method"] == MAIN)
    return (
        f"{MAIN} is right in {100 * main:.1f} % with {report['num_candidates']} candidate(s): {_sides(report['comparisons'])}."
        f" At equal tokens, {100 * at_equal_tokens['accuracy']:.1f} % with {at_equal_tokens['num_candidates']}:"
        f" {_sides(report['comparisons_at_equal_tokens'])}."
    )


def _sides(rows: list[Report]) -> str:
    found = []
    for side, sign in (("above", 1), ("below", -1)):
        names = [row["against"] for row in rows if row["is_significant"] and sign * row["difference"] > 0]
        found.append(f"{side} {len(names) or 'none'}" + (f" ({'; '.join(names)})" if names else ""))
    return f"significantly {' and '.join(found)} of the {len(rows)} other methods"


def sentences(report: Report) -> list[str]:
    """Return a sentence for each significant comparison and one for the others, at equal N and then at equal tokens."""
    candidates = {row["method"]: f" ({row['num_candidates']})" for row in report["equal_tokens"]}
    return [
        *_budget_sentences("At equal N", report["comparisons"], {}),
        *_budget_sentences("At equal tokens", report["comparisons_at_equal_tokens"], candidates),
    ]


def _budget_sentences(budget: str, rows: list[Report], candidates: dict[str, str]) -> list[str]:
    """Return the sentences for one budget; candidates: for each method the number of candidates, as text to follow its name."""
    start = f"{budget}, {MAIN}{candidates.get(MAIN, '')} is"
    significant, others = [], []
    for row in rows:
        found = (
            f"{row['against']}{candidates.get(row['against'], '')}: {100 * row['difference']:+.1f} points"
            f" (simultaneous interval {interval(row['simultaneous_interval'], '+.1f', 100)})"
        )
        if row["is_significant"]:
            significant.append(f"{start} significantly {'above' if row['difference'] > 0 else 'below'} {found}.")
        else:
            others.append(found)
    return significant + ([f"{start} not significantly different from {'; '.join(others)}."] if others else [])


def _tables(report: Report) -> list[tuple[str, list[list[str]]]]:
    """Return two tables, each a caption and rows of texts: the methods at equal N, and at equal tokens."""
    rows = [["method", "how it chooses", "accuracy", "95 % interval", "each seed"]]
    for name, found in report["methods"].items():
        seeds = " ".join(f"{100 * value:.1f}" for value in found["by_seed"])
        between = interval(found["interval"], ".1f", 100)
        rows.append([name, METHODS[name], f"{100 * found['accuracy']:.1f}", between, seeds])
    equal = [["method", "candidates", "tokens a question", "accuracy"]]
    for row in report["equal_tokens"]:
        equal.append([row["method"], str(row["num_candidates"]), f"{row['tokens']:.0f}", f"{100 * row['accuracy']:.1f}"])
    return [
        (f"Right answers in % at equal N: every method has {report['num_candidates']} candidates", rows),
        (
            f"Right answers in % at equal tokens: each method uses the tokens of writing {report['num_candidates']} candidates",
            equal,
        ),
    ]


def _about(report: Report) -> str:
    lambdas = "; ".join(", ".join(f"{value:.2f}" for value in row) for row in report["held_out"]["lambdas"])
    folds = report["held_out"]["num_folds"]
    where = f"the other of {folds} folds, never on the question it judges" if folds else "a development part of other questions"
    return (
        f"{report['num_questions']} questions, {report['num_candidates']} candidates each, {report['num_seeds']} sampling seed(s),"
        f" answers compared by {report['answers']}. lambda is chosen on {where} (chosen, by seed: {lambdas})."
        f" Intervals: {_about_intervals(report['num_seeds'])}; simultaneous over the comparisons at equal N, and over those at equal"
        " tokens."
        " With fewer candidates than there are, accuracies are means over all choices of so many candidates (for votes, over at most"
        f" {MOST_SUBSETS} random choices), because candidates may be in any order; tied answers share the credit."
        " In sentences on equal tokens the number of candidates is in brackets."
    )


def _about_intervals(num_seeds: int) -> str:
    if num_seeds == 1:
        return "bootstrap over questions, paired (with one seed, so they do not include the spread between seeds)"
    few = "; with so few, the intervals underestimate the spread between seeds" if num_seeds < 5 else ""
    return f"bootstrap over seeds and questions, paired (each resample draws both{few})"


def _markdown(report: Report) -> str:
    parts = ["# Choosing answers by Reverse Reward", f"**{verdict(report)}**", *report["notes"]]
    for caption, rows in _tables(report):
        parts += [f"{caption}:", markdown_table(rows)]
    parts += ["\n".join(f"- {sentence}" for sentence in sentences(report)), _about(report)]
    return "\n\n".join(parts) + "\n"


def _html(report: Report) -> str:
    body = [paragraph(verdict(report), is_strong=True), *map(paragraph, report["notes"])]
    body += [pages.table(rows, caption) for caption, rows in _tables(report)]
    body += [bullets(sentences(report)), *plots_of(report), paragraph(_about(report))]
    return pages.page("Choosing answers by Reverse Reward", body)


def plots_of(report: Report) -> list[str]:
    """Return the plots of accuracy over N and over lambda, as HTML."""
    return [
        pages.figure("accuracy over N", partial(_draw_over_n, report)),
        pages.figure("accuracy over lambda", partial(_draw_over_lambda, report)),
    ]


def _draw_over_n(report: Report, theme: str) -> bytes:
    """Draw the accuracy of each method over the number of candidates."""

    def _fill(axes: Any) -> None:
        for (name, points), colour in zip(report["over_n"].items(), pages.COLOURS[theme] * 2, strict=False):
            axes.plot([n for n, _ in points], [100 * y for _, y in points], label=name, color=colour, marker="o", ms=3, lw=1.4)
        sizes = [n for n, _ in next(iter(report["over_n"].values()))]
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, labels=[str(size) for size in sizes])
        axes.set(
            xlabel="candidates N", ylabel="right answers (%)", title="Accuracy over N, mean over all choices of N candidates"
        )

    return pages.draw_png(theme, (8.5, 4.8), _fill)


def _draw_over_lambda(report: Report, theme: str) -> bytes:
    """Draw the accuracy of Reverse Reward over lambda."""

    def _fill(axes: Any) -> None:
        points = report["over_lambda"]
        axes.plot(
            [x for x, _ in points], [100 * y for _, y in points], color=pages.COLOURS[theme][0], marker="o", ms=3, label=MAIN
        )
        majority = 100 * report["methods"]["majority vote"]["accuracy"]
        axes.axhline(majority, color=pages.COLOURS[theme][1], ls="--", lw=1.2, label="majority vote")
        title = "Accuracy over lambda, all questions (shown, not used to choose)"
        axes.set(xlabel="lambda: 0 forward only, 1 reverse only", ylabel="right answers (%)", title=title)

    return pages.draw_png(theme, (8.5, 3.8), _fill)

"""The comparison of the controls: lambda and N chosen on development questions, outcomes on test questions, and tests of differences.

The score of an answer is F1 + lambda * X: log P_F1(answer | question) plus lambda times the value of a scorer. Accuracies with N of the
sampled answers are means over all subsets of N.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from lines import read_lines

from megatron_ledom.evaluation.grading.answers import answers_by, classes_of, is_right
from megatron_ledom.evaluation.intervals import LEVEL, Values, crossed_interval, crossed_p_value, holm, p_over_seeds, t_interval
from megatron_ledom.evaluation.selection_methods import Marks, share_by_score, share_by_vote, share_with_any

FIRST = "F1"
SCORERS = ("R", "F2", "S", "PMI", "PMI, P(y) of S", "verifier")
"""The values X that are added to F1."""
GRID = (0.0, *(2.0**power for power in range(-6, 7)), math.inf)
"""The values of lambda; at infinity the scorer chooses alone."""
NUM_RESAMPLES = 20_000
MARGIN = 0.03
"""Differences of accuracy below this count as none, if the 90 % interval excludes larger ones (two one-sided tests at 5 %)."""
Choice = tuple[int, int]
"""The index of lambda in GRID, and N."""


@dataclass(frozen=True, slots=True)
class Answers:
    """The answers to one question. values: by scorer [C], -inf for an empty answer; is_right [C]; classes [C], -1 without a number."""

    values: Mapping[str, Values]
    is_right: Marks
    classes: Any
    greedy: bool

    def outcome(self, scorer: str, weight: int, num: int) -> float:
        """Return the accuracy of F1 + lambda * X with `num` answers, the mean over all subsets. weight: an index of GRID."""
        return share_by_score(combined(self.values[FIRST], self.values[scorer], GRID[weight]), self.is_right, num)


def combined(first: Values, other: Values, weight: float) -> Values:
    """Return first + weight * other; other alone for an infinite weight. -inf if one of them is."""
    if weight == 0:
        return first
    if math.isinf(weight):
        return other
    impossible = np.isneginf(first) | np.isneginf(other)
    return np.where(impossible, -np.inf, np.where(impossible, 0.0, first) + weight * np.where(impossible, 0.0, other))


def load_answers(path: Path, gold: Mapping[str, str]) -> list[Answers]:
    """Return the answers of a file of scores. gold: the right answers by prompt."""
    number, found = answers_by("number"), []
    for record in read_lines(path):
        texts, right = record["candidates"], gold[record["prompt"]]
        found.append(
            Answers(
                {name: values_of(record, name) for name in (FIRST, *SCORERS)},
                np.array([is_right(number, right, text) for text in texts]),
                np.array([-1 if one is None else one for one in classes_of(texts, number)]),
                is_right(number, right, record["greedy"]),
            )
        )
    return found


def values_of(record: Mapping[str, Any], scorer: str) -> Values:
    """Return the values of a scorer for the candidates of a record, -inf for an empty one."""
    return np.array([-np.inf if value is None else value for value in record["scores"][scorer]], dtype=np.float64)


def sizes(most: int) -> list[int]:
    """Return the numbers of answers from which N is chosen: powers of two, and `most`."""
    return sorted({2**power for power in range(most.bit_length()) if 2**power <= most} | {most})


def choose(questions: Sequence[Answers], scorer: str, num: int | None = None) -> Choice:
    """Return the lambda and N with the highest accuracy: of equal ones the smallest N, and of its lambdas the middle one.

    num: this N, if it is given. For F1 itself lambda is 0.
    """
    most = min(len(one.is_right) for one in questions)
    weights = [0] if scorer == FIRST else list(range(len(GRID)))
    best: tuple[float, Choice] = (-1.0, (0, 1))
    for size in sizes(most) if num is None else [num]:
        means = np.array([np.mean([one.outcome(scorer, weight, size) for one in questions]) for weight in weights])
        if means.max() > best[0] + 1e-12:
            equal = np.flatnonzero(means >= means.max() - 1e-12)
            best = (float(means.max()), (weights[int(equal[len(equal) // 2])], size))
    return best[1]


def outcomes(seeds: Sequence[Sequence[Answers]], scorer: str, choices: Sequence[Choice]) -> Values:
    """Return the outcomes [seeds, questions], 0 to 1, with the choice of each seed."""
    rows = zip(seeds, choices, strict=True)
    return np.array([[one.outcome(scorer, weight, num) for one in questions] for questions, (weight, num) in rows])


def baselines(seeds: Sequence[Sequence[Answers]]) -> dict[str, Values]:
    """Return the outcomes [seeds, questions] of methods without a scorer, with all answers."""
    methods = {
        "greedy": lambda one: float(one.greedy),
        "a random answer": lambda one: float(one.is_right.mean()),
        "majority vote": lambda one: share_by_vote(np.zeros(len(one.classes)), one.classes, one.is_right, len(one.classes)),
        "any answer (the limit)": lambda one: share_with_any(one.is_right, len(one.is_right)),
    }
    return {name: np.array([[method(one) for one in questions] for questions in seeds]) for name, method in methods.items()}


def summary(values: Values) -> dict[str, Any]:
    """Return the mean of values [seeds, questions] with its interval over seeds and questions."""
    found = crossed_interval(values, level=LEVEL, num_resamples=NUM_RESAMPLES, seed=0)
    return {"mean": float(values.mean()), "interval": found, "by_seed": values.mean(axis=1).tolist()}


def differences(pairs: Mapping[str, Values], center: float = 0.0) -> dict[str, dict[str, Any]]:
    """Return for a family of differences [seeds, questions] the mean, intervals, and p-values that Holm's method adjusted.

    center: the value of the hypotheses. narrow_interval: the 90 % interval, for equivalence.
    """
    rounded = {name: np.round(values - center, 12) + 0.0 for name, values in pairs.items()}
    p_values = [_p_value(values) for values in rounded.values()]
    found = {}
    for (name, values), p_value, adjusted in zip(rounded.items(), p_values, holm(p_values), strict=True):
        narrow = _narrow_interval(values)
        found[name] = {
            **summary(values),
            "narrow_interval": narrow,
            "p": p_value,
            "holm_p": adjusted,
            "is_significant": adjusted < 1 - LEVEL,
            "is_equivalent": narrow[0] > -MARGIN and narrow[1] < MARGIN,
        }
    return found


def _p_value(values: Values) -> float:
    """Return the p-value of a mean of 0: the largest of the bootstrap's, that of Student's t over seeds, and the least of a sign test."""
    least = 2 * 0.5 ** values.shape[1]
    return max(crossed_p_value(values, num_resamples=NUM_RESAMPLES, seed=0), p_over_seeds(values), least)


def _narrow_interval(values: Values) -> list[float]:
    """Return the 90 % interval of the mean: the bootstrap's, extended to Student's over the seeds, as the p-values are."""
    level = 2 * LEVEL - 1
    low, high = crossed_interval(values, level=level, num_resamples=NUM_RESAMPLES, seed=0)
    if len(values) > 1:
        of_seeds = t_interval(values.mean(axis=1).tolist(), level=level)
        low, high = min(low, of_seeds[0]), max(high, of_seeds[1])
    return [low, high]

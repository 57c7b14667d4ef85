"""Means over all subsets of k candidates: the formulas equal the count of every subset, and the order does not matter."""

import random
from collections.abc import Callable
from itertools import combinations

import numpy as np
import pytest

from megatron_ledom.evaluation import selection_methods as subsets
from megatron_ledom.evaluation.selection_methods import share_by_score, share_by_vote, share_with_any


def counted(total: int, num: int, value: Callable[[list[int]], float]) -> float:
    """Return the mean over every subset of `num`, one by one."""
    return float(np.mean([value(list(chosen)) for chosen in combinations(range(total), num)]))


def test_formulas_equal_the_count_of_every_subset_also_with_ties_and_impossible_candidates() -> None:
    rng = random.Random(1)
    for _ in range(40):
        total = rng.randint(1, 7)
        num = rng.randint(1, total)
        scores = np.array([rng.choice([-3.0, -2.0, -1.0, -np.inf]) for _ in range(total)])
        right = np.array([rng.random() < 0.4 for _ in range(total)])

        def best(chosen: list[int], scores: np.ndarray = scores, right: np.ndarray = right) -> float:
            return float(right[[i for i in chosen if scores[i] == scores[chosen].max()]].mean())

        assert share_by_score(scores, right, num) == pytest.approx(counted(total, num, best))
        assert share_with_any(right, num) == pytest.approx(counted(total, num, lambda chosen: float(right[chosen].any())))  # noqa: B023


def test_votes_are_counted_over_subsets_and_equal_answers_share() -> None:
    """Answers a a b, a is right. The pairs (a a), (a b), (a b) give 1, 1/2, 1/2."""
    right, classes = np.array([True, True, False]), np.array([0, 0, 1])
    assert share_by_vote(np.zeros(3), classes, right, 2) == pytest.approx(2 / 3)
    assert share_by_vote(np.zeros(3), classes, right, 3) == 1.0
    assert share_by_vote(np.zeros(3), np.array([-1, -1, -1]), right, 3) == 0.0
    far = np.array([0.0, -2000.0, -2001.0])  # weights are relative to the best of a subset, so that none underflows
    assert share_by_vote(far, classes, np.array([False, False, True]), 2) == 0.0


@pytest.mark.parametrize("num", [1, 3, 10, 20])
def test_the_order_of_candidates_does_not_change_the_formulas(num: int) -> None:
    """Given candidates may be sorted, so the first k could be better than a random k."""
    scores, right = -np.arange(20.0), np.arange(20) < 5
    order = np.random.default_rng(0).permutation(20)
    assert share_by_score(scores, right, num) == pytest.approx(share_by_score(scores[order], right[order], num))
    assert share_with_any(right, num) == share_with_any(right[order], num)


def test_drawn_subsets_are_the_same_each_time_and_near_the_mean_over_all(monkeypatch: pytest.MonkeyPatch) -> None:
    right, classes = np.arange(12) < 5, np.array([0] * 5 + [1, 2, 2, 3, 3, 3, 3])
    drawn = share_by_vote(np.zeros(12), classes, right, 6)
    assert drawn == share_by_vote(np.zeros(12), classes, right, 6)
    subsets._subsets.cache_clear()
    monkeypatch.setattr(subsets, "MOST_SUBSETS", 924)
    exact = share_by_vote(np.zeros(12), classes, right, 6)
    subsets._subsets.cache_clear()
    assert drawn != exact
    assert abs(drawn - exact) < 0.06

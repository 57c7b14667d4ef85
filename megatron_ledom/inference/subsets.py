"""How often a way to choose is right with k of C candidates, in the mean over all choices of k: no order of the candidates counts.

Exact by a formula for what a score chooses; votes are counted for each choice of k, or for some of them drawn with a fixed seed.
"""

import math
from functools import lru_cache
from itertools import combinations

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.float64]
Marks = npt.NDArray[np.bool_]
MOST_SUBSETS = 256
"""Choices of k whose votes are counted; where there are more, as many are drawn."""


def share_with_any(is_right: Marks, num: int) -> float:
    """Return the share of choices of `num` in which any is right: 1 - C(wrong, num) / C(all, num)."""
    wrong = int((~is_right).sum())
    return 1 - float(_shares_within(len(is_right), num)[wrong])


def share_by_score(scores: Values, is_right: Marks, num: int) -> float:
    """Return how often the best of `num` by score is right; of equally good ones each is chosen as often.

    With b candidates of a lower score and m of this one, the best has it in (C(b + m, num) - C(b, num)) / C(all, num) of all choices.
    """
    _, groups, sizes = np.unique(scores, return_inverse=True, return_counts=True)
    right = np.bincount(groups.reshape(-1), weights=is_right) / sizes
    up_to, within = np.cumsum(sizes), _shares_within(len(scores), num)
    return float(((within[up_to] - within[up_to - sizes]) * right).sum())


def share_by_vote(log_weights: Values, classes: npt.NDArray[np.int64], is_right: Marks, num: int) -> float:
    """Return how often the class with the most weight among `num` is right; equal classes share. Class -1 has no vote."""
    members = classes[:, None] == np.unique(classes[classes >= 0])[None, :]
    if members.shape[1] == 0:
        return 0.0
    subsets = _subsets(len(classes), num)
    inside = np.where(subsets, log_weights, -np.inf)
    votes = np.exp(inside - np.maximum(inside.max(axis=1, keepdims=True), -1e300)) @ members
    stands = (subsets.astype(np.float64) @ members) > 0
    most = np.where(stands, votes, -np.inf).max(axis=1, keepdims=True)
    wins = stands & (votes >= most - 1e-12 * np.abs(most))
    right = (members & is_right[:, None]).sum(axis=0) / members.sum(axis=0)
    return float(((wins * right).sum(axis=1) / np.maximum(1, wins.sum(axis=1))).mean())


@lru_cache(maxsize=256)
def _shares_within(total: int, num: int) -> Values:
    """For n from 0 to `total`: the share of choices of `num` of `total` that fall wholly into a given n of them."""
    every = math.comb(total, num)
    return np.array([math.comb(n, num) / every for n in range(total + 1)])


@lru_cache(maxsize=64)
def _subsets(total: int, num: int) -> Marks:
    """[subsets, total] choices of `num`: all of them, or MOST_SUBSETS drawn ones."""
    if math.comb(total, num) <= MOST_SUBSETS:
        chosen = np.array(list(combinations(range(total), num)))
    else:
        rng = np.random.default_rng([total, num])
        chosen = np.argsort(rng.random((MOST_SUBSETS, total)), axis=1)[:, :num]
    marks = np.zeros((len(chosen), total), np.bool_)
    np.put_along_axis(marks, chosen, True, axis=1)
    return marks

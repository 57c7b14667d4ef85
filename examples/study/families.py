"""Families of comparisons: Student's t over seeds, equivalence by two one-sided tests, and Holm's correction."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from losses import interval_over_seeds

from megatron_ledom.evaluation.intervals import LEVEL, holm

ALPHA = 1 - LEVEL


def t_family(by_seed: Mapping[str, Sequence[float]], bound: float | None = None) -> dict[str, dict[str, Any]]:
    """Return for each row of a family its mean, interval over seeds, and p-values that Holm's method adjusted; None for a single seed.

    holm_p: of the hypothesis that the mean is 0. equivalent_p: of the hypothesis that it is not between -bound and bound.
    """
    plain, equal = ([_p_values(values, bound)[kind] for values in by_seed.values()] for kind in (0, 1))
    adjusted = [holm([1.0 if p is None else p for p in family]) for family in (plain, equal)]
    found = {}
    for number, (name, values) in enumerate(by_seed.items()):
        is_known = plain[number] is not None
        found[name] = {
            "by_seed": list(values),
            "mean": statistics.mean(values),
            "interval": interval_over_seeds(values),
            "holm_p": adjusted[0][number] if is_known else None,
            "equivalent_p": adjusted[1][number] if is_known and bound is not None else None,
            "is_significant": is_known and adjusted[0][number] < ALPHA,
            "is_equivalent": is_known and bound is not None and adjusted[1][number] < ALPHA,
        }
    return found


def mark_over_seeds(rows: Sequence[dict[str, Any]]) -> None:
    """Add `holm_p` and `is_significant` to the rows of a family, from their `by_seed`, which is compared with 0."""
    found = t_family({str(number): row["by_seed"] for number, row in enumerate(rows)})
    for row, tested in zip(rows, found.values(), strict=True):
        row |= {name: tested[name] for name in ("holm_p", "is_significant")}


def mark_adjusted(rows: Sequence[dict[str, Any]]) -> None:
    """Add `holm_p` and `is_significant` to the rows of a family, from their `p`."""
    for row, adjusted in zip(rows, holm([row["p"] for row in rows]), strict=True):
        row |= {"holm_p": adjusted, "is_significant": adjusted < ALPHA}


def side_of(row: dict[str, Any], value: str = "difference") -> int:
    """Return 1 or -1 for a row that is significantly above or below 0 after the correction, else 0."""
    return (1 if row[value] > 0 else -1) if row["is_significant"] else 0


def _p_values(values: Sequence[float], bound: float | None) -> tuple[float | None, float | None]:
    """Return the p-values of a mean of 0 (two-sided), and of a mean outside of the bounds (the larger of two one-sided tests)."""
    from scipy.stats import ttest_1samp

    if len(values) < 2:
        return None, None
    if np.ptp(values) == 0:
        mean = values[0]
        return float(mean == 0), float(bound is None or abs(mean) >= bound)
    below = math.inf if bound is None else bound
    if math.isinf(below):
        return float(ttest_1samp(values, 0.0).pvalue), None
    sides = [ttest_1samp(values, sign * below, alternative=side).pvalue for sign, side in ((-1, "greater"), (1, "less"))]
    return float(ttest_1samp(values, 0.0).pvalue), float(max(sides))

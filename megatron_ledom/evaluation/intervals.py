"""Confidence intervals of means and of ratios of sums: by the bootstrap, also over seeds, and by Student's t."""

import importlib.util
import statistics
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_ledom.errors import UsageError

Values = npt.NDArray[np.float64]
LEVEL = 0.95
"""Default level of the intervals."""


def check_statistics() -> None:
    """Raise UsageError if scipy, which the intervals need, is not installed."""
    if importlib.util.find_spec("scipy") is None:
        raise UsageError("intervals need scipy, which is not installed; run pip install 'megatron-ledom[evaluation]'")


def t_interval(values: Sequence[float], *, level: float = LEVEL) -> list[float]:
    """Return [low, high] of the mean of two or more independent values, by Student's t.

    Raises UsageError without scipy.
    """
    check_statistics()
    from scipy.stats import t

    mean = statistics.mean(values)
    half = float(t.ppf((1 + level) / 2, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
    return [mean - half, mean + half]


def bootstrap_interval(
    values: Values, weights: Values | None = None, *, level: float = LEVEL, num_resamples: int, seed: int
) -> list[float]:
    """Return [low, high] of the mean of `values`, or of sum(values) / sum(weights), by the percentile bootstrap.

    values, weights [units]: a unit, such as a question or a document, is drawn as a whole. Equal values without
    weights, and a single unit, give an interval of width 0. Raises UsageError without scipy.
    """
    if len(values) == 1 or (weights is None and np.ptp(values) == 0):
        return [float(values[0] if weights is None else values[0] / weights[0])] * 2
    check_statistics()
    from scipy.stats import bootstrap

    def ratio(above: Values, below: Values, axis: int = -1) -> Any:
        return above.sum(axis=axis) / below.sum(axis=axis)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = bootstrap(
            (values,) if weights is None else (values, weights),
            np.mean if weights is None else ratio,
            paired=weights is not None,
            vectorized=True,
            confidence_level=level,
            n_resamples=num_resamples,
            batch=max(1, 2**22 // len(values)),
            method="percentile",
            rng=np.random.default_rng(seed),
        )
    return [float(found.confidence_interval.low), float(found.confidence_interval.high)]


def crossed_interval(values: Values, *, level: float, num_resamples: int, seed: int) -> list[float]:
    """Return [low, high] of the mean of `values` [seeds, questions], by a percentile bootstrap over both.

    A resample has the same drawn questions for each drawn seed (the pigeonhole bootstrap: Owen 2007, doi
    10.1214/07-AOAS122). This keeps a question's results under all seeds together, and the two sides of a paired
    difference. With a single seed only the questions are drawn, as in `bootstrap_interval`, so the interval does not
    cover other seeds.

    Known weakness: resampling S seeds gives the variance between seeds only (S - 1) / S of its size, and no resample
    reaches beyond the S observed seeds. If only the seeds vary, [lowest, highest] of three seeds contains the truth in
    75 of 100 cases. The variance that belongs neither to a seed nor to a question counts up to three times, which
    widens the interval.
    """
    num_seeds, num_questions = values.shape
    if num_seeds == 1:
        return bootstrap_interval(values[0], level=level, num_resamples=num_resamples, seed=seed)
    if np.ptp(values) == 0:
        return [float(values[0, 0])] * 2
    rng = np.random.default_rng(seed)
    step = max(1, 2**20 // num_questions)
    parts = [_crossed_means(values, min(step, num_resamples - start), rng) for start in range(0, num_resamples, step)]
    low, high = np.quantile(np.concatenate(parts), [(1 - level) / 2, (1 + level) / 2])
    return [float(low), float(high)]


def _crossed_means(values: Values, num: int, rng: np.random.Generator) -> Values:
    """Return [num] means of resamples.

    Rows are weighted by the draws of their seeds; then the same questions are drawn from all rows.
    """
    num_seeds, num_questions = values.shape
    counts = rng.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), size=num)
    drawn = rng.integers(num_questions, size=(num, num_questions))
    means: Values = np.take_along_axis(counts @ values / num_seeds, drawn, axis=1).mean(axis=1)
    return means

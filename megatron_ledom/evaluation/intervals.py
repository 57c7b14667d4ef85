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
    if len(values) == 1:
        return bootstrap_interval(values[0], level=level, num_resamples=num_resamples, seed=seed)
    if np.ptp(values) == 0:
        return [float(values[0, 0])] * 2
    low, high = np.quantile(_resampled(values, num_resamples, seed), [(1 - level) / 2, (1 + level) / 2])
    return [float(low), float(high)]


def crossed_p_value(values: Values, *, num_resamples: int, seed: int) -> float:
    """Return the two-sided p-value of the hypothesis that the mean of `values` [seeds, questions] is 0.

    It is twice the share of the resamples of `crossed_interval` on the rarer side of 0, 2 / (num_resamples + 1) at least, also
    for few questions with equal values. With few seeds that differ it rejects too often: 14 instead of 5 in 100 true
    hypotheses with 3 seeds whose deviation is 8 points. The larger one of it and `p_over_seeds` does not.
    """
    if np.ptp(values) == 0:
        return 1.0 if values[0, 0] == 0 else 2 / (num_resamples + 1)
    means = _resampled(values, num_resamples, seed)
    rarer = min(int((means <= 0).sum()), int((means >= 0).sum()))
    return min(1.0, 2 * (1 + rarer) / (num_resamples + 1))


def p_over_seeds(values: Values) -> float:
    """Return the two-sided p-value of Student's t over the means of the rows of `values` [seeds, questions], for a mean of 0.

    It is 0 if the seeds agree or if there is one. Raises UsageError without scipy.
    """
    means = values.mean(axis=1)
    if len(means) == 1 or np.ptp(means) < 1e-12:
        return 0.0
    check_statistics()
    from scipy.stats import ttest_1samp

    return float(ttest_1samp(means, 0.0).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the p-values of a family of hypotheses, adjusted by Holm's method (1979), in the given order.

    Those below 0.05 contain a false one in at most 5 of 100 families, however the hypotheses depend on each other.
    """
    order = np.argsort(p_values, kind="stable")
    factors = np.arange(len(p_values), 0, -1)
    raised = np.minimum(1.0, np.maximum.accumulate(factors * np.asarray(p_values, dtype=np.float64)[order]))
    adjusted = np.empty(len(p_values))
    adjusted[order] = raised
    return [float(one) for one in adjusted]


def _resampled(values: Values, num: int, seed: int) -> Values:
    """Return the means [num] of the resamples of `crossed_interval`."""
    rng, step = np.random.default_rng(seed), max(1, 2**20 // values.shape[1])
    return np.concatenate([_crossed_means(values, min(step, num - start), rng) for start in range(0, num, step)])


def _crossed_means(values: Values, num: int, rng: np.random.Generator) -> Values:
    """Return [num] means of resamples.

    Rows are weighted by the draws of their seeds; then the same questions are drawn from all rows.
    """
    num_seeds, num_questions = values.shape
    counts = rng.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), size=num)
    drawn = rng.integers(num_questions, size=(num, num_questions))
    means: Values = np.take_along_axis(counts @ values / num_seeds, drawn, axis=1).mean(axis=1)
    return means

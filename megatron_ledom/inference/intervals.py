"""Bootstrap intervals of means and of ratios of sums, for every report that has them."""

import warnings
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_ledom.errors import UsageError

Values = npt.NDArray[np.float64]


def bootstrap_interval(
    values: Values, weights: Values | None = None, *, level: float, num_resamples: int, seed: int
) -> list[float]:
    """[low, high] of the mean of `values`, or of sum(values) / sum(weights), by the percentile bootstrap over their first axis.

    values, weights [units]: a unit, such as a question or a document, is drawn as a whole. Equal values without weights, and a single
    unit, give an interval without width. UsageError where scipy is not installed.
    """
    if len(values) == 1 or (weights is None and np.ptp(values) == 0):
        return [float(values[0] if weights is None else values[0] / weights[0])] * 2
    try:
        from scipy.stats import bootstrap
    except ImportError as error:
        raise UsageError("intervals need scipy: pip install 'megatron-ledom[evaluation]'") from error

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

"""p-values of the crossed bootstrap, and Holm's correction."""

import numpy as np
import pytest

from megatron_ledom.evaluation.intervals import crossed_interval, crossed_p_value, holm, p_over_seeds


def test_holm_multiplies_each_p_value_by_the_hypotheses_that_are_left() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.02]) == [0.02]
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_the_p_value_is_below_the_level_where_the_interval_excludes_0() -> None:
    rng = np.random.default_rng(1)
    for shift in (0.0, 0.1, 0.3, -0.4):
        values = rng.normal(shift, 1.0, (5, 80))
        low, high = crossed_interval(values, level=0.95, num_resamples=4000, seed=0)
        p_value = crossed_p_value(values, num_resamples=4000, seed=0)
        assert (p_value < 0.05) == (low > 0 or high < 0) or abs(p_value - 0.05) < 0.005


def test_equal_values_have_no_doubt() -> None:
    assert crossed_p_value(np.zeros((3, 4)), num_resamples=99, seed=0) == 1.0
    assert crossed_p_value(np.ones((3, 4)), num_resamples=99, seed=0) == pytest.approx(0.02)


def test_few_seeds_that_differ_are_not_significant_more_often_than_the_level_says() -> None:
    """Of 200 tests of a true hypothesis at 5 %, 10 are expected to reject it. The bootstrap alone rejects more than twice as many."""
    rng = np.random.default_rng(3)
    p_values = []
    for _ in range(200):
        values = rng.normal(0.0, 0.08, (3, 1)) + rng.normal(0.0, 0.4, (3, 60))
        p_values.append(max(crossed_p_value(values, num_resamples=400, seed=0), p_over_seeds(values)))
    assert sum(p < 0.05 for p in p_values) <= 18

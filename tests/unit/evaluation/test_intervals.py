"""Intervals over seeds and questions: cases with a known spread, and how often they contain the truth."""

import tracemalloc

import numpy as np
import numpy.typing as npt
import pytest

from megatron_ledom.evaluation.intervals import bootstrap_interval, crossed_interval, t_interval

Values = npt.NDArray[np.float64]


def interval(values: Values, num_resamples: int = 2000) -> list[float]:
    return crossed_interval(values, level=0.95, num_resamples=num_resamples, seed=3)


def test_a_t_interval_has_the_width_of_the_table() -> None:
    pytest.importorskip("scipy")
    assert t_interval([1.0, 2.0, 3.0]) == pytest.approx([2 - 4.303 / 3**0.5, 2 + 4.303 / 3**0.5], abs=1e-3)
    assert t_interval([2.0, 2.0]) == [2.0, 2.0]


def test_spread_between_seeds_alone_has_a_width() -> None:
    """Each seed gives all questions the same value, so an interval over the questions' means alone would have width 0."""
    values = np.repeat([[0.2], [0.4], [0.9]], 50, axis=1)
    pytest.importorskip("scipy")
    old = bootstrap_interval(values.mean(axis=0), level=0.95, num_resamples=100, seed=3)
    assert old == pytest.approx([0.5, 0.5])
    # in 1 of 27 resamples all three drawn seeds are the lowest, which is more than 2.5 %
    assert interval(values) == pytest.approx([0.2, 0.9])


def test_spread_between_questions_alone_is_as_wide_as_over_questions() -> None:
    """Equal seeds add nothing. A question's values stay together, otherwise the interval would be narrower by sqrt(3)."""
    pytest.importorskip("scipy")
    row = (np.arange(100) < 30).astype(np.float64)
    found = interval(np.tile(row, (3, 1)), 10_000)
    expected = bootstrap_interval(row, level=0.95, num_resamples=10_000, seed=3)
    assert found == pytest.approx(expected, abs=0.011)  # one question of 100
    deviation = np.sqrt(0.3 * 0.7 / 100)
    assert found == pytest.approx([0.3 - 1.96 * deviation, 0.3 + 1.96 * deviation], abs=0.015)


def test_one_seed_is_the_bootstrap_over_questions() -> None:
    pytest.importorskip("scipy")
    row = (np.arange(40) % 3 == 0).astype(np.float64)
    assert interval(row[np.newaxis]) == bootstrap_interval(row, level=0.95, num_resamples=2000, seed=3)


def test_a_constant_difference_has_an_interval_of_width_0() -> None:
    assert interval(np.full((3, 10), 0.1)) == [0.1, 0.1]


def test_many_resamples_of_many_questions_take_little_memory() -> None:
    """40 resamples of 2^18 questions need 80 MiB for the drawn numbers alone.

    All resamples count, however they are split.
    """
    values = np.random.default_rng(0).random((2, 2**18))
    tracemalloc.start()
    low, high = interval(values, 41)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**25
    assert 0.49 < low < high < 0.51


def test_intervals_of_three_seeds_contain_the_truth_when_those_over_questions_do_not() -> None:
    """Paired differences of 100 questions are randomly +1, 0 or -1, with and without a seed effect (deviation 0.08)."""
    pytest.importorskip("scipy")
    rng = np.random.default_rng(1)
    for deviation, least, most_of_old in ((0.0, 0.95, 1.0), (0.08, 0.9, 0.8)):
        held, held_by_old = [], []
        for _ in range(200):
            mean = 0.05 + rng.normal(0, deviation, (3, 1))
            drawn = rng.random((3, 100))
            values = (drawn < 0.2 + mean / 2).astype(np.float64) - (drawn > 0.8 + mean / 2)
            for found, each in ((held, values), (held_by_old, values.mean(axis=0, keepdims=True))):
                low, high = interval(each, 400)
                found.append(low <= 0.05 <= high)
        assert np.mean(held) >= least
        assert np.mean(held_by_old) <= most_of_old

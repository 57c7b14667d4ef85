"""The order of a blend: every sample once, each source at its fraction, and no dependence on earlier calls."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ledom.data.blends.interleave import BLOCK, Interleave

WEIGHTS = st.lists(st.floats(1e-4, 1e4), min_size=1, max_size=40)


def fractions_of(weights: list[float]) -> list[float]:
    return [weight / sum(weights) for weight in weights]


@settings(max_examples=30, deadline=None)
@given(weights=WEIGHTS, start=st.integers(0, 10**9))
def test_from_any_position_each_source_gives_its_samples_in_order_and_once(weights: list[float], start: int) -> None:
    interleave = Interleave(fractions_of(weights))
    following = interleave.counts(start).tolist()
    for sample in range(start, start + 300):
        source, number = interleave.locate(sample)
        assert number == following[source]
        following[source] += 1
    assert interleave.counts(start + 300).tolist() == following


@pytest.mark.parametrize("num_sources", [1, 2, 7, 300])
def test_no_sample_is_lost_or_duplicated_between_blocks(num_sources: int) -> None:
    weights = np.random.default_rng(num_sources).random(num_sources) ** 3 + 1e-3
    interleave = Interleave(fractions_of(weights.tolist()))
    following = [0] * num_sources
    for sample in range(3 * BLOCK + 100):
        source, number = interleave.locate(sample)
        assert number == following[source]
        following[source] += 1


def test_rounding_puts_no_sample_into_two_blocks_or_none() -> None:
    """Fractions and phases for which many samples are due at the start of a block, some within rounding."""
    fractions = np.random.default_rng(0).integers(1, 100, 50)
    interleave = Interleave((fractions / fractions.sum()).tolist())
    interleave._phases[:] = 0.0
    every = slice(None)
    for block in range(1, 60_000, 7):
        before, time = interleave._before(block), float(block * BLOCK)
        assert (interleave._due(before - 1, every)[before > 0] < time).all()
        assert (interleave._due(before, every) >= time).all()


@settings(max_examples=30, deadline=None)
@given(weights=WEIGHTS, num_samples=st.integers(1, 10**9))
def test_no_source_is_far_from_its_fraction(weights: list[float], num_samples: int) -> None:
    fractions = np.array(fractions_of(weights))
    counts = Interleave(fractions.tolist()).counts(num_samples)
    assert counts.sum() == num_samples
    assert np.abs(counts - fractions * num_samples).max() < 2 + len(weights) * fractions.max()


def test_earlier_calls_change_nothing() -> None:
    one, other = Interleave([0.2, 0.3, 0.5]), Interleave([0.2, 0.3, 0.5])
    asked = np.random.default_rng(1).integers(0, 10**8, 200).tolist()
    assert [one.locate(sample) for sample in asked] == [other.locate(sample) for sample in reversed(asked)][::-1]


def test_every_batch_has_samples_of_each_corpus_whatever_its_number_of_shards() -> None:
    """60 shards of one corpus, then 40 of another: a batch of 50 has 30 samples of the first, not only of shards 0 to 49."""
    interleave = Interleave([0.01] * 100)
    batches = np.array([interleave.locate(sample)[0] for sample in range(50 * 200)]).reshape(200, 50)
    of_the_first = (batches < 60).sum(1)
    assert of_the_first.min() >= 28
    assert of_the_first.max() <= 32


def test_the_longest_run_without_a_repeat_is_found() -> None:
    interleave = Interleave([0.75, 0.25])
    most = interleave.most_samples([300, 90])
    assert (interleave.counts(most) <= [300, 90]).all()
    assert not (interleave.counts(most + 1) <= [300, 90]).all()
    assert interleave.most_samples([300, 0]) < 4

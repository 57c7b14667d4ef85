"""The order of a blend: every sample once, each source at its share, and the same whatever is asked before."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ledom.data.blends.interleave import BLOCK, Interleave

WEIGHTS = st.lists(st.floats(1e-4, 1e4), min_size=1, max_size=40)


def shares_of(weights: list[float]) -> list[float]:
    return [weight / sum(weights) for weight in weights]


@settings(max_examples=30, deadline=None)
@given(weights=WEIGHTS, start=st.integers(0, 10**9))
def test_from_anywhere_on_each_source_gives_its_samples_in_order_and_each_once(weights: list[float], start: int) -> None:
    interleave = Interleave(shares_of(weights))
    following = interleave.counts(start).tolist()
    for sample in range(start, start + 300):
        source, number = interleave.locate(sample)
        assert number == following[source]
        following[source] += 1
    assert interleave.counts(start + 300).tolist() == following


@pytest.mark.parametrize("num_sources", [1, 2, 7, 300])
def test_no_sample_is_lost_or_doubled_where_blocks_meet(num_sources: int) -> None:
    weights = np.random.default_rng(num_sources).random(num_sources) ** 3 + 1e-3
    interleave = Interleave(shares_of(weights.tolist()))
    following = [0] * num_sources
    for sample in range(3 * BLOCK + 100):
        source, number = interleave.locate(sample)
        assert number == following[source]
        following[source] += 1


def test_rounding_puts_no_sample_into_two_blocks_or_none() -> None:
    """Shares and phases for which many samples are due just where a block begins, some of them within rounding."""
    shares = np.random.default_rng(0).integers(1, 100, 50)
    interleave = Interleave((shares / shares.sum()).tolist())
    interleave._phases[:] = 0.0
    every = slice(None)
    for block in range(1, 60_000, 7):
        before, time = interleave._before(block), float(block * BLOCK)
        assert (interleave._due(before - 1, every)[before > 0] < time).all()
        assert (interleave._due(before, every) >= time).all()


@settings(max_examples=30, deadline=None)
@given(weights=WEIGHTS, num_samples=st.integers(1, 10**9))
def test_no_source_is_far_from_its_share(weights: list[float], num_samples: int) -> None:
    shares = np.array(shares_of(weights))
    counts = Interleave(shares.tolist()).counts(num_samples)
    assert counts.sum() == num_samples
    assert np.abs(counts - shares * num_samples).max() < 2 + len(weights) * shares.max()


def test_what_was_asked_before_changes_nothing() -> None:
    one, other = Interleave([0.2, 0.3, 0.5]), Interleave([0.2, 0.3, 0.5])
    asked = np.random.default_rng(1).integers(0, 10**8, 200).tolist()
    assert [one.locate(sample) for sample in asked] == [other.locate(sample) for sample in reversed(asked)][::-1]


def test_every_batch_has_its_part_of_each_corpus_however_many_shards_it_is_in() -> None:
    """60 shards of one corpus, then 40 of another: batches of 50 hold 30 of the first, and not only shards 0 to 49."""
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

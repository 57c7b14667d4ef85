"""The order in which a blend draws from its sources. It is a formula, so any position is found at once, without a stored index.

Sample j of source d is due at time (j + phase_d) / fraction_d, and the blend is all samples sorted by that time. Phases are
multiples of the golden ratio, modulo 1, so that neighbouring sources (the shards of one corpus) are spread evenly over each batch.
The number of samples drawn from a source is its fraction of all samples, give or take about one. A longer run begins like a
shorter one.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

BLOCK = 1 << 14
"""Approximate number of samples that are sorted at a time, which takes a millisecond."""
GOLDEN = (5**0.5 - 1) / 2

Counts = npt.NDArray[np.int64]


class Interleave:
    """Order of the samples of a blend. The fractions of the sources add up to 1."""

    def __init__(self, fractions: Sequence[float]) -> None:
        self._fractions = np.array(fractions, np.float64)
        self._phases = np.arange(1, len(fractions) + 1) * GOLDEN % 1.0
        self._block = lru_cache(maxsize=4)(self._order_block)  # training reads one block after the other, validation its own

    def locate(self, sample: int) -> tuple[int, int]:
        """Return (source, number of the sample within the source) of sample `sample` of the blend."""
        first, sources, numbers = self._block_of(sample)
        return int(sources[sample - first]), int(numbers[sample - first])

    def counts(self, num_samples: int) -> Counts:
        """Return the number of samples from each source [sources] among the first `num_samples`."""
        if num_samples <= 0:
            return np.zeros(len(self._fractions), np.int64)
        first, sources, _ = self._block_of(num_samples - 1)
        counts = self._before(self._block_number(num_samples - 1))
        drawn = sources[: num_samples - first]
        return counts + np.bincount(drawn, minlength=len(counts))

    def most_samples(self, available: Sequence[int]) -> int:
        """Return the number of samples of the longest run that takes at most `available` [sources] samples from each source."""
        limit = np.array(available, np.int64)
        low, high = 0, int(limit.sum()) + 1  # `low` fits, `high` does not
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if (self.counts(middle) <= limit).all() else (low, middle)
        return low

    def _due(self, numbers: Counts, sources: npt.NDArray[np.intp] | slice) -> npt.NDArray[np.float64]:
        times: npt.NDArray[np.float64] = (numbers + self._phases[sources]) / self._fractions[sources]
        return times

    def _before(self, block: int) -> Counts:
        """Return the number of samples of each source [sources] that are due before the block. Exact despite rounding."""
        time, every = float(block * BLOCK), slice(None)
        counts = np.maximum(np.ceil(time * self._fractions - self._phases), 0).astype(np.int64)
        counts -= (counts > 0) & (self._due(counts - 1, every) >= time)
        counts += self._due(counts, every) < time
        return counts

    def _block_number(self, sample: int) -> int:
        block = sample // BLOCK
        while int(self._before(block).sum()) > sample:
            block -= 1
        while int(self._before(block + 1).sum()) <= sample:
            block += 1
        return block

    def _block_of(self, sample: int) -> tuple[int, npt.NDArray[np.intp], Counts]:
        block = sample // BLOCK
        first, sources, numbers = self._block(block)
        if not first <= sample < first + len(sources):  # near the border
            first, sources, numbers = self._block(self._block_number(sample))
        return first, sources, numbers

    def _order_block(self, block: int) -> tuple[int, npt.NDArray[np.intp], Counts]:
        """Return (first sample, source of each sample, its number within the source) of a block."""
        begin, end = self._before(block), self._before(block + 1)
        lengths = end - begin
        sources = np.repeat(np.arange(len(lengths)), lengths)
        numbers = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths - begin, lengths)
        order = np.argsort(self._due(numbers, sources), kind="stable")
        return int(begin.sum()), sources[order], numbers[order]

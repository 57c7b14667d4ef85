"""The words of a text near its hits: a long text has millions of words, and a search needs those around a few places."""

from bisect import bisect_right
from collections.abc import Iterable
from typing import Any

import numpy as np


class NearWords:
    """Words of a text in some ranges, by their numbers in the whole text."""

    def __init__(self, ngrams: Any, text: str, ranges: Iterable[tuple[int, int]]) -> None:
        """ngrams: a `NgramIndex`. ranges: (first, last + 1); they may overlap and reach over the borders of the text."""
        merged: list[list[int]] = []
        for first, end in sorted((max(0, first), end) for first, end in ranges):
            if first >= end:
                continue
            if merged and first <= merged[-1][1]:
                merged[-1][1] = max(merged[-1][1], end)
            else:
                merged.append([first, end])
        self._firsts = [first for first, _ in merged]
        sizes = [end - first for first, end in merged]
        self._offsets = [0, *np.cumsum(sizes, dtype=np.int64).tolist()]
        words, self._spans = ngrams.words_in(text, np.array(merged, np.int64).reshape(-1, 2))
        self._words: list[str] = words

    def words(self, first: int, end: int) -> list[str]:
        """Return the words from number `first` to before `end`, which are in one range; fewer at the borders of the text."""
        first = max(0, first)
        if first >= end:
            return []
        begin = self._place(first)
        return self._words[begin : begin + end - first]

    def span(self, first: int, last: int) -> tuple[int, int]:
        """Return the bytes of the text from word `first` to word `last`, inclusive."""
        return int(self._spans[self._place(first)][0]), int(self._spans[self._place(last)][1])

    def _place(self, number: int) -> int:
        index = bisect_right(self._firsts, number) - 1
        return int(self._offsets[index] + number - self._firsts[index])

"""The index of items: their searched texts, and the n-grams of these, in arrays that processes share."""

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from megatron_ledom.contamination.item_table import QUESTION_AND_ANSWER, Arrays, ItemTable
from megatron_ledom.contamination.items import EvaluationItem
from megatron_ledom.contamination.normalization import FRACTIONS, NO_WORDS, fold_table
from megatron_ledom.contamination.settings import ANSWER, CHOICE, QUESTION, SEARCHED, SearchSettings

if TYPE_CHECKING:
    from megatron_ledom._helpers import NgramIndex

KINDS = (QUESTION, ANSWER, CHOICE)
"""Kinds of the texts of an item, by their place in it; all further ones are choices."""


class ItemIndex:
    """Parts (searched texts of items) and their n-grams.

    arrays: `part_texts` [parts], the number of the text of each part in `items`; `num_words` [parts]; `places` [n-grams of all parts, 2],
    (part, first word in it), sorted by n-gram; `starts` [different n-grams + 1], where the places of an n-gram begin; `slots`, `bits` and
    `table` as csrc/helpers describes them.
    """

    def __init__(self, items: ItemTable, arrays: Arrays, ngrams: "NgramIndex") -> None:
        self.items, self.arrays, self.ngrams = items, arrays, ngrams
        self.num_words, self.places, self.starts = arrays["num_words"], arrays["places"], arrays["starts"]
        self.part_texts = arrays["part_texts"]
        self.part_items: npt.NDArray[np.int32] = items.items_of_texts()[self.part_texts]
        self.part_kinds = np.minimum(items.places_in_items()[self.part_texts], QUESTION_AND_ANSWER)

    @property
    def num_ngrams(self) -> int:
        """Return the number of different n-grams."""
        return int(self.ngrams.num_ngrams)

    @property
    def num_bytes(self) -> int:
        """Return the memory of the n-grams in bytes, without the texts of the items."""
        return int(self.ngrams.bytes + sum(array.nbytes for array in (self.places, self.starts, self.num_words)))

    def kind(self, part: int) -> str:
        """Return the kind of a part."""
        return KINDS[int(self.part_kinds[part])]

    def item(self, part: int) -> int:
        """Return the number of the item of a part."""
        return int(self.part_items[part])

    def words(self, text: str) -> list[str]:
        """Return the normalized words of a text."""
        return list(self.ngrams.words(text)[0])

    def part_words(self, part: int) -> list[str]:
        """Return the words of a part."""
        return self.words(self.items.text(int(self.part_texts[part])))


def build_index(settings: SearchSettings, items: Sequence[EvaluationItem]) -> ItemIndex:
    """Return the index of items for the settings."""
    table = items if isinstance(items, ItemTable) else ItemTable.of(items)
    kinds = np.minimum(table.places_in_items(), QUESTION_AND_ANSWER)
    is_searched = np.isin(kinds, [KINDS.index(kind) for kind in SEARCHED[settings.match]]) & (table.lengths() > 0)
    part_texts = np.flatnonzero(is_searched).astype(np.int32)
    folds, pool = _table()
    ngrams = ngram_index(settings, folds, pool)
    places, num_words = ngrams.build(table.texts(part_texts.tolist()))
    order = np.argsort(places[:, 2], kind="stable")
    slots, bits, _ = ngrams.tables()
    arrays = {
        "part_texts": part_texts,
        "num_words": num_words.astype(np.int32),
        "places": np.ascontiguousarray(places[order, :2].astype(np.int32)),
        "starts": np.searchsorted(places[order, 2], np.arange(ngrams.num_ngrams + 1)).astype(np.int32),
        "slots": slots,
        "bits": bits,
        "table": folds,
    }
    return ItemIndex(table, arrays, ngrams)


def ngram_index(settings: SearchSettings, folds: npt.NDArray[np.uint32], pool: str) -> "NgramIndex":
    """Return an empty index of n-grams. folds, pool: as of `fold_table`."""
    from megatron_ledom._helpers import NgramIndex

    return NgramIndex(
        table=folds,
        pool=pool,
        ignore_numbers=settings.ignore_numbers,
        no_words=NO_WORDS,
        fractions=FRACTIONS,
        length=settings.ngram,
        shortest=settings.min_words,
    )


def fold_pool() -> str:
    """Return the folded words of the table."""
    return _table()[1]


@cache
def _table() -> tuple[npt.NDArray[np.uint32], str]:
    table, pool = fold_table()
    return np.array(table, np.uint32), pool


def index_version() -> int:
    """Return the version of the hashes and tables of the C++ index."""
    from megatron_ledom._helpers import NgramIndex

    return int(NgramIndex.version)


def is_consistent(index: ItemIndex) -> bool:
    """Return True if the arrays of an index fit together, so that no look-up leaves them."""
    items, places, starts = index.items, index.places, index.starts
    firsts, offsets = items.arrays["firsts"], items.arrays["offsets"]
    borders: list[tuple[npt.NDArray[Any], int]] = [(firsts, len(offsets) - 1), (offsets, len(items.arrays["bytes"]))]
    borders.append((starts, len(places)))
    are_borders = all(
        len(border) > 0 and border[0] == 0 and border[-1] == last and bool((np.diff(border) >= 0).all())
        for border, last in borders
    )
    are_counts = len(starts) == index.num_ngrams + 1 and len(index.num_words) == len(index.part_texts)
    are_parts = places[:, 0].min(initial=0) >= 0 and places[:, 0].max(initial=-1) < len(index.num_words)
    return are_borders and are_counts and bool(are_parts)

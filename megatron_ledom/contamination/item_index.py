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

LAYOUTS = {
    **{name: (np.dtype("<i4"), 1) for name in ("sets", "part_texts", "num_words", "starts")},
    **{name: (np.dtype("<i8"), 1) for name in ("numbers", "firsts", "offsets")},
    "bytes": (np.dtype(np.uint8), 1),
    "places": (np.dtype("<i4"), 2),
}
"""Type and dimensions of arrays; the C++ index checks those that only it reads."""
MOST_WORDS_PER_BYTE = 2
"""A text has fewer words than this times its bytes, also one of characters that fold to several words."""


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


def check_arrays(items: ItemTable, arrays: Arrays, num_ngrams: int, length: int) -> None:
    """Raise ValueError or LookupError if arrays of a file do not fit together, so that a look-up would leave them.

    num_ngrams: different ones. length: words of an n-gram.
    """
    for name, (dtype, dimensions) in LAYOUTS.items():
        array = items.arrays[name] if name in items.arrays else arrays[name]
        if array.dtype != dtype or array.ndim != dimensions or (dimensions == 2 and array.shape[1] != 2):
            raise ValueError(f"{name} has the type {array.dtype} and the shape {array.shape}")
    _check_items(items)
    part_texts, num_words, places = arrays["part_texts"], arrays["num_words"], arrays["places"]
    _check_borders("starts", arrays["starts"], len(places))
    _check(len(arrays["starts"]) == num_ngrams + 1, "there are more or fewer n-grams than their places")
    _check(len(num_words) == len(part_texts), "not each part has its number of words")
    _check_numbers("part_texts", part_texts, len(items.arrays["offsets"]) - 1)
    _check(bool((np.diff(part_texts) > 0).all()), "the parts are not in order")
    longest = MOST_WORDS_PER_BYTE * items.lengths()[part_texts]
    _check(bool(((num_words >= 0) & (num_words <= longest)).all()), "a part has more words than its text")
    parts, words = places[:, 0], places[:, 1].astype(np.int64)
    _check_numbers("the parts of n-grams", parts, len(part_texts))
    of_part = num_words[parts].astype(np.int64)
    are_inside = (words >= 0) & (of_part > 0) & (words + np.minimum(of_part, length) <= of_part)
    _check(bool(are_inside.all()), "an n-gram is not inside its part")


def _check_items(items: ItemTable) -> None:
    arrays = items.arrays
    _check_borders("firsts", arrays["firsts"], len(arrays["offsets"]) - 1)
    _check_borders("offsets", arrays["offsets"], len(arrays["bytes"]))
    _check(bool((np.diff(arrays["firsts"]) >= QUESTION_AND_ANSWER).all()), "an item has no question and answer")
    _check(len(arrays["sets"]) == len(arrays["numbers"]) == len(items), "not each item has its set and number")
    _check(all(isinstance(name, str) for name in items.sets), "a set has no name")
    _check_numbers("sets", arrays["sets"], len(items.sets))


def _check_borders(name: str, borders: npt.NDArray[Any], last: int) -> None:
    is_good = len(borders) > 0 and borders[0] == 0 and borders[-1] == last and bool((borders[:-1] <= borders[1:]).all())
    _check(is_good, f"{name} does not rise from 0 to {last}")


def _check_numbers(name: str, numbers: npt.NDArray[Any], end: int) -> None:
    _check(numbers.min(initial=0) >= 0 and numbers.max(initial=-1) < end, f"{name} are not from 0 to below {end}")


def _check(is_good: bool, problem: str) -> None:
    if not is_good:
        raise ValueError(problem)

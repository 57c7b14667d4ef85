"""The C++ index at its edges: nothing to find, short parts, equal hashes, and tables of another index."""

import numpy as np
import pytest

from megatron_ledom._helpers import NgramIndex
from megatron_ledom.contamination.item_index import ngram_index
from megatron_ledom.contamination.items import EvaluationItem
from megatron_ledom.contamination.normalization import fold_table
from megatron_ledom.contamination.search import Decontamination, Searcher
from megatron_ledom.contamination.settings import SearchSettings

TABLE, POOL = fold_table()
EIGHT = "one two three four five six seven eight"
NINE = f"{EIGHT} nine"


def index(**changes: object) -> NgramIndex:
    return ngram_index(SearchSettings(**changes), np.array(TABLE, np.uint32), POOL)  # type: ignore[arg-type]


@pytest.mark.parametrize("parts", [[], [""], ["", "...", "\u00ad"], ["one two three"]])
def test_an_index_of_nothing_finds_nothing(parts: list[str]) -> None:
    found = index()
    places, num_words = found.build(parts)
    assert (len(places), len(num_words), found.num_ngrams) == (0, len(parts), 0)
    assert found.search([NINE, "", "..."]).shape == (0, 4)


def test_an_index_that_was_not_built_finds_nothing() -> None:
    assert index().search([NINE]).shape == (0, 4)


def test_parts_at_the_shortest_length_have_one_ngram_and_shorter_ones_none() -> None:
    found = index(ngram=8, min_words=3)
    places, num_words = found.build(["one two", "one two three", EIGHT, NINE])
    assert num_words.tolist() == [2, 3, 8, 9]
    assert places.tolist() == [[1, 0, 0], [2, 0, 1], [3, 0, 1], [3, 1, 2]]
    assert found.search(["", f"zero {NINE} ten"]).tolist() == [[1, 1, 0, 3], [1, 1, 1, 8], [1, 2, 2, 8]]


def test_a_text_shorter_than_an_ngram_or_longer_than_the_ring_of_hashes_is_searched() -> None:
    found = index(ngram=64, min_words=1)
    long = " ".join(f"w{chr(97 + n % 26)}{'x' * (n // 26)}" for n in range(64))
    found.build([long, "one"])
    rows = found.search(["two one", f"{'two ' * 500}{long} {'two ' * 500}{long}"]).tolist()
    assert rows == [[0, 1, 1, 1], [1, 500, 0, 64], [1, 1064, 0, 64]]


def test_tables_of_another_index_find_the_same() -> None:
    first, second = index(), index()
    first.build([NINE])
    second.use(*first.tables())
    assert second.search([NINE]).tolist() == first.search([NINE]).tolist() != []
    assert (second.num_ngrams, second.bytes) == (2, first.bytes)
    with pytest.raises(ValueError, match="built already"):
        second.build([NINE])


def test_tables_that_would_be_left_by_a_look_up_are_refused() -> None:
    built = index()
    built.build([NINE])
    slots, bits, lengths = built.tables()
    full = slots.copy()
    full[:, 1] = np.arange(len(full))
    far = slots.copy()
    far[far[:, 1].astype(np.int32) == 1, 1] = 1 << 30
    for bad in (
        (slots[:63], bits, lengths),
        (slots[:32], bits[:4], lengths),
        (slots, bits[:-1], lengths),
        (full, bits, lengths),
        (far, bits, lengths),
        (slots, bits, [65]),
        (slots, bits, [7]),
        (slots.astype(np.int64), bits, lengths),
        (slots[::2], bits[::2], lengths),
    ):
        with pytest.raises(ValueError, match=r"not those of an index|wrong type or layout"):
            index().use(*bad)
    empty = index()
    empty.build([])
    index().use(*empty.tables())


def test_ngrams_with_equal_hashes_are_told_apart_by_their_words() -> None:
    """The numbers of the n-grams in the table are exchanged, so each look-up finds another n-gram, as equal hashes would."""
    texts = [f"{chr(97 + n) * 3} {EIGHT} {chr(97 + n) * 4}" for n in range(4)]
    items = [EvaluationItem(set="s", number=n, question=text) for n, text in enumerate(texts)]
    searcher = Searcher(Decontamination(SearchSettings(), items))
    assert set(searcher.search(texts)) == {0, 1, 2, 3}
    slots, bits, lengths = searcher.index.ngrams.tables()
    numbers = slots[:, 1].astype(np.int32)
    lying = slots.copy()
    lying[:, 1] = np.where(numbers >= 0, (numbers + 1) % searcher.num_ngrams, numbers).astype(np.uint32)
    liar = index()
    liar.use(lying, bits, lengths)
    assert len(liar.search(texts))
    searcher._index = liar
    assert searcher.search(texts) == {}


def test_the_version_is_raised_when_hashes_change() -> None:
    """Stored indexes of another version are not read. If this fails, raise NgramIndex::VERSION and correct the sums."""
    built = index(ngram=3, min_words=2)
    built.build(["The 1,000 cats, na\u00efve \\frac{1}{2} \u4e2d\u6587", "two words"])
    slots, bits, _ = built.tables()
    known = slots[slots[:, 1].astype(np.int32) >= 0]
    assert (NgramIndex.version, int(known[:, 0].sum()), int(np.bitwise_xor.reduce(bits))) == (
        2,
        15456805985,
        1297067489544503361,
    )

"""Units of reversal: the inverse is exact, and the model order is that of a rule in plain Python."""

import hashlib
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ledom.direction import Direction, Reading, Unit
from megatron_ledom.errors import DataError
from megatron_ledom.provenance import check_readings, readings_from, readings_to
from megatron_ledom.reversal_units import SegmentSettings, UnitOrder, WordPieces
from megatron_ledom.tokenizers.surfaces import word_pieces

BOUNDARY = 9
SURFACES = {0: b"a", 1: b" b", 2: b" C", 3: b"D", 4: b"e.", 5: b" F.", 6: b"\n", 7: b"g7", 8: b" H"}
PIECES = word_pieces(SURFACES, BOUNDARY + 1)
SEGMENTS = SegmentSettings(segment_tokens=3, seed=5)
DOCUMENTS = st.lists(st.lists(st.integers(0, BOUNDARY - 1), max_size=12), max_size=5)


def order_of(unit: Unit, segments: SegmentSettings = SEGMENTS) -> UnitOrder:
    reading = Reading(direction=Direction.REVERSE, unit=unit, boundary_id=None if unit is Unit.TOKEN else BOUNDARY)
    return UnitOrder(reading, PIECES, segments)


def in_model_order(order: UnitOrder, documents: list[list[int]]) -> list[list[int]]:
    ids = np.array([id_ for document in documents for id_ in document], np.uint32)
    model_ids, offsets = order.to_model(ids, np.cumsum([0, *map(len, documents)]).astype(np.int64))
    return [model_ids[begin:end].tolist() for begin, end in pairwise(offsets.tolist())]


def words_of(document: list[int]) -> list[list[int]]:
    words: list[list[int]] = []
    for id_ in document:
        if not words or SURFACES[id_][:1].isspace():
            words.append([])
        words[-1].append(id_)
    return words


def entities_of(document: list[int]) -> list[list[int]]:
    units: list[list[int]] = []
    was_capital = False
    for word in words_of(document):
        is_capital = b"".join(SURFACES[id_] for id_ in word).decode().strip()[:1].isupper()
        if units and is_capital and was_capital and SURFACES[units[-1][-1]][-1:].isalnum():
            units[-1] += word
        else:
            units.append(list(word))
        was_capital = is_capital
    return units


def expected(document: list[int], units_of: Callable[[list[int]], list[list[int]]]) -> list[int]:
    """Return the model order by the rule of the module, one unit after the other."""
    result: list[int] = []
    for unit in reversed(units_of(document)):
        is_enclosed = words_of(unit) != [unit] or not SURFACES[unit[0]][:1].isspace()
        result += [BOUNDARY, *unit, BOUNDARY] if is_enclosed else unit
    return result[:-1] if result and result[-1] == BOUNDARY else result


@given(documents=DOCUMENTS, unit=st.sampled_from(list(Unit)), longest=st.integers(1, 5), seed=st.integers(0, 3))
def test_the_inverse_of_every_unit_is_exact_and_documents_do_not_depend_on_each_other(
    documents: list[list[int]], unit: Unit, longest: int, seed: int
) -> None:
    order = order_of(unit, SegmentSettings(segment_tokens=longest, seed=seed))
    stored = in_model_order(order, documents)
    flat = np.array([id_ for document in stored for id_ in document], np.uint32)
    text_ids, offsets = order.to_text(flat, np.cumsum([0, *map(len, stored)]).astype(np.int64))
    assert [text_ids[a:b].tolist() for a, b in pairwise(offsets.tolist())] == documents
    assert [order.text_ids(np.array(document, np.uint32)).tolist() for document in stored] == documents
    assert stored == [in_model_order(order, [document])[0] for document in documents]
    for before, after in zip(documents, stored, strict=True):
        assert sorted(before) == sorted(id_ for id_ in after if id_ != BOUNDARY)


@given(documents=DOCUMENTS)
def test_words_and_entities_equal_the_rule_in_plain_python(documents: list[list[int]]) -> None:
    assert in_model_order(order_of(Unit.WORD), documents) == [expected(document, words_of) for document in documents]
    assert in_model_order(order_of(Unit.ENTITY), documents) == [expected(document, entities_of) for document in documents]
    assert in_model_order(order_of(Unit.TOKEN), documents) == [list(reversed(document)) for document in documents]


def test_different_documents_never_have_the_same_model_order() -> None:
    """Without the boundary, " b" + "a" as two words and as one word would both be stored as " b" + "a"."""
    order = order_of(Unit.WORD)
    assert in_model_order(order, [[0, 1]]) == [[1, BOUNDARY, 0]]
    assert in_model_order(order, [[1, 0]]) == [[1, 0]]


def test_segments_have_every_length_up_to_the_longest_and_depend_on_the_seed() -> None:
    document = [id_ % BOUNDARY for id_ in range(3000)]
    stored = in_model_order(order_of(Unit.SEGMENT), [document])[0]
    borders = [-1, *(place for place, id_ in enumerate(stored) if id_ == BOUNDARY), len(stored)]
    lengths = np.diff(borders) - 1
    assert sorted(set(lengths[:-1].tolist())) == [1, 2, 3]
    assert lengths.mean() == pytest.approx(2, abs=0.1)
    assert stored != in_model_order(order_of(Unit.SEGMENT, SegmentSettings(segment_tokens=3, seed=6)), [document])[0]


def test_the_lengths_of_segments_are_the_same_on_every_machine() -> None:
    stored = in_model_order(order_of(Unit.SEGMENT), [[id_ % BOUNDARY for id_ in range(300)]])[0]
    assert hashlib.sha256(bytes(stored)).hexdigest()[:16] == "d401cd8ae6ff908f"


@pytest.mark.parametrize("stored", [[0, 1], [1, BOUNDARY, 0, BOUNDARY, 0]])
def test_ids_that_no_document_in_word_order_has_are_refused(stored: list[int]) -> None:
    with pytest.raises(DataError, match="document 0 of the read ids is not in word order"):
        order_of(Unit.WORD).text_ids(np.array(stored, np.uint32))


def test_readings_are_stored_and_wrong_ones_refused() -> None:
    forward = Reading(direction=Direction.FORWARD)
    reverse = Reading(direction=Direction.REVERSE, unit=Unit.WORD, marker_id=3, boundary_id=4)
    assert readings_from(readings_to([forward, reverse])) == (forward, reverse)
    assert reverse.describe() == "reverse by word, boundary 4, marker 3"
    check_readings("both", [forward, reverse])
    for direction, readings, words in (
        ("both", [forward, Reading(direction=Direction.REVERSE)], "same marker"),
        ("both", [forward], "the direction is both, but it reads forward"),
        (Direction.REVERSE, [forward], "the direction is reverse"),
        (Direction.FORWARD, [Reading(direction=Direction.FORWARD, unit=Unit.WORD, boundary_id=1)], "which no shard has"),
        (Direction.REVERSE, [Reading(direction=Direction.REVERSE, unit=Unit.WORD)], "which no shard has"),
    ):
        with pytest.raises(DataError, match=words):
            check_readings(direction, readings)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="expected a list of direction"):
        readings_from([{"direction": "sideways"}])


def test_capital_letters_and_white_space_are_those_of_unicode() -> None:
    found: WordPieces = word_pieces({0: " Éa".encode(), 1: "\u3000東".encode(), 2: b"\xff", 3: b" "}, 5)
    assert found.begins.tolist() == [True, True, False, True, False]
    assert found.blank.tolist() == [False, False, False, True, False]
    assert found.capital.tolist() == [True, False, False, False, False]
    assert found.joins.tolist() == [True, True, False, False, False]

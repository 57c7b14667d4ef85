"""Order: reversing twice is the identity, and the C++ gives the ids of the reference."""

from itertools import accumulate

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ledom.data.preprocess.encode_parts import concatenate_documents
from megatron_ledom.direction import Direction, concatenate_documents_reference, to_model_order, to_text_order
from megatron_ledom.errors import DataError, MismatchError
from megatron_ledom.provenance import Provenance

DOCUMENTS = st.lists(st.lists(st.integers(0, 998), max_size=12), max_size=8)
DIRECTIONS = st.sampled_from(list(Direction))


def flat(documents: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    ids = np.array([number for document in documents for number in document], np.uint32)
    return ids, np.array([0, *accumulate(map(len, documents))], np.int64)


@given(ids=st.lists(st.integers(0, 2**31 - 1)), direction=DIRECTIONS)
def test_reversing_twice_is_the_identity(ids: list[int], direction: Direction) -> None:
    assert to_text_order(to_model_order(ids, direction), direction) == ids
    array = np.array(ids, np.int64)
    assert np.array_equal(to_text_order(to_model_order(array, direction), direction), array)


def test_reverse_puts_the_end_of_the_text_first() -> None:
    assert to_model_order([100, 101, 102], Direction.REVERSE) == [102, 101, 100]
    assert to_model_order([100, 101, 102], Direction.FORWARD) == [100, 101, 102]


def test_reversed_arrays_are_contiguous_copies() -> None:
    ids = np.arange(5)
    reversed_ids = to_model_order(ids, Direction.REVERSE)
    reversed_ids[0] = 99
    assert reversed_ids.flags.c_contiguous
    assert ids.tolist() == [0, 1, 2, 3, 4]


@given(documents=DOCUMENTS, direction=DIRECTIONS, dtype=st.sampled_from(["uint16", "int32"]))
def test_concatenated_documents_equal_the_reference(documents: list[list[int]], direction: Direction, dtype: str) -> None:
    ids, offsets = flat(documents)
    stored_ids, lengths = concatenate_documents(ids, offsets, direction=direction, eod_id=999, vocab_size=1000, dtype=dtype)
    assert stored_ids.dtype == dtype
    assert stored_ids.tolist() == concatenate_documents_reference(documents, direction, 999)
    assert lengths.tolist() == [len(document) + 1 for document in documents if document]


def test_a_document_without_tokens_leaves_no_eod() -> None:
    ids, offsets = flat([[100], [], [300, 301]])
    stored_ids, lengths = concatenate_documents(
        ids, offsets, direction=Direction.REVERSE, eod_id=999, vocab_size=1000, dtype="int32"
    )
    assert stored_ids.tolist() == [100, 999, 301, 300, 999]
    assert lengths.tolist() == [2, 3]


@pytest.mark.parametrize("direction", list(Direction))
def test_an_id_outside_the_vocabulary_is_refused_before_numpy_would_wrap(direction: Direction) -> None:
    ids, offsets = flat([[100, 101], [102, 65_536 + 7]])
    assert ids.astype(np.uint16).tolist() == [100, 101, 102, 7]  # numpy would wrap without an error
    with pytest.raises(DataError, match=r"token id 65543 is outside the vocabulary of 1,000"):
        concatenate_documents(ids, offsets, direction=direction, eod_id=999, vocab_size=1000, dtype="uint16")


def test_a_vocabulary_that_does_not_fit_the_dtype_is_refused() -> None:
    ids, offsets = flat([[1]])
    with pytest.raises(DataError, match="65,537 ids does not fit in uint16"):
        concatenate_documents(ids, offsets, direction=Direction.REVERSE, eod_id=0, vocab_size=65_537, dtype="uint16")
    stored_ids, _ = concatenate_documents(
        ids, offsets, direction=Direction.REVERSE, eod_id=65_535, vocab_size=65_536, dtype="uint16"
    )
    assert stored_ids.tolist() == [1, 65_535]


def test_an_eod_outside_the_vocabulary_is_refused() -> None:
    ids, offsets = flat([[1]])
    with pytest.raises(DataError, match="eod id 1000 is outside"):
        concatenate_documents(ids, offsets, direction=Direction.REVERSE, eod_id=1000, vocab_size=1000, dtype="int32")


def test_offsets_that_do_not_fit_the_ids_are_refused() -> None:
    ids, _ = flat([[1, 2, 3]])
    for offsets in ([0, 2], [1, 3], [0, 4, 3]):
        with pytest.raises(ValueError, match="offsets"):
            concatenate_documents(
                ids, np.array(offsets, np.int64), direction=Direction.REVERSE, eod_id=9, vocab_size=10, dtype="int32"
            )


def provenance(**changes: object) -> Provenance:
    stored = {"direction": "reverse", "tokenizer_name": "t", "tokenizer_sha256": "a" * 64, "vocab_size": 1001, "eod_id": 1000}
    return Provenance.from_dict({**stored, **changes}, "here")


def test_provenance_survives_its_dictionary() -> None:
    assert Provenance.from_dict(provenance().to_dict(), "here") == provenance()
    with pytest.raises(DataError, match="here lacks eod_id"):
        Provenance.from_dict({key: value for key, value in provenance().to_dict().items() if key != "eod_id"}, "here")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"direction": "forward"}, "forward model"),
        ({"tokenizer_sha256": "b" * 64}, "same tokenizer"),
        ({"eod_id": 2}, "--eod-token"),
    ],
)
def test_provenance_that_does_not_fit_is_refused(changes: dict[str, object], words: str) -> None:
    provenance().check_same(provenance(), "the shard", "the run")
    with pytest.raises(MismatchError, match=words):
        provenance().check_same(provenance(**changes), "the shard", "the run")

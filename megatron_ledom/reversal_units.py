"""Units of reversal: documents whose words, entities or segments are in reverse order, each unit in text order inside.

Training on such documents beside forward ones is reverse training (Golovneva et al., arXiv 2403.13799). The order of the ids
follows from the ids alone, and the ids of the text follow from the stored ids, so a forward shard becomes any unit without its
text, and back:

word     A word begins at an id that begins with white space. The first word of a text may begin without; then the model order would
         join it to the word before it there, so a boundary id stands before it.
entity   As word, but neighbouring words that begin with a capital letter stay together in text order (a name such as "New York"),
         unless the word before ends with another character than a letter or a digit. A boundary id stands before and after them.
segment  Pieces of 1 to `segment_tokens` ids. Their lengths are random, but follow from the ids of the document and a seed. A
         boundary id stands between two pieces.

A boundary id at the end of a document is omitted. No text may contain the boundary id.
"""

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_ledom.direction import Direction, Reading, Unit
from megatron_ledom.errors import DataError

IdArray = npt.NDArray[Any]
Offsets = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
DEFAULT_SEGMENT_TOKENS = 25


@dataclass(frozen=True, slots=True)
class WordPieces:
    """Properties of the ids of a tokenizer, one entry for each id."""

    begins: Mask
    """True for an id that begins with white space."""
    blank: Mask
    """True for an id of white space alone."""
    capital: Mask
    """True for an id whose first character after white space is a capital letter."""
    joins: Mask
    """True for an id that ends with a letter or a digit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SegmentSettings:
    """Lengths of the pieces of the unit segment."""

    segment_tokens: int = DEFAULT_SEGMENT_TOKENS
    """Most ids in a piece."""
    seed: int = 0


class UnitOrder:
    """Converter of documents between text order and the model order of a reading, without marker and eod."""

    def __init__(self, reading: Reading, pieces: WordPieces | None = None, segments: SegmentSettings | None = None) -> None:
        """Prepare a reading. pieces: needed for the units word and entity; segments: needed only for `to_model`."""
        if (reading.boundary_id is None) is not (reading.unit is Unit.TOKEN):
            raise DataError(f"the unit {reading.unit} has the boundary id {reading.boundary_id}; the manifest is damaged")
        self.reading = reading
        self._pieces, self._segments = pieces, segments

    def to_model(self, text_ids: IdArray, offsets: Offsets) -> tuple[IdArray, Offsets]:
        """Return documents in model order. text_ids [total]: their ids in text order; offsets [documents + 1]: their begins."""
        if self.reading.direction is Direction.FORWARD:
            return text_ids, offsets
        begins, is_enclosed = self._units(text_ids, offsets)
        if self.reading.unit is Unit.SEGMENT:
            return _reversed_units(text_ids, offsets, begins, None, self.reading.boundary_id)
        return _reversed_units(text_ids, offsets, begins, is_enclosed[begins], self.reading.boundary_id)

    def to_text(self, model_ids: IdArray, offsets: Offsets) -> tuple[IdArray, Offsets]:
        """Return the documents in text order: the inverse of `to_model`. Raises DataError for ids that it cannot have written."""
        if self.reading.direction is Direction.FORWARD:
            return model_ids, offsets
        if self.reading.unit is Unit.TOKEN:
            return _reversed_units(model_ids, offsets, np.ones(len(model_ids), np.bool_), None, None)
        is_boundary = model_ids == self.reading.boundary_id
        begins = _document_begins(offsets, len(model_ids))
        begins[1:] |= is_boundary[:-1]
        if self.reading.unit is not Unit.SEGMENT:
            begins = self._stored_word_begins(model_ids, offsets, is_boundary, begins)
        kept = ~is_boundary
        begins &= kept
        if kept.any() and not begins[kept][0]:
            raise self._damaged(0)
        before = np.concatenate([[0], np.cumsum(kept)])
        return _reversed_units(model_ids[kept], before[offsets].astype(np.int64), begins[kept], None, None)

    def text_ids(self, model_ids: IdArray) -> IdArray:
        """Return one document in text order."""
        return self.to_text(model_ids, np.array([0, len(model_ids)], np.int64))[0]

    def _units(self, ids: IdArray, offsets: Offsets) -> tuple[Mask, Mask]:
        """Return masks of the ids at which units begin, and of those at which a unit begins that boundaries enclose."""
        begins = _document_begins(offsets, len(ids))
        if self.reading.unit is Unit.TOKEN:
            return np.ones(len(ids), np.bool_), np.zeros(len(ids), np.bool_)
        if self.reading.unit is Unit.SEGMENT:
            for document in np.flatnonzero(np.diff(offsets)).tolist():
                first, last = int(offsets[document]), int(offsets[document + 1])
                begins[first + self._segment_begins(ids[first:last])] = True
            return begins, begins
        words = self._word_pieces()
        starts = words.begins[ids]
        is_word = starts | begins
        joined = self._joined_words(ids, begins, is_word) if self.reading.unit is Unit.ENTITY else np.zeros(len(ids), np.bool_)
        is_unit = is_word & ~joined
        is_enclosed = is_unit & ~starts
        units = np.cumsum(is_unit) - 1
        is_enclosed[np.flatnonzero(is_unit)[units[joined]]] = True
        return is_unit, is_enclosed

    def _joined_words(self, ids: IdArray, begins: Mask, is_word: Mask) -> Mask:
        """Return a mask of the words that belong to the same entity as the word before them."""
        words = self._word_pieces()
        at = np.flatnonzero(is_word)
        written = np.append(np.flatnonzero(~words.blank[ids]), len(ids))
        first_written = written[np.searchsorted(written, at)]  # a word may begin with an id of white space alone
        is_inside = first_written < np.append(at[1:], len(ids))
        capital = is_inside & words.capital[ids[np.where(is_inside, first_written, at)]]
        joined = np.zeros(len(ids), np.bool_)
        follows = capital[1:] & capital[:-1] & words.joins[ids[at[1:] - 1]] & ~begins[at[1:]]
        joined[at[1:][follows]] = True
        return joined

    def _segment_begins(self, ids: IdArray) -> npt.NDArray[np.int64]:
        """Return where the pieces of a document begin. Philox's numbers are the same in every version of numpy."""
        assert self._segments is not None
        longest, seed = self._segments.segment_tokens, self._segments.seed
        digest = hashlib.sha256(seed.to_bytes(8, "little") + np.ascontiguousarray(ids, "<u4").tobytes()).digest()
        numbers = np.random.Philox(key=int.from_bytes(digest[:16], "little"))
        begins = [np.zeros(1, np.int64)]
        while begins[-1][-1] < len(ids):
            lengths = numbers.random_raw(2 * len(ids) // longest + 16) % np.uint64(longest) + np.uint64(1)
            begins.append(begins[-1][-1] + np.cumsum(lengths.astype(np.int64)))
        found = np.concatenate(begins)
        return found[found < len(ids)]

    def _stored_word_begins(self, ids: IdArray, offsets: Offsets, is_boundary: Mask, after: Mask) -> Mask:
        """Return a mask of the ids at which stored units begin. after: ids that follow a boundary or begin a document."""
        counted = np.cumsum(is_boundary)
        first = np.repeat(np.concatenate([[0], counted])[offsets[:-1]], np.diff(offsets))
        is_enclosed = (counted - first) % 2 == 1
        starts = self._word_pieces().begins[ids]
        begins = np.where(is_enclosed, after, starts)
        bad = np.flatnonzero(~is_enclosed & ~is_boundary & after & ~starts)
        if len(bad):
            raise self._damaged(int(np.searchsorted(offsets, bad[0], side="right")) - 1)
        return begins

    def _damaged(self, document: int) -> DataError:
        return DataError(
            f"document {document} of the read ids is not in {self.reading.unit} order: a unit does not begin with a word; the ids were"
            " changed, or belong to another tokenizer"
        )

    def _word_pieces(self) -> WordPieces:
        assert self._pieces is not None
        return self._pieces


def _document_begins(offsets: Offsets, total: int) -> Mask:
    begins = np.zeros(total, np.bool_)
    begins[offsets[:-1][np.diff(offsets) > 0]] = True
    return begins


def _reversed_units(
    ids: IdArray, offsets: Offsets, begins: Mask, is_enclosed: Mask | None, boundary_id: int | None
) -> tuple[IdArray, Offsets]:
    """Return documents with the order of their units reversed, and their offsets.

    begins [total]: where units begin. Without `boundary_id` nothing is added. Otherwise the id stands before and after the units
    in is_enclosed [units], or between all units if that is None, but never at the end of a document.
    """
    unit_begins = np.flatnonzero(begins)
    lengths = np.diff(np.append(unit_begins, len(ids)))
    documents = np.searchsorted(offsets, unit_begins, side="right") - 1
    first_units = np.searchsorted(documents, documents, side="left")
    last_units = np.searchsorted(documents, documents, side="right") - 1
    order = first_units + last_units - np.arange(len(unit_begins))  # the unit at each place of the result; its own inverse
    before, after = _boundaries(len(unit_begins), first_units, is_enclosed, boundary_id)
    sizes = lengths + before + after
    ends = np.cumsum(sizes[order])
    places = (ends - sizes[order])[order] + before  # of the first id of each unit
    result = np.full(int(ends[-1]) if len(ends) else 0, 0 if boundary_id is None else boundary_id, ids.dtype)
    result[np.arange(len(ids)) + np.repeat(places - unit_begins, lengths)] = ids
    document_sizes = np.bincount(documents, weights=sizes, minlength=len(offsets) - 1).astype(np.int64)
    return result, np.concatenate([[0], np.cumsum(document_sizes)]).astype(np.int64)


def _boundaries(
    count: int, first_units: npt.NDArray[np.int64], is_enclosed: Mask | None, boundary_id: int | None
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the number of boundary ids before and after each unit."""
    none = np.zeros(count, np.int64)
    if boundary_id is None:
        return none, none
    is_last = first_units == np.arange(count)  # the first unit of a document is the last in model order
    if is_enclosed is None:
        return none, (~is_last).astype(np.int64)
    return is_enclosed.astype(np.int64), (is_enclosed & ~is_last).astype(np.int64)

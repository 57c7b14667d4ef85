"""Convert blocks of stored documents to another model order: through their text order, by their ids alone."""

from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_ledom.data.shards.indexed_files import Block
from megatron_ledom.data.shards.model_order import contents
from megatron_ledom.direction import Direction, concatenate_into, reverse_into
from megatron_ledom.errors import DataError
from megatron_ledom.provenance import Provenance
from megatron_ledom.reversal_units import UnitOrder

MOST_IDS = np.iinfo(np.int32).max
"""Most ids of a document, whose length an index stores as int32."""


class ShardReverser:
    """Converter of blocks of plain documents (unit token, no marker) to the other direction."""

    def __init__(self, provenance: Provenance, dtype: npt.DTypeLike, *, is_closed: bool) -> None:
        self.provenance = provenance
        """Provenance of the result."""
        self.dtype = np.dtype(dtype)
        self.is_closed = is_closed
        """True if the input documents end with an eod."""
        self.num_empty = 0
        """Number of documents skipped for having no ids except eod."""
        self._buffer = np.empty(0, self.dtype)

    def convert(self, prefix: str, block: Block) -> tuple[npt.NDArray[Any], npt.NDArray[np.int32]]:
        """Return (ids, lengths) for `ShardWriter.append`, valid until the next call. Raises DataError for an invalid id or eod."""
        kept = block.lengths[block.lengths > int(self.is_closed)]
        lengths = kept if self.is_closed else kept + 1
        if lengths.size and int(lengths.max()) > MOST_IDS:
            raise _too_long(prefix, block.first + int(block.lengths.argmax()), int(lengths.max()))
        total = int(lengths.sum())
        if total > len(self._buffer):
            self._buffer = np.empty(total, self.dtype)
        reversed_ids = self._buffer[:total]
        bad = reverse_into(
            block.ids,
            block.lengths,
            reversed_ids,
            is_closed=self.is_closed,
            eod_id=self.provenance.eod_id,
            vocab_size=self.provenance.vocab_size,
        )
        if bad >= 0:
            raise DataError(self._problem(prefix, block, bad))
        self.num_empty += len(block.lengths) - len(kept)
        return reversed_ids, lengths.astype(np.int32)

    def _problem(self, prefix: str, block: Block, bad: int) -> str:
        document, found = block.document_at(bad), int(block.ids[bad])
        begin = int(block.lengths[: document - block.first].sum())
        is_last = bad - begin == block.lengths[document - block.first] - 1
        eod, vocab_size = self.provenance.eod_id, self.provenance.vocab_size
        where = f"{prefix}.bin: document {document}"
        if found < 0 or found >= vocab_size:
            return (
                f"{where} has id {found}, outside the {vocab_size:,} ids of the tokenizer; the shard is damaged or was made with"
                " another tokenizer"
            )
        if found != eod:
            return f"{where} ends with id {found}, expected eod {eod} at the end of every document (--eod keep)"
        if is_last:
            return f"{where} ends with eod {eod}, expected documents without eod (--eod append)"
        return (
            f"{where} has eod {eod} at its id {bad - begin} of {int(block.lengths[document - block.first])}, but eod must be last;"
            " if another id ends documents here, name it by --eod-token"
        )


class ShardReorderer(ShardReverser):
    """Converter of blocks of documents from any model order to any other one.

    source, target: both orders. The ids are checked as by `ShardReverser`; also, no text may contain a marker or boundary id.
    """

    def __init__(
        self, provenance: Provenance, dtype: npt.DTypeLike, source: UnitOrder, target: UnitOrder, *, is_closed: bool
    ) -> None:
        super().__init__(provenance, dtype, is_closed=is_closed)
        self._source, self._target = source, target

    def convert(self, prefix: str, block: Block) -> tuple[npt.NDArray[Any], npt.NDArray[np.int32]]:
        """Do the same as `ShardReverser.convert`."""
        checked, lengths = super().convert(prefix, block)  # the documents reversed by token, closed, without empty ones
        wide = lengths.astype(np.int64)
        stored = np.empty(len(checked), self.dtype)
        reverse_into(
            checked, wide, stored, is_closed=True, eod_id=self.provenance.eod_id, vocab_size=self.provenance.vocab_size
        )
        try:
            text_ids, offsets = self._source.to_text(*contents(stored, wide, self._source.reading))
        except DataError as error:
            raise DataError(f"{prefix}.bin, from document {block.first} on: {error}") from error
        self._check_text(prefix, block, text_ids, offsets)
        model_ids, offsets = self._target.to_model(text_ids, offsets)
        lengths_of = np.diff(offsets)
        kept, marker_id = lengths_of[lengths_of > 0], self._target.reading.marker_id
        added = 1 if marker_id is None else 2
        if kept.size and int(kept.max()) + added > MOST_IDS:
            raise _too_long(prefix, block.first + int(lengths_of.argmax()), int(kept.max()) + added)
        result = np.empty(len(model_ids) + added * len(kept), self.dtype)
        bad = concatenate_into(
            model_ids.astype(np.uint32),
            offsets,
            result,
            direction=Direction.FORWARD,  # the ids are in model order already
            eod_id=self.provenance.eod_id,
            vocab_size=self.provenance.vocab_size,
            bos_id=marker_id,
        )
        assert bad < 0, "the ids were checked above"
        self.num_empty += len(lengths_of) - len(kept)
        return result, (kept + added).astype(np.int32)

    def _check_text(self, prefix: str, block: Block, text_ids: npt.NDArray[Any], offsets: npt.NDArray[np.int64]) -> None:
        reading = self._target.reading
        for option, id_ in (("--marker", reading.marker_id), ("--boundary-token", reading.boundary_id)):
            if id_ is None:
                continue
            found = np.flatnonzero(text_ids == id_)
            if len(found):
                document = block.first + int(np.searchsorted(offsets, int(found[0]), side="right")) - 1
                raise DataError(
                    f"{prefix}.bin: the text of document {document} or a later one contains the id {id_} of {option}; name another token"
                )


def _too_long(prefix: str, document: int, length: int) -> DataError:
    return DataError(f"{prefix}.bin: document {document} has {length:,} ids, too many for the int32 lengths of an index")

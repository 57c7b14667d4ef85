"""The work of a preprocessing worker: encode a part of the corpus to the ids of a shard. Nothing here imports torch."""

import time
import traceback
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, MutableSequence, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.sharedctypes import RawArray
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_ledom.contamination.report import ContaminationCounts
from megatron_ledom.contamination.search import Searcher
from megatron_ledom.data.decontaminate.batches import decontaminated
from megatron_ledom.data.preprocess.part_store import PartFile, PartRecord
from megatron_ledom.data.readers.byte_ranges import Part
from megatron_ledom.data.readers.records import MAX_MESSAGES, ReadSettings, RecordReader, TextBatch
from megatron_ledom.data.readers.streams import BadRecordError
from megatron_ledom.data.shards.shard import NO_TOKENS
from megatron_ledom.direction import Direction, Unit, concatenate_into
from megatron_ledom.errors import DataError, UsageError
from megatron_ledom.reversal_units import UnitOrder
from megatron_ledom.tokenizers.corpus_tokenizer import Tokenizer

Filter = Callable[[str, Mapping[str, Any]], bool]
"""(text, record) -> True to keep the document."""

DUPLICATE, FILTERED, TOO_SHORT, TOO_LONG = "duplicate", "filtered", "too_short", "too_long"
EOD_IN_TEXT, MARKER_IN_TEXT = "eod_in_text", "marker_in_text"
"""Reasons for skipped documents in manifests, in addition to those of bad records."""


@dataclass(slots=True, kw_only=True)
class PartWork(ABC):
    """A function of part numbers that runs in every worker."""

    parts: Sequence[Part]
    read: ReadSettings
    progress: MutableSequence[int] = field(init=False)
    """Bytes done of each part, in memory shared with the parent process."""

    def __post_init__(self) -> None:
        self.progress = RawArray("q", max(1, len(self.parts)))

    def batches(self, number: int, record: PartRecord, skipped: Counter[str]) -> Iterator[TextBatch]:
        """Yield the texts of a part. Adds the messages and input files of its byte ranges to `record`, the counts to `skipped`."""
        done = 0
        for byte_range in self.parts[number]:
            reader = RecordReader(byte_range, self.read)
            for batch in reader.batches():
                yield batch
                self.progress[number] = done + batch.position
            done += byte_range.num_bytes
            skipped += reader.skipped
            record.messages += reader.messages[: MAX_MESSAGES - len(record.messages)]
            record.input_files.append(reader.record())

    @abstractmethod
    def __call__(self, number: int) -> Any:
        """Process a part and return the result."""


@dataclass(slots=True, kw_only=True)
class PartEncoder(PartWork):
    """Work that encodes each part into files."""

    paths: Sequence[str]
    """Path of the files of each part, without ending."""
    tokenizer: Tokenizer
    order: UnitOrder
    dtype: np.dtype[Any]
    bos_id: int | None = None
    min_tokens: int = 1
    max_tokens: int | None = None
    keep: Filter | None = None
    searcher: Searcher | None = None
    """Search for the items of evaluation sets, after all other choices of documents."""
    is_first: Sequence[npt.NDArray[np.bool_]] | None = None
    """Mask [documents] for each part: True for documents that are not duplicates."""

    def __call__(self, number: int) -> PartRecord:
        """Encode a part and return its record. A text without tokens is skipped, because a document needs a token before its eod."""
        started = time.monotonic()
        file = PartFile(self.paths[number])
        record = PartRecord()
        skipped: Counter[str] = Counter()
        contamination = ContaminationCounts()
        seen = 0
        for batch in _gathered(self.batches(number, record, skipped), self.read.batch_bytes):
            is_first = None if self.is_first is None else self.is_first[number][seen : seen + len(batch.texts)]
            seen += len(batch.texts)
            batch = self._chosen(batch, is_first, skipped)
            if self.searcher is not None:
                batch = decontaminated(batch, self.searcher, contamination, skipped)
            stored_ids, lengths, text_bytes = self._encoded(batch, skipped, record.messages)
            file.append(stored_ids, lengths)
            record.text_bytes += text_bytes
        record.num_documents, record.num_tokens = file.num_documents, file.num_tokens
        record.skipped = dict(sorted(skipped.items()))
        record.contamination = asdict(contamination) if self.searcher is not None else {}
        record.seconds = round(time.monotonic() - started, 3)
        return file.finish(record)

    def _chosen(self, batch: TextBatch, is_first: npt.NDArray[np.bool_] | None, skipped: Counter[str]) -> TextBatch:
        if is_first is not None:
            skipped[DUPLICATE] += len(batch.texts) - int(is_first.sum())
            batch = batch.of(np.flatnonzero(is_first).tolist())
        if self.keep is None:
            return batch
        try:
            pairs = zip(batch.texts, batch.records, strict=True)
            kept = [index for index, (text, record) in enumerate(pairs) if self.keep(text, record)]
        except Exception as error:
            raise UsageError(f"the function of --filter failed; repair it:\n{traceback.format_exc()}") from error
        skipped[FILTERED] += len(batch.texts) - len(kept)
        return batch.of(kept)

    def _encoded(
        self, batch: TextBatch, skipped: Counter[str], messages: list[str]
    ) -> tuple[npt.NDArray[Any], npt.NDArray[np.int32], int]:
        """Return (ids as stored, stored lengths, UTF-8 bytes of the stored texts)."""
        ids, offsets = self.tokenizer.encode_batch(batch.texts)
        lengths = np.diff(offsets)
        is_kept = lengths > 0
        _count(skipped, NO_TOKENS, ~is_kept)
        if self.min_tokens > 1 or self.max_tokens is not None:
            too_long = lengths > (self.max_tokens or lengths.max(initial=0))
            too_short = is_kept & (lengths < self.min_tokens)
            _count(skipped, TOO_LONG, too_long)
            _count(skipped, TOO_SHORT, too_short)
            is_kept &= ~(too_long | too_short)
        try:
            stored_ids, stored_lengths = self._concatenated(ids, offsets, is_kept)
        except (EodInsideError, AddedIdInsideError):
            is_kept &= ~self._containing_added(ids, offsets, is_kept, batch, skipped, messages)
            stored_ids, stored_lengths = self._concatenated(ids, offsets, is_kept)
        kept = (
            batch.texts if is_kept.all() else [text for text, keep in zip(batch.texts, is_kept.tolist(), strict=True) if keep]
        )
        return stored_ids, stored_lengths, sum(len(text) if text.isascii() else len(text.encode()) for text in kept)

    def _concatenated(
        self, ids: npt.NDArray[np.uint32], offsets: npt.NDArray[np.int64], is_kept: npt.NDArray[np.bool_]
    ) -> tuple[npt.NDArray[Any], npt.NDArray[np.int32]]:
        lengths = np.diff(offsets)
        if not (is_kept | (lengths == 0)).all():
            ids = ids[np.repeat(is_kept, lengths)]
            offsets = np.concatenate([[0], np.cumsum(lengths[is_kept])]).astype(np.int64)
        reading = self.order.reading
        marker_id, eod_id, vocab_size = reading.marker_id, self.tokenizer.eod_id, self.tokenizer.vocab_size
        added = [id_ for id_ in (marker_id, reading.boundary_id) if id_ is not None]
        if any((ids == id_).any() for id_ in added):
            raise AddedIdInsideError(f"a document contains one of the ids {added} of marker and boundary")
        direction = reading.direction
        if reading.unit is not Unit.TOKEN:
            if ids.size and int(ids.max()) >= vocab_size:
                raise _outside(int(ids.max()), vocab_size)
            (ids, offsets), direction = self.order.to_model(ids, offsets), Direction.FORWARD  # it is in model order now
        return concatenate_documents(
            ids,
            offsets,
            direction=direction,
            eod_id=eod_id,
            vocab_size=vocab_size,
            dtype=self.dtype,
            bos_id=self.bos_id if marker_id is None else marker_id,
        )

    def _containing_added(
        self,
        ids: npt.NDArray[np.uint32],
        offsets: npt.NDArray[np.int64],
        is_kept: npt.NDArray[np.bool_],
        batch: TextBatch,
        skipped: Counter[str],
        messages: list[str],
    ) -> npt.NDArray[np.bool_]:
        """Return a mask of the documents with an id that preprocessing adds, and reject them as bad records.

        A document with the eod would end too early; one with the marker or the boundary could not be put into text order again.
        """
        reading, eod_id = self.order.reading, self.tokenizer.eod_id
        found_in_any = np.zeros(len(is_kept), np.bool_)
        kinds = (("eod", EOD_IN_TEXT, eod_id), ("marker", MARKER_IN_TEXT, reading.marker_id))
        for name, reason, id_ in (*kinds, ("boundary", MARKER_IN_TEXT, reading.boundary_id)):
            if id_ is None:
                continue
            containing = np.zeros(len(is_kept), np.bool_)
            containing[np.searchsorted(offsets, np.flatnonzero(ids == id_), side="right") - 1] = True
            token = self.tokenizer.eod_token if id_ == eod_id else self.tokenizer.token_of(id_)
            option = "--boundary-token" if name == "boundary" else f"--{name}-token" if name == "eod" else "--marker"
            message = f"the text contains the {name} {token!r} = {id_}, which this tokenizer cannot write as text ({option} names another)"
            bad = BadRecordError(reason, message)
            for index in np.flatnonzero(containing & is_kept & ~found_in_any).tolist():
                reader, origin = batch.origins[index]
                reader.reject(bad, origin, skipped, messages)
            found_in_any |= containing
        return found_in_any


def _count(skipped: Counter[str], reason: str, which: npt.NDArray[np.bool_]) -> None:
    if number := int(which.sum()):
        skipped[reason] += number


def _gathered(batches: Iterator[TextBatch], batch_bytes: int) -> Iterator[TextBatch]:
    """Merge small batches, so that each call of the tokenizer gets enough text even if the files are small."""
    pending, size = TextBatch(), 0
    for batch in batches:
        pending.texts += batch.texts
        pending.records += batch.records
        pending.origins += batch.origins
        size += sum(map(len, batch.texts))
        if size >= batch_bytes // 2:
            yield pending
            pending, size = TextBatch(), 0
    if pending.texts:
        yield pending


class EodInsideError(DataError):
    """A document contains the eod, which would end it too early."""


class AddedIdInsideError(DataError):
    """A document contains the marker or the boundary id, so its text order could not be found again."""


def _outside(token_id: int, vocab_size: int) -> DataError:
    return DataError(
        f"token id {token_id} is outside the vocabulary of {vocab_size:,} ids: the tokenizer is damaged; download it again"
    )


def concatenate_documents(
    text_ids: npt.NDArray[np.uint32],
    offsets: npt.NDArray[np.int64],
    *,
    direction: Direction,
    eod_id: int,
    vocab_size: int,
    dtype: npt.DTypeLike,
    bos_id: int | None = None,
) -> tuple[npt.NDArray[Any], npt.NDArray[np.int32]]:
    """Return (ids, lengths) of documents as a shard stores them: in model order, each closed by an eod.

    text_ids [total]: ids of all documents in text order; offsets [documents + 1]: where each document begins. `bos_id`, if given,
    is first in model order. Documents without tokens are skipped. Returns the ids [total + kept] and the lengths with eod [kept].
    Raises DataError for an id outside [0, vocab_size) or too large for `dtype`, because a numpy cast wraps around silently, and
    EodInsideError for an eod inside a document.
    """
    dtype = np.dtype(dtype)
    if vocab_size - 1 > np.iinfo(dtype).max:
        raise DataError(f"a vocabulary of {vocab_size:,} ids does not fit in {dtype}; use --dtype int32")
    if not 0 <= eod_id < vocab_size:
        raise DataError(f"the eod id {eod_id} is outside the vocabulary of {vocab_size:,} ids; name another --eod-token")
    if bos_id is not None and not 0 <= bos_id < vocab_size:
        raise DataError(f"the bos id {bos_id} is outside the vocabulary of {vocab_size:,} ids; name another --bos-token")
    lengths = np.diff(offsets)
    kept = lengths[lengths > 0]
    added = 1 if bos_id is None else 2
    stored_ids = np.empty(int(kept.sum()) + added * len(kept), dtype)
    bad = concatenate_into(
        text_ids, offsets, stored_ids, direction=direction, eod_id=eod_id, vocab_size=vocab_size, bos_id=bos_id
    )
    if bad >= 0 and int(text_ids[bad]) == eod_id:
        document = int(np.searchsorted(offsets, bad, side="right")) - 1
        raise EodInsideError(f"document {document} contains the eod {eod_id} at its id {bad - int(offsets[document])}")
    if bad >= 0:
        raise _outside(int(text_ids[bad]), vocab_size)
    return stored_ids, (kept + added).astype(np.int32)


pack_documents = concatenate_documents
"""The former name, kept for callers outside the package."""

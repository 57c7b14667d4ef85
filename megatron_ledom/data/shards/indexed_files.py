"""Read `.bin` and `.idx` of any Megatron tool once from start to end, in blocks of whole documents.

Unlike in our shards, the ids may have another integer type, and a document may consist of several consecutive sequences. The
memory used is that of two blocks, or of the longest document.
"""

import hashlib
import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_ledom.data.shards.index_file import CHUNK_DOCUMENTS, DTYPES, MAGIC, index_bytes, map_index, read_header
from megatron_ledom.data.shards.shard import Hash, ShardManifest
from megatron_ledom.errors import DataError
from megatron_ledom.storage.hashes import sha256_of

READABLE = ("uint8", "uint16", "int32", "int64")
BLOCK_BYTES = 1 << 20  # small enough to stay in cache while it is read, hashed, reversed and written


@dataclass(frozen=True, slots=True)
class Block:
    """Consecutive whole documents."""

    first: int
    """Number of the first document."""
    ids: npt.NDArray[Any]
    """Ids as stored [sum(lengths)]."""
    lengths: npt.NDArray[np.int64]
    """Number of stored ids of each document [documents]."""

    def document_at(self, position: int) -> int:
        """Return the number of the document that contains the id at `position` of `ids`."""
        return self.first + int(np.searchsorted(np.cumsum(self.lengths), position, side="right"))


class IndexedFiles:
    """A checked and memory-mapped .idx, and the documents of its .bin."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        path = Path(f"{prefix}.idx")
        if not path.is_file():
            raise DataError(f"{path} is missing; a shard needs it next to its .bin: copy it again")
        magic, version, code, sequences, marks = read_header(str(path))
        if (magic, version) != (MAGIC, 1) or code not in DTYPES:
            raise DataError(f"{path} does not begin like a Megatron index ({magic!r}, version {version}, type {code})")
        if DTYPES[code] not in READABLE:
            raise DataError(f"{path} is for ids of type {DTYPES[code]}, expected one of {', '.join(READABLE)}")
        self.dtype = np.dtype(DTYPES[code])
        self.num_documents = marks - 1
        """Number of documents, including those without ids."""
        self._check_size(path, sequences, marks)
        self._lengths, self._pointers, self._marks = map_index(str(path), sequences, marks - 1)
        self._check_sequences()
        self._check_documents()

    def _check_size(self, path: Path, sequences: int, marks: int) -> None:
        found, size = path.stat().st_size, index_bytes(sequences, marks - 1)
        if marks < 1 or found != size:
            what = "truncated" if found < size else "too long (an index with modes, of a multimodal data set, is not supported)"
            raise DataError(f"{path} is {what}: it has {found:,} bytes, {sequences:,} sequences need {size:,}; copy it again")

    def _check_sequences(self) -> None:
        """Raise DataError for a negative length, for a pointer that is not the sum of the lengths, and for a .bin of another size."""
        num_bytes = 0
        for first in range(0, len(self._lengths), CHUNK_DOCUMENTS):
            lengths = self._lengths[first : first + CHUNK_DOCUMENTS].astype(np.int64)
            if (lengths < 0).any():
                raise DataError(f"{self.prefix}.idx: sequence {first + int((lengths < 0).argmax())} has a negative length")
            pointers = num_bytes + (np.cumsum(lengths) - lengths) * self.dtype.itemsize
            wrong = pointers != self._pointers[first : first + CHUNK_DOCUMENTS]
            if wrong.any():
                raise DataError(
                    f"{self.prefix}.idx: sequence {first + int(wrong.argmax())} does not begin where the one before it ends;"
                    " the index is damaged or belongs to another .bin: copy it again"
                )
            num_bytes += int(lengths.sum()) * self.dtype.itemsize
        self.num_tokens = num_bytes // self.dtype.itemsize
        """Number of stored ids."""
        path = Path(f"{self.prefix}.bin")
        found = path.stat().st_size if path.is_file() else None
        if found != num_bytes:
            has = "is missing" if found is None else f"has {found:,} bytes"
            raise DataError(
                f"{path} {has}, its index needs {num_bytes:,}, so every later document is shifted; copy both files again, or make"
                " them again"
            )

    def _check_documents(self) -> None:
        count = len(self._lengths)
        before = 0
        for first in range(0, len(self._marks), CHUNK_DOCUMENTS):
            marks = self._marks[first : first + CHUNK_DOCUMENTS]
            wrong = np.diff(marks, prepend=before) < 0
            if (first == 0 and marks[0] != 0) or wrong.any():
                document = first + int(wrong.argmax())
                raise DataError(f"{self.prefix}.idx: document {document} begins before the previous one; copy it again")
            before = int(marks[-1])
        if before != count:
            raise DataError(f"{self.prefix}.idx: its documents end at sequence {before:,} of {count:,}; copy it again")

    def document_lengths(self, first: int, last: int) -> npt.NDArray[np.int64]:
        """Return the number of ids of documents `first` to `last` - 1 [last - first], summed over their sequences."""
        marks = self._marks[first : last + 1]
        ends = np.zeros(int(marks[-1] - marks[0]) + 1, np.int64)
        np.cumsum(self._lengths[marks[0] : marks[-1]], out=ends[1:])
        lengths: npt.NDArray[np.int64] = np.diff(ends[marks - marks[0]])
        return lengths

    def last_ids(self, most_documents: int) -> Iterator[tuple[int, int]]:
        """Yield (number, last id) of the first `most_documents` documents, except those without ids."""
        ids = np.memmap(f"{self.prefix}.bin", mode="r", dtype=self.dtype) if self.num_tokens else None
        lengths = self.document_lengths(0, min(most_documents, self.num_documents))
        for document, (length, end) in enumerate(zip(lengths.tolist(), np.cumsum(lengths).tolist(), strict=True)):
            if ids is not None and length:
                yield document, int(ids[end - 1])

    def blocks(self, digest: Hash | None = None, block_bytes: int = BLOCK_BYTES) -> Iterator[Block]:
        """Yield every document once, in order, and update `digest` with all of .bin. A thread reads the next block meanwhile.

        The ids of a block are valid until the next block but one: new memory for each block would cost more than reading it.
        """
        most_ids = max(1, block_bytes // self.dtype.itemsize)
        parts = self._parts(most_ids)
        buffers = itertools.cycle([np.empty(most_ids, self.dtype) for _ in range(3)])
        with open(f"{self.prefix}.bin", "rb", buffering=0) as stream, ThreadPoolExecutor(1) as reading:
            coming = None
            for first, lengths in parts:
                following = reading.submit(self._read, stream, first, lengths, digest, next(buffers))
                if coming is not None:
                    yield coming.result()
                coming = following
            if coming is not None:
                yield coming.result()

    def _parts(self, most_ids: int) -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
        """Yield (number of the first document, lengths) of blocks of at most `most_ids` ids, or of one longer document."""
        for start in range(0, self.num_documents, CHUNK_DOCUMENTS):
            lengths = self.document_lengths(start, min(start + CHUNK_DOCUMENTS, self.num_documents))
            ends = np.cumsum(lengths)
            first, before = 0, 0
            while first < len(lengths):
                last = max(first + 1, int(np.searchsorted(ends, before + most_ids, side="right")))
                yield start + first, lengths[first:last]
                first, before = last, int(ends[last - 1])

    def _read(
        self,
        stream: FileIO,
        first: int,
        lengths: npt.NDArray[np.int64],
        digest: Hash | None,
        buffer: npt.NDArray[Any],
    ) -> Block:
        total = int(lengths.sum())
        ids = buffer[:total] if total <= len(buffer) else np.empty(total, self.dtype)
        content = ids.view(np.uint8).data
        filled = 0
        while filled < len(content):
            read = stream.readinto(content[filled:])
            if not read:
                raise DataError(
                    f"{self.prefix}.bin became shorter while it was read: another program changes it; copy it again"
                )
            filled += read
        if digest is not None:
            digest.update(content)
        return Block(first, ids, lengths)


def shard_blocks(prefix: str, manifest: ShardManifest) -> Iterator[Block]:
    """Yield every document of one of our shards once, in order, then compare .bin with its sha256.

    The copy of a damaged shard would look intact, so the caller must not publish its result before the last block.
    """
    files = IndexedFiles(prefix)
    _check_unchanged(f"{prefix}.idx", manifest.idx_sha256, sha256_of(f"{prefix}.idx"))
    digest = hashlib.sha256()
    yield from files.blocks(digest)
    _check_unchanged(f"{prefix}.bin", manifest.bin_sha256, digest.hexdigest())


def _check_unchanged(path: str, expected: str, found: str) -> None:
    if found != expected:
        raise DataError(
            f"{path} does not have the sha256 of its manifest: its content was changed or damaged; run"
            f" ledom inspect-shard {path[:-4]} --verify to see the problem, and copy the shard again"
        )

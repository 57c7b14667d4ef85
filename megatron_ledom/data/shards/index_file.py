"""PREFIX.idx, megatron-core's index of documents: the number of sequences of ids in .bin, and where each begins.

Little-endian: `MMIDIDX\\0\\0`, u64 version 1, u8 dtype code, u64 sequences n, u64 m, i32 lengths [n], i64 byte pointers [n], i64
document indices [m]: the first sequence of each document, and n. In our shards every document is one sequence, so m is n + 1 and
the document indices are 0..n.
"""

import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_ledom.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float64", 7: "float32", 8: "uint16"}
"""numpy names by megatron-core's codes."""
SHARD_DTYPES = ("int32", "uint16")
"""Types of the ids in our shards."""
CHUNK_DOCUMENTS = 1 << 16
"""Documents that are processed at a time."""


class IndexArrays(NamedTuple):
    """The memory-mapped arrays of an index."""

    lengths: npt.NDArray[np.int32]
    """Number of ids of each sequence [sequences]."""
    pointers: npt.NDArray[np.int64]
    """Byte of .bin where each sequence begins [sequences]."""
    document_indices: npt.NDArray[np.int64]
    """First sequence of each document, and the number of sequences [documents + 1]."""


def index_bytes(num_sequences: int, num_documents: int) -> int:
    """Return the size of an index in bytes."""
    return HEADER.size + 12 * num_sequences + 8 * (num_documents + 1)


def shard_header(dtype: str, num_documents: int) -> tuple[bytes, int, int, int, int]:
    """Return the header of one of our shards."""
    code = next(code for code, name in DTYPES.items() if name == dtype)
    return MAGIC, 1, code, num_documents, num_documents + 1


def read_header(path: str) -> tuple[bytes, int, int, int, int]:
    """Return (magic, version, dtype code, sequences, documents + 1). Raises DataError if the file is shorter than that."""
    with open(path, "rb") as stream:
        content = stream.read(HEADER.size)
    if len(content) < HEADER.size:
        raise DataError(
            f"{path} is truncated: it has {len(content)} bytes, its header alone needs {HEADER.size}; copy it again"
        )
    magic, version, code, num_sequences, marks = HEADER.unpack(content)
    return magic, version, code, num_sequences, marks


def map_index(path: str, num_sequences: int, num_documents: int) -> IndexArrays:
    """Return the arrays of an index with these numbers. Raises DataError if the file is too short for them."""
    index = np.memmap(path, mode="r", dtype=np.uint8)
    if index.size < index_bytes(num_sequences, num_documents):
        raise DataError(f"{path} is truncated; copy the shard again")
    return IndexArrays(
        np.frombuffer(index, "<i4", num_sequences, HEADER.size),
        np.frombuffer(index, "<i8", num_sequences, HEADER.size + 4 * num_sequences),
        np.frombuffer(index, "<i8", num_documents + 1, HEADER.size + 12 * num_sequences),
    )


def index_blocks(lengths: npt.NDArray[np.int32], dtype: np.dtype[Any]) -> Iterator[bytes]:
    """Yield the content of `.idx` for documents of `lengths` [documents] ids of `dtype`, in blocks."""
    count = len(lengths)
    starts = range(0, count, CHUNK_DOCUMENTS)
    yield HEADER.pack(*shard_header(dtype.name, count))
    for start in starts:
        yield lengths[start : start + CHUNK_DOCUMENTS].astype("<i4", copy=False).tobytes()
    before = 0
    for start in starts:
        ends = np.cumsum(lengths[start : start + CHUNK_DOCUMENTS], dtype="<i8")
        pointers = (before + ends - lengths[start : start + CHUNK_DOCUMENTS]) * dtype.itemsize
        yield pointers.astype("<i8", copy=False).tobytes()
        before += int(ends[-1])
    for start in range(0, count + 1, CHUNK_DOCUMENTS):
        yield np.arange(start, min(start + CHUNK_DOCUMENTS, count + 1), dtype="<i8").tobytes()

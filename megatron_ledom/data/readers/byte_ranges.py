"""The byte ranges of input files that a task reads, cut into parts, the units in which work is done and resumed.

Work is divided by bytes. The files are sorted by path and counted as one long sequence of bytes, of which every task owns
an equal range. A record belongs to the range in which it begins. So one file of 500 GB divides as well as 500,000 small ones.
"""

import os
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_ledom.errors import UsageError

Kind = Literal["lines", "parquet", "arrow", "text", "warc"]
Compression = Literal["", "gz", "zst", "bz2", "xz"]
ENDINGS: dict[str, Kind] = {
    ".jsonl": "lines",
    ".ndjson": "lines",
    ".json": "lines",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".txt": "text",
    ".warc": "warc",
    ".wet": "warc",
}
COMPRESSIONS: tuple[Compression, ...] = ("gz", "zst", "bz2", "xz")
COMPRESSED_BLOCK = 1 << 16
"""Compressed input is read in blocks of this size; a byte range of a compressed file begins and ends with one."""
PART_BYTES = 32 << 20
"""Approximate upper limit of the input of one part, and so of the work that a worker loses when it is killed."""
SMALL_PART_BYTES = 4 << 20
"""Size of the parts of a small task, so that all workers are busy until its end."""
PARTS_OF_A_TASK = 128
"""Intended number of parts, while their size stays between these two limits."""
COMPRESSED_PART_BYTES = 256 << 20
"""Size of a part of a compressed file. Each part decompresses the file from its start, so smaller parts repeat more work."""
MOST_COMPRESSED_PARTS = 64
"""Limit on the parts of one compressed file, for the same reason. With 64 parts a file is decompressed 32 times over in total."""


@dataclass(frozen=True, slots=True)
class InputPath:
    """One input file, local or in an object store."""

    path: str
    """As the user wrote it; with a protocol such as s3:// for an object store."""
    num_bytes: int
    version: str
    """Time of modification, or the hash or ETag that the store names. If it differs, finished work belongs to another file."""

    @property
    def compression(self) -> Compression:
        """The compression, by the ending; empty for none."""
        return next((name for name in COMPRESSIONS if self.path.endswith(f".{name}")), "")

    @property
    def kind(self) -> Kind:
        """The format, by the ending."""
        kind = kind_of(self.path)
        assert kind is not None, self.path
        return kind

    @property
    def is_divisible(self) -> bool:
        """Return True if several workers can share the file: JSON lines divide at line ends, tables between row groups."""
        if self.kind == "lines":
            return not self.compression or self.num_bytes >= COMPRESSED_PART_BYTES
        return self.kind in ("parquet", "arrow")


def kind_of(path: str) -> Kind | None:
    """Return the format of a file by its ending, or None if the ending is unknown."""
    for name in COMPRESSIONS:
        inner = path.removesuffix(f".{name}")
        if inner != path:
            kind = ENDINGS.get(os.path.splitext(inner)[1])
            return None if kind in ("parquet", "arrow") else kind
    return ENDINGS.get(os.path.splitext(path)[1])


@dataclass(frozen=True, slots=True)
class ByteRange:
    """Bytes [start, end) of a file, and the records that begin there. In a compressed file these are compressed bytes."""

    source: InputPath
    start: int
    end: int

    @property
    def num_bytes(self) -> int:
        """Length in bytes."""
        return self.end - self.start


Part = tuple[ByteRange, ...]
"""Consecutive byte ranges, which one worker processes at a time."""


def byte_ranges_of_task(sources: Sequence[InputPath], task_id: int, num_tasks: int) -> list[ByteRange]:
    """Return the byte ranges of a task, in order. All tasks together cover every byte once, in equal amounts.

    A file that cannot be divided belongs to the task whose range contains its first byte. An empty file gives an empty range.
    """
    if num_tasks < 1:
        raise UsageError(f"--num-tasks {num_tasks} is not possible; use 1 or more")
    if not 0 <= task_id < num_tasks:
        raise UsageError(f"--task-id {task_id} is not in 0..{num_tasks - 1} (--num-tasks {num_tasks})")
    begins = [0]
    for source in sources:
        begins.append(begins[-1] + source.num_bytes)
    total = begins[-1]
    low, high = total * task_id // num_tasks, total * (task_id + 1) // num_tasks
    owned = []
    for index in range(max(0, bisect_left(begins, low) - 1), len(sources)):
        source, begin = sources[index], begins[index]
        if begin >= high and (source.num_bytes or task_id + 1 < num_tasks):
            break
        if source.is_divisible and source.num_bytes:
            start, end = _aligned(source, low - begin), _aligned(source, high - begin)
            if start < end:
                owned.append(ByteRange(source, start, end))
        elif low <= begin:
            owned.append(ByteRange(source, 0, source.num_bytes))
    return owned


def _aligned(source: InputPath, position: int) -> int:
    """Return the cut of the file nearest to a position: within the file, and between blocks if it is compressed."""
    inside = min(max(position, 0), source.num_bytes)
    if not source.compression or inside in (0, source.num_bytes):
        return inside
    return inside // COMPRESSED_BLOCK * COMPRESSED_BLOCK


def parts_of(byte_ranges: Sequence[ByteRange], part_bytes: int | None = None) -> list[Part]:
    """Cut and group byte ranges into parts of about `part_bytes`.

    By default the size follows from the total of all byte ranges, so a task is always cut in the same way.
    """
    if part_bytes is None:
        in_all = sum(byte_range.num_bytes for byte_range in byte_ranges)
        part_bytes = min(PART_BYTES, max(SMALL_PART_BYTES, in_all // PARTS_OF_A_TASK))
    parts: list[Part] = []
    gathered: list[ByteRange] = []
    size = 0
    for piece in _pieces(byte_ranges, part_bytes):
        if gathered and size + piece.num_bytes > part_bytes:
            parts.append(tuple(gathered))
            gathered, size = [], 0
        gathered.append(piece)
        size += piece.num_bytes
    if gathered:
        parts.append(tuple(gathered))
    return parts


def _pieces(byte_ranges: Sequence[ByteRange], part_bytes: int) -> Iterator[ByteRange]:
    for byte_range in byte_ranges:
        source = byte_range.source
        if not source.is_divisible or not byte_range.num_bytes:
            yield byte_range
            continue
        blocks = -(-source.num_bytes // (MOST_COMPRESSED_PARTS * COMPRESSED_BLOCK))
        step = max(COMPRESSED_PART_BYTES, blocks * COMPRESSED_BLOCK) if source.compression else part_bytes
        for start in range(byte_range.start, byte_range.end, step):
            yield ByteRange(source, start, min(start + step, byte_range.end))

"""Read bytes of input files, from the disk or an object store: decompress them and cut them into blocks of whole lines."""

import bz2
import contextlib
import functools
import hashlib
import lzma
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from megatron_ledom.data.readers.byte_ranges import COMPRESSED_BLOCK, ByteRange, InputPath
from megatron_ledom.data.readers.remote import changed, is_remote
from megatron_ledom.data.readers.remote_stream import REMOTE_READ_BYTES, opened_remote
from megatron_ledom.errors import DataError

READ_BYTES = 1 << 20  # for larger blocks the system allocates new pages every time, 4 KB by 4 KB
MAX_RECORD_BYTES = 256 << 20
HEAD_BYTES = 256
"""Bytes at the start of a byte range that are kept, to recognize the format of the file."""
NAMED_LINES_BYTES = 256 << 20
"""Up to this position a skipped line is named by its number, which requires reading the file up to the line."""
DECOMPRESSED_AT_ONCE = 1 << 10
"""Compressed bytes that a decompressor gets at a time. They become at most 32 MB with zst, and 1 MB with gz."""
DECOMPRESSED_AT_MOST = 1 << 22
"""Limit on the bytes taken at a time from a decompressor that can stop. 3 KB of bz2 can become that much."""

MAGIC = {
    b"\x1f\x8b": "gz",
    b"\x28\xb5\x2f\xfd": "zst",
    b"BZh": "bz2",
    b"\xfd7zXZ\x00": "xz",
    b"PAR1": "parquet",
    b"ARROW1": "arrow",
}


class BadRecordError(Exception):
    """A record that cannot be used. `reason` is its key in the counts."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def too_large(size: int, limit: int) -> BadRecordError:
    """Return the error for a record of more than `limit` bytes."""
    message = f"a record of {size:,} bytes, more than the limit of {limit:,} (--max-record-bytes)"
    return BadRecordError("too_large", message)


@dataclass(slots=True)
class LineBlock:
    """Consecutive whole lines of a file, or one line that was too long to keep."""

    lines: list[bytes]
    """Without line breaks. The last one is empty if the block ends with a line break."""
    first: int
    """Number of the first line within the byte range, from 0."""
    is_first_of_file: bool = False
    too_long: int | None = None
    """Length in bytes of the one skipped line; the block then contains no other line."""


@dataclass(slots=True)
class Progress:
    """Number and hash of the bytes of a byte range that were read so far."""

    num_bytes: int = 0
    digest: Any = field(default_factory=hashlib.sha256)

    def count(self, content: bytes | memoryview) -> None:
        """Add bytes of the byte range."""
        self.num_bytes += len(content)
        self.digest.update(content)


@contextlib.contextmanager
def opened(source: InputPath, read_bytes: int = REMOTE_READ_BYTES, end: int | None = None) -> Iterator[Any]:
    """Open a file for reading bytes. `read_bytes` is the size of one request to an object store, which does not pass `end`.

    Raises DataError with the name of the file if it cannot be read or has changed since the run began, and TransientError if a
    server does not answer.
    """
    if is_remote(source.path):
        yield from opened_remote(source, read_bytes, source.num_bytes if end is None else end)
        return
    try:
        with open(source.path, "rb", buffering=0) as local:
            _check_unchanged(source)
            yield local
            _check_unchanged(source)
    except OSError as error:
        raise DataError(
            f"{source.path} cannot be read ({error.strerror or error}); check the disk, or omit the file"
        ) from error


def _check_unchanged(source: InputPath) -> None:
    """Refuse a file that was replaced or written to, because the corpus would mix its old and its new content."""
    state = os.stat(source.path)
    if state.st_size != source.num_bytes:
        raise changed(source, f"ends at byte {state.st_size:,}, it had {source.num_bytes:,} when this run began")
    if str(state.st_mtime_ns) != source.version:
        raise changed(source, "was written to since this run began")


def raw_blocks(
    source: InputPath, start: int, end: int, size: int = READ_BYTES, read_bytes: int = REMOTE_READ_BYTES
) -> Iterator[bytes]:
    """Yield bytes [start, end) of a file as it is stored, in blocks that end at multiples of `size` after `start`.

    read_bytes: size of one request to an object store.
    """
    with opened(source, read_bytes, end) as stream:
        if start:
            stream.seek(start)
        position = start
        while position < end:
            block = _read_exactly(stream, min(size, end - position))
            if not block:
                raise changed(source, f"ends at byte {position:,}, it had {source.num_bytes:,} when this run began")
            yield block
            position += len(block)


def _read_exactly(stream: Any, size: int) -> bytes:
    """Return `size` bytes, fewer only at the end of the file. One read of a pipe or a network may return less."""
    block: bytes = stream.read(size)
    if len(block) == size or not block:
        return block
    gathered = bytearray(block)
    while len(gathered) < size and (block := stream.read(size - len(gathered))):
        gathered += block
    return bytes(gathered)


def _decompressor(compression: str) -> tuple[Callable[[], Any], tuple[type[Exception], ...]]:
    """Return (function that makes a decompressor, errors that it raises for damaged data)."""
    if compression == "gz":
        from isal import isal_zlib

        failures: Any = (isal_zlib.error, zlib.error)
        return lambda: isal_zlib.decompressobj(wbits=31), failures
    if compression == "bz2":
        return bz2.BZ2Decompressor, (OSError, ValueError)
    if compression == "xz":
        return lzma.LZMADecompressor, (lzma.LZMAError,)
    import zstandard

    return lambda: zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj(), (zstandard.ZstdError,)


def _contents(source: InputPath, decompressor: Any, block: bytes, failures: tuple[type[Exception], ...]) -> Iterator[bytes]:
    """Yield the decompressed content of a block, in pieces if the decompressor can stop."""
    try:
        if not hasattr(decompressor, "needs_input"):
            yield decompressor.decompress(block)
            return
        yield decompressor.decompress(block, DECOMPRESSED_AT_MOST)
        while not (decompressor.eof or decompressor.needs_input):
            yield decompressor.decompress(b"", DECOMPRESSED_AT_MOST)
    except failures as error:
        raise DataError(f"{source.path} is damaged ({error}){_true_kind(source)}; download it again, or omit it") from error


def decompressed_blocks(source: InputPath, blocks: Iterator[bytes]) -> Iterator[tuple[int, bytes]]:
    """Yield (position of the stored block, decompressed content) for a file of one or more members or frames.

    Raises DataError if the compressed data is truncated.
    """
    start, failures = _decompressor(source.compression)
    decompressor = None
    position = 0
    for stored in blocks:
        for begin in range(0, len(stored), DECOMPRESSED_AT_ONCE):
            block = stored[begin : begin + DECOMPRESSED_AT_ONCE]
            while block := block if decompressor else block.lstrip(b"\0"):  # members may be padded with zeros
                decompressor = decompressor or start()
                yield from ((position, content) for content in _contents(source, decompressor, block, failures))
                block = decompressor.unused_data if decompressor.eof else b""
                decompressor = None if decompressor.eof else decompressor
        position += len(stored)
    if decompressor is not None:
        raise DataError(f"{source.path} is truncated: its compressed data ends too early; download it again, or omit it")


def _kind_of(head: bytes) -> str | None:
    return next((name for magic, name in MAGIC.items() if head.startswith(magic)), None)


def _true_kind(source: InputPath) -> str:
    """Return a remark on the true format of a file, by its first bytes; empty if that is the format of its ending."""
    head = next(raw_blocks(source, 0, min(8, source.num_bytes)), b"")
    kind = _kind_of(head)
    if kind == source.compression:
        return ""
    return f": it begins like .{kind}" if kind else ": it is not compressed" if head[:1] in (b"{", b"[") else ""


def plain_blocks(source: InputPath, start: int, end: int, size: int = READ_BYTES) -> Iterator[bytes]:
    """Yield the blocks of `raw_blocks`. Raises DataError if the file is compressed although its ending is not."""
    for number, block in enumerate(raw_blocks(source, start, end, size)):
        if number == 0 and start == 0 and (kind := _kind_of(block)):
            raise DataError(f"{source.path} does not match its ending: it begins like .{kind}; rename it, or omit it")
        yield block


def marked_blocks(byte_range: ByteRange, progress: Progress) -> Iterator[tuple[int, bytes]]:
    """Yield (mark, bytes) of a file from before a byte range to the end of the file. Marks are positions in the stored file.

    Blocks with a mark in [start, end) belong to the byte range. If it does not begin the file, an earlier block comes first, so
    that the caller sees if the byte range begins with a new line.
    """
    source = byte_range.source
    if source.compression:
        yield from decompressed_blocks(source, _counted(byte_range, progress))
        return
    position = max(0, byte_range.start - 1)
    if byte_range.start:
        yield position, next(raw_blocks(source, position, byte_range.start), b"")
    position = byte_range.start
    for block in plain_blocks(source, byte_range.start, byte_range.end):
        progress.count(block)
        yield position, block
        position += len(block)
    for block in raw_blocks(source, byte_range.end, source.num_bytes, COMPRESSED_BLOCK, COMPRESSED_BLOCK):
        yield position, block
        position += len(block)


def whole_file(byte_range: ByteRange, progress: Progress, *, refuse_compressed: bool = False) -> Iterator[bytes]:
    """Yield the decompressed bytes of a byte range that is a whole file.

    With `refuse_compressed` a file that is compressed although its ending is not raises DataError, see `plain_blocks`.
    """
    if byte_range.source.compression:
        yield from (content for _, content in decompressed_blocks(byte_range.source, _counted(byte_range, progress)))
    else:
        yield from _counted(byte_range, progress, plain_blocks if refuse_compressed else raw_blocks)


def _counted(byte_range: ByteRange, progress: Progress, read: Callable[..., Iterator[bytes]] = raw_blocks) -> Iterator[bytes]:
    position = 0
    for block in read(byte_range.source, 0, byte_range.source.num_bytes, COMPRESSED_BLOCK):
        if byte_range.start <= position < byte_range.end:
            progress.count(block)
        yield block
        position += len(block)


class LineCounter:
    """Counter of the lines before positions of a file that is not compressed. Rising positions read the file once."""

    def __init__(self, source: InputPath) -> None:
        self._source = source
        self._position, self._ends, self._last = 0, 0, b""

    def lines_before(self, start: int) -> int:
        """Return the number of lines that begin before byte `start`, including one that continues there."""
        if start < self._position:
            self._position, self._ends, self._last = 0, 0, b""
        for block in raw_blocks(self._source, self._position, start) if start > self._position else ():
            self._ends += block.count(b"\n")
            self._last = block[-1:]
            self._position += len(block)
        return self._ends + (self._last not in (b"", b"\n"))


@functools.lru_cache(maxsize=64)
def _line_counter(source: InputPath) -> LineCounter:
    """Return the counter of a file, which this process keeps: a record of each part of a file may have to be named."""
    return LineCounter(source)


class LineReader:
    """Reader of the lines that begin in a byte range, as blocks of whole lines."""

    def __init__(self, byte_range: ByteRange, batch_bytes: int, max_record_bytes: int = MAX_RECORD_BYTES) -> None:
        self.byte_range = byte_range
        self.progress = Progress()
        self._batch_bytes = batch_bytes
        self._max_record_bytes = max_record_bytes
        self.head = b""
        """The first bytes of the byte range, even of a line that is too long to keep."""
        self._pending = bytearray()
        self._searched = 0
        self._num_lines = 0
        self._dropped = 0
        """Bytes read so far of a line that is too long; 0 outside of such a line."""
        self._before: int | None = None
        """Number of lines before the byte range; None until they are counted."""

    def blocks(self) -> Iterator[LineBlock]:
        """Yield the lines, about `batch_bytes` at a time. Memory is bounded even for very long lines."""
        at_line_start = True
        for mark, content in marked_blocks(self.byte_range, self.progress):
            if mark < self.byte_range.start:
                at_line_start = content.endswith(b"\n") if content else at_line_start
                continue
            block: bytes | memoryview = content
            if not at_line_start:  # the rest of a line that began before the byte range
                block = content[content.find(b"\n") + 1 :] if b"\n" in content else b""
                at_line_start = b"\n" in content
            if mark >= self.byte_range.end:
                if not self._dropped and (not self._pending or self._pending.endswith(b"\n")):
                    break
                cut = content.find(b"\n")
                yield from self._take(content[: cut + 1] if cut >= 0 else content)
                if cut >= 0:
                    break
            else:
                yield from self._take(block)
        yield from self._rest()

    def _take(self, block: bytes | memoryview) -> Iterator[LineBlock]:
        for begin in range(0, len(block), self._batch_bytes):
            self._pending += block[begin : begin + self._batch_bytes]
            if len(self.head) < HEAD_BYTES:
                self.head += bytes(block[begin : begin + min(self._batch_bytes, HEAD_BYTES)])
            if self._dropped:
                yield from self._drop()
            if len(self._pending) < self._batch_bytes:
                continue
            cut = self._pending.rfind(b"\n", self._searched) + 1
            self._searched = len(self._pending)  # so that a line longer than a batch is searched only once
            if cut:
                yield self._cut(cut)
            elif len(self._pending) > self._max_record_bytes:
                self._dropped = len(self._pending)
                self._pending.clear()
                self._searched = 0

    def _cut(self, cut: int) -> LineBlock:
        with memoryview(self._pending) as pending:
            block = self._block(bytes(pending[:cut]))
        self._num_lines += len(block.lines) - 1
        del self._pending[:cut]
        self._searched = 0
        return block

    def _block(self, content: bytes, too_long: int | None = None) -> LineBlock:
        is_first = self._num_lines == 0 and self.byte_range.start == 0
        return LineBlock(content.split(b"\n"), self._num_lines, is_first, too_long)

    def _drop(self) -> Iterator[LineBlock]:
        """Skip the next bytes of a line that is too long, and count them."""
        end = self._pending.find(b"\n") + 1
        self._dropped += end or len(self._pending)
        del self._pending[: end or len(self._pending)]
        self._searched = 0
        if end:
            yield self._block(b"", self._dropped - 1)
            self._num_lines += 1
            self._dropped = 0

    def _rest(self) -> Iterator[LineBlock]:
        if self._dropped:
            yield self._block(b"", self._dropped)
        if self._pending:
            yield self._block(bytes(self._pending))

    def name_line(self, number: int, exactly: bool = True) -> str:
        """Return FILE:LINE for line `number` (from 0) of the byte range, for messages.

        This reads the file before the byte range, once. If not `exactly`, a line far into a file or in an object store is
        named by its position in the byte range instead.
        """
        source, start = self.byte_range.source, self.byte_range.start
        if not exactly and start and (start > NAMED_LINES_BYTES or is_remote(source.path)):
            return f"{source.path}: line {number + 1:,} after byte {start:,}"
        if self._before is None:
            self._before = self._lines_before()
        return f"{source.path}:{self._before + number + 1}"

    def _lines_before(self) -> int:
        """Return the number of lines that begin before the byte range, including one that continues into it."""
        if not self.byte_range.start:
            return 0
        if not self.byte_range.source.compression:
            return _line_counter(self.byte_range.source).lines_before(self.byte_range.start)
        before, last = 0, b""
        for mark, content in marked_blocks(ByteRange(self.byte_range.source, 0, self.byte_range.start), Progress()):
            if mark >= self.byte_range.start:
                break
            before += content.count(b"\n")
            last = content[-1:] or last
        return before + (last != b"\n")

"""Read the texts of web archives: the `conversion` records of WET files, each the plain text of one page."""

import io
from collections.abc import Iterator, Mapping
from typing import Any

from megatron_ledom.data.readers.byte_ranges import ByteRange
from megatron_ledom.data.readers.streams import BadRecordError, Progress, whole_file
from megatron_ledom.data.readers.tables import Rows
from megatron_ledom.errors import DataError, LedomError, UsageError


class _Decompressed(io.RawIOBase):
    """The archive as a stream of decompressed bytes. Unlike fastwarc's own decompression it recognizes a truncated file."""

    def __init__(self, byte_range: ByteRange, progress: Progress) -> None:
        self._blocks = whole_file(byte_range, progress)
        self._rest = memoryview(b"")  # slices without copying: a block can be large, and is read in small pieces
        self._position = 0

    def read(self, size: int = -1) -> bytes:
        """Return up to `size` bytes; none at the end."""
        while not self._rest:
            block = next(self._blocks, None)
            if block is None:
                return b""
            self._rest = memoryview(block)
        size = len(self._rest) if size < 0 else size
        taken, self._rest = bytes(self._rest[:size]), self._rest[size:]
        self._position += len(taken)
        return taken

    def tell(self) -> int:
        """Return the number of decompressed bytes read so far."""
        return self._position

    def readable(self) -> bool:
        """Return True."""
        return True


def read_rows(
    byte_range: ByteRange, text_key: str, keep_records: bool, progress: Progress, max_record_bytes: int
) -> Iterator[Rows]:
    """Yield the text records of the archive, one at a time. The fields of a record are its text and its headers.

    A record longer than `max_record_bytes` is cut to one byte more, so that the caller recognizes it as too long.
    """
    try:
        from fastwarc.warc import ArchiveIterator, WarcRecordType
    except ImportError as error:
        raise UsageError(
            f"{byte_range.source.path}: web archives need fastwarc; install it (pip install 'megatron-ledom[warc]')"
        ) from error
    path, number, others = byte_range.source.path, 0, 0
    stream: Any = _Decompressed(byte_range, progress)
    try:
        for record in ArchiveIterator(stream, parse_http=False):
            if record.record_type != WarcRecordType.conversion:
                others += record.record_type in (WarcRecordType.response, WarcRecordType.resource)
                continue
            content = record.reader.read(max_record_bytes + 1)
            if len(content) < min(record.content_length, max_record_bytes + 1):
                raise DataError(
                    f"{path} is truncated: its text record {number + 1} ends too early; download it again, or omit it"
                )
            records: list[Mapping[str, Any] | BadRecordError] = []
            if keep_records:
                records = [{**dict(record.headers), text_key: content.decode("utf-8", "replace")}]
            yield Rows(number, [content], records, progress.num_bytes, "text record")
            number += 1
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, LedomError):
            raise
        raise DataError(f"{path} is damaged or not a web archive ({error}); download it again, or omit it") from error
    while stream.read(1 << 20):  # raises if the rest of the file is truncated
        pass
    if others and not number:
        raise DataError(
            f"{path} contains {others:,} web pages but no text (no `conversion` record); extract their text first, or give"
            " the WET file of the archive"
        )

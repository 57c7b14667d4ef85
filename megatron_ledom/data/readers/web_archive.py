"""Texts of web archives: the `conversion` records of WET files, which hold the plain text of a page each."""

import io
from collections.abc import Iterator, Mapping
from typing import Any

from megatron_ledom.data.readers.byte_ranges import ByteRange
from megatron_ledom.data.readers.streams import BadRecordError, Progress, whole_file
from megatron_ledom.data.readers.tables import Rows
from megatron_ledom.errors import DataError, LedomError, UsageError


class _Decompressed(io.RawIOBase):
    """The archive as a stream of plain bytes; our own decompression tells a truncated file from a finished one."""

    def __init__(self, byte_range: ByteRange, progress: Progress) -> None:
        self._blocks = whole_file(byte_range, progress)
        self._rest = memoryview(b"")  # a slice of it is no copy: a block can be large, and is read in small pieces
        self._position = 0

    def read(self, size: int = -1) -> bytes:
        """Up to `size` bytes; none at the end."""
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
        """Plain bytes given so far."""
        return self._position

    def readable(self) -> bool:
        """It is."""
        return True


def read_rows(
    byte_range: ByteRange, text_key: str, keep_records: bool, progress: Progress, max_record_bytes: int
) -> Iterator[Rows]:
    """The text records of the archive, one at a time; a record's headers are its fields besides the text.

    Of a record longer than `max_record_bytes` one byte more than that is given, so that it is seen to be too long.
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
                    f"{path} is truncated: its text record {number + 1} ends too early; fetch it again, or leave it out"
                )
            records: list[Mapping[str, Any] | BadRecordError] = []
            if keep_records:
                records = [{**dict(record.headers), text_key: content.decode("utf-8", "replace")}]
            yield Rows(number, [content], records, progress.num_bytes, "text record")
            number += 1
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, LedomError):
            raise
        raise DataError(f"{path} is damaged or no web archive ({error}); fetch it again, or leave it out") from error
    while stream.read(1 << 20):  # what is left decides whether the file is whole
        pass
    if others and not number:
        raise DataError(
            f"{path} holds {others:,} web pages and no text (no `conversion` record); extract their text first, or give the"
            " archive's WET file"
        )

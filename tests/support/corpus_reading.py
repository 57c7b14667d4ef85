"""Helpers for tests of the readers: read one input file, and make a web archive."""

from pathlib import Path

from megatron_ledom.data.readers.byte_ranges import ByteRange, InputPath
from megatron_ledom.data.readers.input_files import expand_inputs
from megatron_ledom.data.readers.records import ReadSettings, RecordReader


def source(path: Path) -> InputPath:
    (found,) = expand_inputs([str(path)])
    return found


def whole(path: Path) -> ByteRange:
    return ByteRange(source(path), 0, path.stat().st_size)


def skim(path: Path, key: str = "text", **settings: object) -> tuple[list[str], dict[str, int], list[str]]:
    """Return (all texts, skipped records by reason, messages)."""
    read = ReadSettings(**{"text_key": key, "on_error": "skip", "batch_bytes": 64, **settings})  # type: ignore[arg-type]
    reader = RecordReader(whole(path), read)
    texts = [text for batch in reader.batches() for text in batch.texts]
    return texts, dict(reader.skipped), reader.messages


def warc_of(*records: tuple[str, bytes]) -> bytes:
    """Return a web archive with records of (type, content)."""
    head = "WARC/1.0\r\nWARC-Type: {}\r\nWARC-Record-ID: <urn:uuid:0-{}>\r\nContent-Length: {}\r\n\r\n"
    pieces = [
        head.format(kind, number, len(content)).encode() + content + b"\r\n\r\n"
        for number, (kind, content) in enumerate(records)
    ]
    return b"".join(pieces)

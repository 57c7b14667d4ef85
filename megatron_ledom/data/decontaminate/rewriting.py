"""Write a file of a corpus again, in its format, without evaluation items. Untouched lines and rows stay as they are."""

import bz2
import contextlib
import gzip
import json
import lzma
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

import orjson
import zstandard

from megatron_ledom.contamination.report import ContaminationCounts
from megatron_ledom.contamination.search import Searcher
from megatron_ledom.data.decontaminate.batches import remains
from megatron_ledom.data.readers.byte_ranges import ByteRange, Compression, InputPath
from megatron_ledom.data.readers.records import ReadSettings, RecordReader, TextBatch
from megatron_ledom.errors import UsageError
from megatron_ledom.storage.files import new_file

WRITABLE = ("lines", "parquet")
"""Kinds of files that can be written again."""
ROWS_AT_ONCE = 1000


def check_writable(source: InputPath, text_key: str) -> None:
    """Raise UsageError for an input that this command cannot write in its own format."""
    if source.kind not in WRITABLE or "://" in source.path:
        raise UsageError(
            f"--action drop and cut write local JSON lines and Parquet files, and {source.path} is not one; use --action report, or"
            " ledom preprocess-data --decontaminate, which reads every format"
        )
    if source.kind == "parquet" and "." in text_key:
        raise UsageError(f"--text-key {text_key} is a field inside a column, which cannot be written again; name a column")


def rewrite(source: InputPath, target: str, searcher: Searcher, read: ReadSettings) -> tuple[ContaminationCounts, RecordReader]:
    """Write `source` to `target`, whole or not at all. Returns the counts, and the reader with the skipped records."""
    counts = ContaminationCounts()
    reader = RecordReader(ByteRange(source, 0, source.num_bytes), read)
    if source.kind == "parquet":
        _rewrite_table(reader, target, searcher, counts)
    else:
        with new_file(target) as stream, _compressed(stream, source.compression) as lines:
            for batch in reader.batches():
                _write_lines(batch, lines, remains(batch, searcher, counts), read.text_key)
    return counts, reader


def _write_lines(batch: TextBatch, stream: Any, kept: dict[int, list[str]], text_key: str) -> None:
    for number, line in enumerate(batch.lines):
        if number not in kept:
            stream.write(line + b"\n")
            continue
        for piece in kept[number]:
            stream.write(_json(_with_text(batch.records[number], text_key, piece)) + b"\n")


def _with_text(record: Any, text_key: str, text: str) -> dict[str, Any]:
    """Return a record with another text at its text key."""
    name, _, rest = text_key.partition(".")
    if text_key in record or not rest:
        return {**record, text_key: text}
    return {**record, name: _with_text(record[name], rest, text)}


def _json(record: dict[str, Any]) -> bytes:
    try:
        return orjson.dumps(record)
    except TypeError:  # a huge number, which only the standard library reads
        return json.dumps(record, ensure_ascii=False, default=str).encode()


@contextmanager
def _compressed(stream: BinaryIO, compression: Compression) -> Iterator[Any]:
    """Yield a stream that compresses into `stream`. Equal content gives equal bytes."""
    match compression:
        case "gz":
            writer: Any = gzip.GzipFile(filename="", fileobj=stream, mode="wb", mtime=0)
        case "zst":
            writer = zstandard.ZstdCompressor().stream_writer(stream, closefd=False)
        case "bz2":
            writer = bz2.BZ2File(stream, "wb")
        case "xz":
            writer = lzma.LZMAFile(stream, "wb")  # noqa: SIM115  closed below
        case _:
            writer = contextlib.nullcontext(stream)
    with writer as lines:
        yield lines


def _rewrite_table(reader: RecordReader, target: str, searcher: Searcher, counts: ContaminationCounts) -> None:
    """Write the rows of a table whose texts remain. Bad rows are those that the reader of texts rejects."""
    import pyarrow.parquet as pq

    path = reader.byte_range.source.path
    with pq.ParquetFile(path, page_checksum_verification=True) as table, new_file(target) as stream:
        codec = table.metadata.row_group(0).column(0).compression if table.num_row_groups else "ZSTD"
        with pq.ParquetWriter(stream, table.schema_arrow, compression="NONE" if codec == "UNCOMPRESSED" else codec) as writer:
            texts = _numbered_texts(reader)
            held = next(texts, None)
            first = 0
            for rows in table.iter_batches(batch_size=ROWS_AT_ONCE):
                batch, numbers = TextBatch(), []
                while held is not None and held[0] < first + rows.num_rows:
                    batch.texts.append(held[1])
                    batch.origins.append((reader, f"{path}: row {held[0] + 1}"))
                    numbers.append(held[0] - first)
                    held = next(texts, None)
                _write_rows(writer, rows, numbers, batch, remains(batch, searcher, counts), reader.settings.text_key)
                first += rows.num_rows


def _numbered_texts(reader: RecordReader) -> Iterator[tuple[int, str]]:
    """Yield (row, text) of the good rows of a table."""
    for batch in reader.batches():
        for text, (_, origin) in zip(batch.texts, batch.origins, strict=True):
            yield int(str(origin).rpartition(" ")[2]) - 1, text


def _write_rows(
    writer: Any, rows: Any, numbers: list[int], batch: TextBatch, kept: dict[int, list[str]], text_key: str
) -> None:
    import pyarrow as pa

    chosen: list[tuple[int, int, str | None]] = []
    for number, row in enumerate(numbers):
        chosen += [(row, number, piece) for piece in kept[number]] if number in kept else [(row, number, None)]
    table = pa.Table.from_batches([rows]).take(pa.array([row for row, _, _ in chosen], pa.int64()))
    if any(piece is not None for _, _, piece in chosen):
        texts = [batch.texts[number] if piece is None else piece for _, number, piece in chosen]
        place = table.schema.get_field_index(text_key)
        table = table.set_column(
            place, table.schema.field(place), pa.array(texts, pa.string()).cast(table.schema.field(place).type)
        )
    if table.num_rows:
        writer.write_table(table)

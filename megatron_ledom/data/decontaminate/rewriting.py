"""Write a file of a corpus again, in its format, without evaluation items. Untouched lines and rows stay as they are."""

import bz2
import contextlib
import gzip
import json
import lzma
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, BinaryIO

import zstandard

from megatron_ledom.contamination.report import ContaminationCounts
from megatron_ledom.contamination.search import Searcher
from megatron_ledom.data.decontaminate.batches import remains
from megatron_ledom.data.readers.byte_ranges import ByteRange, Compression, InputPath
from megatron_ledom.data.readers.json_lines import parse_exactly
from megatron_ledom.data.readers.records import ReadSettings, RecordReader, TextBatch
from megatron_ledom.data.readers.streams import BadRecordError
from megatron_ledom.data.readers.table_sizes import rows_at_once
from megatron_ledom.errors import UsageError
from megatron_ledom.storage.files import new_file

WRITABLE = ("lines", "parquet")
"""Kinds of files that can be written again."""
GROUP_BYTES = 64 << 20
"""Size in memory of the rows that become a row group."""


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
        if not kept[number]:
            continue
        reader, origin = batch.origins[number]
        try:
            record = parse_exactly(line)
            pieces = [_json(_with_text(record, text_key, piece)) for piece in kept[number]]
        except (RecursionError, TypeError):
            bad = BadRecordError(
                "malformed_json", "it nests too deep, or has a number with too many digits, to be written again"
            )
            reader.reject(bad, origin, reader.skipped, reader.messages)
            continue
        for piece in pieces:
            stream.write(piece + b"\n")


def _with_text(record: Any, text_key: str, text: str) -> dict[str, Any]:
    """Return a record with another text at its text key."""
    name, _, rest = text_key.partition(".")
    if text_key in record or not rest:
        return {**record, text_key: text}
    return {**record, name: _with_text(record[name], rest, text)}


def _json(record: dict[str, Any]) -> bytes:
    try:
        return json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:  # half of a surrogate pair in another field
        return json.dumps(record, separators=(",", ":")).encode()


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
            group = _Rows(writer)
            for rows in table.iter_batches(batch_size=_rows_at_once(table.metadata), use_threads=False):
                batch, numbers = TextBatch(), []
                while held is not None and held[0] < first + rows.num_rows:
                    batch.texts.append(held[1])
                    batch.origins.append((reader, f"{path}: row {held[0] + 1}"))
                    numbers.append(held[0] - first)
                    held = next(texts, None)
                group.add(_remaining(rows, numbers, batch, remains(batch, searcher, counts), reader.settings.text_key))
                first += rows.num_rows
            group.write()


def _numbered_texts(reader: RecordReader) -> Iterator[tuple[int, str]]:
    """Yield (row, text) of the good rows of a table."""
    for batch in reader.batches():
        for text, (_, origin) in zip(batch.texts, batch.origins, strict=True):
            yield int(str(origin).rpartition(" ")[2]) - 1, text


class _Rows:
    """Collects rows of a table until they are a row group."""

    def __init__(self, writer: Any) -> None:
        self._writer, self._num_bytes = writer, 0
        self._tables: list[Any] = []

    def add(self, table: Any) -> None:
        """Add rows, and write those that are enough for a row group."""
        self._tables.append(table)
        self._num_bytes += table.nbytes
        if self._num_bytes >= GROUP_BYTES:
            self.write()

    def write(self) -> None:
        """Write the collected rows."""
        import pyarrow as pa

        if any(table.num_rows for table in self._tables):
            self._writer.write_table(pa.concat_tables(self._tables))
        self._tables, self._num_bytes = [], 0


def _rows_at_once(metadata: Any) -> int:
    """Return the number of rows to read at a time, by the mean size of the rows of the widest row group."""
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    return rows_at_once(max((group.total_byte_size // max(1, group.num_rows) for group in groups), default=1))


def _remaining(rows: Any, numbers: list[int], batch: TextBatch, kept: dict[int, list[str]], text_key: str) -> Any:
    """Return the rows whose texts remain, as a table. numbers: the rows of the texts of the batch."""
    import pyarrow as pa

    chosen: list[tuple[int, int, str | None]] = []
    for number, row in enumerate(numbers):
        chosen += [(row, number, piece) for piece in kept[number]] if number in kept else [(row, number, None)]
    whole = pa.Table.from_batches([rows])
    table = pa.concat_tables([whole.slice(0, 0), *(whole.slice(first, last + 1 - first) for first, last in _runs(chosen))])
    if any(piece is not None for _, _, piece in chosen):
        texts = [batch.texts[number] if piece is None else piece for _, number, piece in chosen]
        place = table.schema.get_field_index(text_key)
        table = table.set_column(
            place, table.schema.field(place), pa.array(texts, pa.string()).cast(table.schema.field(place).type)
        )
    return table


def _runs(chosen: Sequence[tuple[int, int, str | None]]) -> list[tuple[int, int]]:
    """Return (first, last) of the runs of consecutive rows; a row of several pieces is a run for each."""
    runs: list[tuple[int, int]] = []
    for row, _, _ in chosen:
        if runs and row == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], row)
        else:
            runs.append((row, row))
    return runs

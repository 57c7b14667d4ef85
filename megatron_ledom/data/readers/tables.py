"""Read the texts of Parquet and Arrow files: only the needed columns, a few rows at a time, in bounded memory."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatron_ledom.data.readers.byte_ranges import ByteRange
from megatron_ledom.data.readers.remote import is_remote
from megatron_ledom.data.readers.streams import BadRecordError, Progress, opened, raw_blocks, too_large
from megatron_ledom.data.readers.table_sizes import (
    ALLOWED_BYTES,
    VALUE_BYTES,
    batch_sizes,
    cuts,
    is_text,
    is_too_large,
    lengths_of,
    longest_in_dictionaries,
    row_bytes,
    rows_at_once,
)
from megatron_ledom.errors import DataError

FOOTER_BYTES = 1 << 16
"""Bytes at the end of a table that its hash covers, because tables are not read from start to end."""
MAGIC_BYTES = 8
"""Bytes before the stream in an Arrow file, with padding."""


@dataclass(slots=True)
class Rows:
    """Consecutive rows of a table."""

    first: int
    """Number of the first row in the file, from 0."""
    texts: list[bytes | BadRecordError | None]
    """UTF-8 as stored; None for a missing text."""
    records: list[Mapping[str, Any] | BadRecordError] = field(default_factory=list)
    """The needed columns of each row, if `Request.with_records` is set."""
    position: int = 0
    """Approximate number of bytes of the byte range read so far."""
    unit: str = "row"


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A byte range of a table, with the columns to read from it."""

    byte_range: ByteRange
    keys: tuple[str, ...]
    """Keys of the texts; `a.b` is field b of column a. `Rows.texts` contains the texts of the first key."""
    option: str = "--text-key"
    """The option that gives the keys, for error messages."""
    with_records: bool = False
    """If true, fill `Rows.records`."""
    all_columns: bool = False
    """If true, a record has all columns, for a filter; else only those of `keys`."""
    max_record_bytes: int

    def columns(self, names: list[str]) -> list[str]:
        """Return the columns to read, each once. names: all columns of the table."""
        return list(dict.fromkeys(names if self.all_columns else [_top_column(names, key) for key in self.keys]))

    def check_row(self, num_bytes: int) -> BadRecordError | None:
        """Return the error for a row that takes far more memory than a record may have, else None."""
        limit = max(ALLOWED_BYTES, self.max_record_bytes)
        if not self.with_records or num_bytes <= limit:
            return None
        return BadRecordError("too_large", f"its columns take {num_bytes:,} bytes in memory, more than the limit of {limit:,}")

    def refuse_unfolding(self, where: str, stored: int, unfolded: int) -> None:
        """Raise DataError for a column or batch that is small on disk and would take far more memory than a record may."""
        if is_too_large(stored, unfolded, self.max_record_bytes):
            raise DataError(
                f"{self.byte_range.source.path}: {where} of {stored:,} stored bytes takes {unfolded:,} bytes in memory, far more"
                f" than a record of {self.max_record_bytes:,} (--max-record-bytes); write the file again with fewer rows per row"
                " group or record batch, or omit it"
            )


_Group = tuple[int, float, Any, str]
"""(first row, fraction of the byte range before it, rows, word for a row in messages)."""


def read_rows(request: Request, progress: Progress) -> Iterator[Rows]:
    """Yield the rows of the row groups (record batches) that begin in the byte range."""
    import pyarrow

    byte_range, source = request.byte_range, request.byte_range.source
    for block in raw_blocks(source, max(0, source.num_bytes - FOOTER_BYTES), source.num_bytes):
        progress.count(block)
    try:
        with opened(source) as stream:
            file = pyarrow.PythonFile(stream) if is_remote(source.path) else pyarrow.memory_map(source.path)
            for first, done, table, unit in _groups(file, request):
                for begin, piece, bad in _pieces(table, request):
                    yield _rows_of(piece, bad, first + begin, request, int(done * byte_range.num_bytes), unit)
    except pyarrow.ArrowException as error:
        raise _damaged(request, error) from error


def _damaged(request: Request, error: Exception) -> DataError:
    source = request.byte_range.source
    name = source.kind.capitalize()
    return DataError(f"{source.path} is damaged or not {name} ({error}); download it again, or omit it")


def _groups(file: Any, request: Request) -> Iterator[_Group]:
    try:
        yield from (_parquet_groups if request.byte_range.source.kind == "parquet" else _arrow_groups)(file, request)
    except OSError as error:
        if error.errno is not None:
            raise
        raise _damaged(request, error) from error  # without errno: from pyarrow's checksum or decompressor


def _parquet_groups(file: Any, request: Request) -> Iterator[_Group]:
    """Yield the row groups that begin in the byte range, in pieces."""
    from pyarrow import parquet

    def opened_with(dictionaries: list[str]) -> Any:
        """Open the file, with these columns as indices into their dictionaries."""
        return parquet.ParquetFile(
            file, buffer_size=1 << 20, pre_buffer=False, page_checksum_verification=True, read_dictionary=dictionaries
        )

    byte_range, table = request.byte_range, opened_with([])
    columns = _check_columns(table.schema_arrow, request)
    metadata = table.metadata
    first = 0
    for index in range(metadata.num_row_groups):
        group = metadata.row_group(index)
        chunk = group.column(0)
        offset = chunk.dictionary_page_offset or chunk.data_page_offset
        if byte_range.start <= offset < byte_range.end:
            row, done = first, (offset - byte_range.start) / max(1, byte_range.num_bytes)
            reading = {"row_groups": [index], "columns": columns, "use_threads": False}
            size, repeated = _parquet_rows(table, index, columns, request, opened_with, reading)
            for rows in (opened_with(repeated) if repeated else table).iter_batches(batch_size=size, **reading):
                yield row, done, rows, "row"
                row += rows.num_rows
        first += group.num_rows


def _parquet_rows(
    table: Any,
    index: int,
    columns: list[str],
    request: Request,
    opened_with: Callable[[list[str]], Any],
    reading: dict[str, Any],
) -> tuple[int, list[str]]:
    """Return (rows of a row group to read at a time, columns of lists to keep as indices into their dictionaries).

    Raises DataError for a column that would take too much memory.
    """
    group, schema = table.metadata.row_group(index), table.metadata.schema
    longest = 1
    flat: list[str] = []
    repeated: list[str] = []
    for number in range(group.num_columns):
        chunk = group.column(number)
        path = chunk.path_in_schema
        if not any(path == column or path.startswith(f"{column}.") for column in columns):
            continue
        is_repeated = schema.column(number).max_repetition_level > 0
        unfolded, is_delta = chunk.total_uncompressed_size, "DELTA_BYTE_ARRAY" in chunk.encodings
        if is_repeated:  # a run of equal values takes a few bytes; with delta encoding each value may contain the one before
            unfolded = max(unfolded, chunk.num_values * (unfolded if is_delta else VALUE_BYTES))
        request.refuse_unfolding(f"column {path!r} of row group {index + 1}", chunk.total_compressed_size, unfolded)
        longest = max(longest, unfolded // max(1, group.num_rows))
        if is_delta:
            longest = max(longest, unfolded)
        elif chunk.physical_type == "BYTE_ARRAY" and chunk.has_dictionary_page:
            (repeated if is_repeated else flat).append(path)
    if flat:
        for rows in opened_with(flat + repeated).iter_batches(batch_size=1, **reading):
            longest = max(longest, *map(longest_in_dictionaries, rows.columns))
            break
    return rows_at_once(longest), repeated


def _arrow_groups(file: Any, request: Request) -> Iterator[_Group]:
    """Yield the record batches of an Arrow file that begin in the byte range. A stream belongs to the range with its first byte."""
    import pyarrow

    byte_range, first = request.byte_range, 0
    is_file = file.read(6) == b"ARROW1"
    if not is_file and byte_range.start:
        return
    file.seek(MAGIC_BYTES if is_file else 0)
    for number, (stored, unfolded) in enumerate(batch_sizes(file), 1):
        request.refuse_unfolding(f"message {number}", stored, unfolded)
    file.seek(0)
    if not is_file:
        stream = pyarrow.ipc.open_stream(file)
        _check_columns(stream.schema, request)
        for rows in stream:
            yield first, file.tell() / max(1, byte_range.num_bytes), rows, "row"
            first += rows.num_rows
        return
    table = pyarrow.ipc.open_file(file)
    _check_columns(table.schema, request)
    count = table.num_record_batches
    for index in range(count):
        offset = byte_range.source.num_bytes * index // count
        if byte_range.start <= offset < byte_range.end:
            done = (offset - byte_range.start) / byte_range.num_bytes
            yield 0, done, table.get_batch(index), f"record batch {index + 1}, row"


def _pieces(rows: Any, request: Request) -> Iterator[tuple[int, Any, BadRecordError | None]]:
    """Yield (first row, rows, error if the only row is too large) of a record batch, cut by the memory that its rows take."""
    if request.with_records:
        names = rows.schema.names
        columns = [row_bytes(rows.column(names.index(name))) for name in request.columns(names)]
        sizes = sum(columns, np.zeros(rows.num_rows, np.int64))
    else:
        sizes = row_bytes(_text_column(rows, request))
    for begin, end in cuts(sizes):
        yield begin, rows.slice(begin, end - begin), request.check_row(int(sizes[begin]))


def _text_column(rows: Any, request: Request) -> Any:
    from pyarrow import compute

    key = request.keys[0]
    name = _top_column(rows.schema.names, key)
    column = rows.column(rows.schema.names.index(name))
    for inner in [] if name == key else key.split(".")[1:]:
        column = compute.struct_field(column, inner)
    return column


def _rows_of(table: Any, bad: BadRecordError | None, first: int, request: Request, position: int, unit: str) -> Rows:
    if bad is not None:
        return Rows(first, [bad], [], position, unit)
    texts = _texts_of(_text_column(table, request), request.max_record_bytes)
    records = _records(table.select(request.columns(table.schema.names))) if request.with_records else []
    return Rows(first, texts, records, position, unit)


def _texts_of(column: Any, max_record_bytes: int) -> list[bytes | BadRecordError | None]:
    """Return the texts of a column. A text that is too long is never copied."""
    import pyarrow
    from pyarrow import compute

    lengths = lengths_of(column)
    is_long = compute.fill_null(compute.greater(lengths, max_record_bytes), False)
    if not is_long.true_count:
        texts: list[bytes | BadRecordError | None] = column.cast(pyarrow.large_binary()).to_pylist()
        return texts
    found: list[bytes | BadRecordError | None] = []
    for index, length in enumerate(lengths.to_pylist()):
        if length is not None and length > max_record_bytes:
            found.append(too_large(length, max_record_bytes))
        else:
            found += column.slice(index, 1).cast(pyarrow.large_binary()).to_pylist()
    return found


def _records(table: Any) -> list[Mapping[str, Any] | BadRecordError]:
    """Return the rows with all their columns. A row with a value that Python cannot represent becomes a bad record."""
    try:
        records: list[Mapping[str, Any] | BadRecordError] = table.to_pylist()
    except Exception:  # pyarrow passes on the errors of decoding, dates and time zones
        return [_record(table.slice(index, 1)) for index in range(table.num_rows)]
    return records


def _record(row: Any) -> Mapping[str, Any] | BadRecordError:
    record = {}
    for name, column in zip(row.schema.names, row.columns, strict=True):
        try:
            record[name] = column[0].as_py()
        except Exception as error:
            return BadRecordError("unreadable_column", f"column {name!r} cannot be read ({type(error).__name__}: {error})")
    return record


def _top_column(names: list[str], key: str) -> str:
    return key if key in names else key.split(".")[0]


def _check_columns(schema: Any, request: Request) -> list[str]:
    """Return the columns to read. Raises DataError if one is missing or ambiguous, or if the first key is not a text."""
    path, names = request.byte_range.source.path, schema.names
    kinds = [_kind_at(schema, key, path, request.option) for key in request.keys]
    needed = request.columns(names)
    if twice := [column for column in needed if names.count(column) > 1]:
        raise DataError(f"{path} has more than one column {twice[0]!r}, so the name is ambiguous; rename one of them")
    if not is_text(kinds[0]):
        raise DataError(
            f"{path}: column {request.keys[0]!r} has type {kinds[0]}, expected text; name another one by {request.option}"
        )
    return needed


def _kind_at(schema: Any, key: str, path: str, option: str) -> Any:
    """Return the type of the column or field at a key."""
    from pyarrow import types

    name = _top_column(schema.names, key)
    if name not in schema.names:
        raise DataError(f"{path} has no column {key!r}, only {', '.join(schema.names)}; name one by {option}")
    kind = schema.types[schema.names.index(name)]
    for inner_key in [] if name == key else key.split(".")[1:]:
        inner = [kind.field(index).name for index in range(kind.num_fields)] if types.is_struct(kind) else []
        if inner.count(inner_key) != 1:
            there = f"only {', '.join(inner)}" if inner else f"it has type {kind}"
            raise DataError(f"{path}: column {name!r} has no field {inner_key!r}, {there}; name one by {option}")
        kind = kind.field(inner.index(inner_key)).type
    return kind

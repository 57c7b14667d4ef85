"""Texts of Parquet files and Arrow files: only the text's column is read, a few rows at a time, in bounded memory."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_ledom.data.bad_records import BadRecordError, too_large
from megatron_ledom.data.inputs import Stretch, is_remote
from megatron_ledom.data.streams import Progress, opened, raw_blocks
from megatron_ledom.data.unfolding import (
    batch_sizes,
    is_too_large,
    lengths_of,
    longest_in_dictionaries,
    rows_at_once,
)
from megatron_ledom.errors import DataError

FOOTER_BYTES = 1 << 16
"""The end of a table is what its hash is of: tables are not read from start to end."""
MAGIC_BYTES = 8
"""What stands before the stream in an Arrow file, padded."""


@dataclass(slots=True)
class Rows:
    """Consecutive rows."""

    first: int
    """Number of the first one in the file, from 0."""
    texts: list[bytes | BadRecordError | None]
    """UTF-8, as stored; None is a missing text."""
    records: list[Mapping[str, Any] | BadRecordError] = field(default_factory=list)
    """All columns of the rows, if they were asked for."""
    position: int = 0
    """Bytes of the stretch read up to here, about."""
    unit: str = "row"


@dataclass(frozen=True, slots=True)
class _Request:
    """What is read of a stretch."""

    stretch: Stretch
    text_key: str
    keep_records: bool
    max_record_bytes: int

    def refuse_unfolding(self, where: str, stored: int, unfolded: int) -> None:
        """Raise DataError for what is stored in few bytes and would take far more memory than a record may."""
        if is_too_large(stored, unfolded, self.max_record_bytes):
            raise DataError(
                f"{self.stretch.source.path}: {where} of {stored:,} stored bytes becomes {unfolded:,} bytes in memory, far more"
                f" than a record of {self.max_record_bytes:,} (--max-record-bytes); write it anew with fewer rows in a row group"
                " or record batch, or leave it out"
            )


_Group = tuple[int, float, Any, str]
"""(first row, share of the stretch that is done before it, rows, how rows are named)."""


def read_rows(stretch: Stretch, text_key: str, keep_records: bool, progress: Progress, max_record_bytes: int) -> Iterator[Rows]:
    """The rows of the row groups (record batches) that begin in the stretch."""
    import pyarrow

    source = stretch.source
    for block in raw_blocks(source, max(0, source.num_bytes - FOOTER_BYTES), source.num_bytes):
        progress.count(block)
    request = _Request(stretch, text_key, keep_records, max_record_bytes)
    try:
        with opened(source) as stream:
            file = pyarrow.PythonFile(stream) if is_remote(source.path) else pyarrow.memory_map(source.path)
            for first, done, table, unit in _groups(file, request):
                yield _rows_of(table, first, request, int(done * stretch.num_bytes), unit)
    except pyarrow.ArrowException as error:
        raise _damaged(request, error) from error


def _damaged(request: _Request, error: Exception) -> DataError:
    source = request.stretch.source
    name = source.kind.capitalize()
    return DataError(f"{source.path} is damaged or not {name} ({error}); fetch it again, or leave it out")


def _groups(file: Any, request: _Request) -> Iterator[_Group]:
    try:
        yield from (_parquet_groups if request.stretch.source.kind == "parquet" else _arrow_groups)(file, request)
    except OSError as error:
        if error.errno is not None:
            raise
        raise _damaged(request, error) from error  # pyarrow's own, of a checksum or a decompressor


def _parquet_groups(file: Any, request: _Request) -> Iterator[_Group]:
    """The row groups of the stretch, in pieces."""
    from pyarrow import parquet

    def opened_with(dictionaries: list[str]) -> Any:
        """The file, with these columns left as indices into their dictionaries."""
        return parquet.ParquetFile(
            file, buffer_size=1 << 20, pre_buffer=False, page_checksum_verification=True, read_dictionary=dictionaries
        )

    stretch, table = request.stretch, opened_with([])
    column = _check_columns(table.schema_arrow, request)
    metadata = table.metadata
    first = 0
    for index in range(metadata.num_row_groups):
        group = metadata.row_group(index)
        chunk = group.column(0)
        offset = chunk.dictionary_page_offset or chunk.data_page_offset
        if stretch.start <= offset < stretch.end:
            row, done = first, (offset - stretch.start) / max(1, stretch.num_bytes)
            reading = {"row_groups": [index], "columns": None if request.keep_records else [column], "use_threads": False}
            size = _parquet_rows(group, index, request, column, opened_with, reading)
            for rows in table.iter_batches(batch_size=size, **reading):
                yield row, done, rows, "row"
                row += rows.num_rows
        first += group.num_rows


def _parquet_rows(
    group: Any, index: int, request: _Request, column: str, opened_with: Callable[[list[str]], Any], reading: dict[str, Any]
) -> int:
    """Return how many rows of a row group are read at once. Raises DataError for a column that is too large in memory."""
    longest, dictionaries = 1, []
    for number in range(group.num_columns):
        chunk = group.column(number)
        path = chunk.path_in_schema
        if not (request.keep_records or path == column or path.startswith(f"{column}.")):
            continue
        unfolded = chunk.total_uncompressed_size
        request.refuse_unfolding(f"column {path!r} of row group {index + 1}", chunk.total_compressed_size, unfolded)
        longest = max(longest, unfolded // max(1, group.num_rows))
        if "DELTA_BYTE_ARRAY" in chunk.encodings:  # each value may begin with the whole one before it
            longest = max(longest, unfolded)
        elif chunk.physical_type == "BYTE_ARRAY" and chunk.has_dictionary_page:
            dictionaries.append(path)
    if dictionaries:
        for rows in opened_with(dictionaries).iter_batches(batch_size=1, **reading):
            longest = max(longest, *map(longest_in_dictionaries, rows.columns))
            break
    return rows_at_once(longest)


def _arrow_groups(file: Any, request: _Request) -> Iterator[_Group]:
    """The same for Arrow: the file format by record batch; the stream format whole, by whoever has its start."""
    import pyarrow

    stretch, first = request.stretch, 0
    is_file = file.read(6) == b"ARROW1"
    if not is_file and stretch.start:
        return
    file.seek(MAGIC_BYTES if is_file else 0)
    for number, (stored, unfolded) in enumerate(batch_sizes(file), 1):
        request.refuse_unfolding(f"message {number}", stored, unfolded)
    file.seek(0)
    if not is_file:
        stream = pyarrow.ipc.open_stream(file)
        _check_columns(stream.schema, request)
        for rows in stream:
            for begin, piece in _pieces(rows, request):
                yield first + begin, file.tell() / max(1, stretch.num_bytes), piece, "row"
            first += rows.num_rows
        return
    table = pyarrow.ipc.open_file(file)
    _check_columns(table.schema, request)
    count = table.num_record_batches
    for index in range(count):
        offset = stretch.source.num_bytes * index // count
        if stretch.start <= offset < stretch.end:
            for begin, piece in _pieces(table.get_batch(index), request):
                yield begin, (offset - stretch.start) / stretch.num_bytes, piece, f"record batch {index + 1}, row"


def _pieces(rows: Any, request: _Request) -> Iterator[tuple[int, Any]]:
    """(first row, rows) of a record batch, cut."""
    name = _top_column(rows.schema, request.text_key)
    columns = rows.columns if request.keep_records else [rows.column(rows.schema.names.index(name))]
    mean = sum(column.nbytes for column in columns) // max(1, rows.num_rows)
    size = rows_at_once(max(mean, *map(longest_in_dictionaries, columns)))
    for begin in range(0, rows.num_rows, size):
        yield begin, rows.slice(begin, size)


def _rows_of(table: Any, first: int, request: _Request, position: int, unit: str) -> Rows:
    from pyarrow import compute

    name = _top_column(table.schema, request.text_key)
    column = table.column(table.schema.names.index(name))
    for key in [] if name == request.text_key else request.text_key.split(".")[1:]:
        column = compute.struct_field(column, key)
    records = _records(table) if request.keep_records else []
    return Rows(first, _texts_of(column, request.max_record_bytes), records, position, unit)


def _texts_of(column: Any, max_record_bytes: int) -> list[bytes | BadRecordError | None]:
    """The texts of a column; one that is too long is never copied."""
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
    """The rows with all their columns; a row with a value that Python cannot hold is a bad one, the others are not."""
    try:
        records: list[Mapping[str, Any] | BadRecordError] = table.to_pylist()
    except Exception:  # pyarrow raises what decoding, dates and time zones raise
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


def _text_kinds() -> list[Callable[[Any], bool]]:
    from pyarrow import types

    return [
        types.is_string,
        types.is_large_string,
        types.is_binary,
        types.is_large_binary,
        types.is_string_view,
        types.is_binary_view,
    ]


def _top_column(schema: Any, text_key: str) -> str:
    return text_key if text_key in schema.names else text_key.split(".")[0]


def _check_columns(schema: Any, request: _Request) -> str:
    """Return the column that holds the text. Raises DataError if it is no text, or if columns cannot be told apart."""
    from pyarrow import types

    path, text_key, names = request.stretch.source.path, request.text_key, schema.names
    name = _top_column(schema, text_key)
    if name not in names:
        raise DataError(f"{path} has no column {text_key!r} but {', '.join(names)}; name one by --text-key")
    needed = names if request.keep_records else [name]
    if twice := [column for column in dict.fromkeys(needed) if names.count(column) > 1]:
        raise DataError(f"{path} has more than one column {twice[0]!r}: which is meant cannot be told; rename one of them")
    kind = schema.field(name).type
    for key in [] if name == text_key else text_key.split(".")[1:]:
        inner = [kind.field(index).name for index in range(kind.num_fields)] if types.is_struct(kind) else []
        if inner.count(key) != 1:
            there = f"but {', '.join(inner)}" if inner else f"but holds {kind}"
            raise DataError(f"{path}: column {name!r} has no field {key!r} {there}; name one by --text-key")
        kind = kind.field(inner.index(key)).type
    if not any(is_kind(kind) for is_kind in _text_kinds()):
        raise DataError(f"{path}: column {text_key!r} holds {kind}, not text; name another by --text-key")
    return name

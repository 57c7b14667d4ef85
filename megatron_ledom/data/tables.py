"""Texts of Parquet files and Arrow files: only the text's column is read, a row group or record batch at a time."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_ledom.data.inputs import Stretch, is_remote
from megatron_ledom.data.streams import Progress, opened, raw_blocks
from megatron_ledom.errors import DataError

ROWS = 256
"""Rows that are taken apart at a time."""
FOOTER_BYTES = 1 << 16
"""The end of a table is what its hash is of: tables are not read from start to end."""


@dataclass(slots=True)
class Rows:
    """Consecutive rows."""

    first: int
    """Number of the first one in the file, from 0."""
    texts: list[bytes | None]
    """UTF-8, as stored; None is a missing text."""
    records: list[Mapping[str, Any]] = field(default_factory=list)
    """All columns of the rows, if they were asked for."""
    position: int = 0
    """Bytes of the stretch read up to here, about."""
    unit: str = "row"


def read_rows(stretch: Stretch, text_key: str, keep_records: bool, progress: Progress, max_record_bytes: int) -> Iterator[Rows]:
    """The rows of the row groups (record batches) that begin in the stretch; all texts of a group are in memory at once."""
    import pyarrow

    source = stretch.source
    for block in raw_blocks(source, max(0, source.num_bytes - FOOTER_BYTES), source.num_bytes):
        progress.count(block)
    groups = _parquet_groups if source.kind == "parquet" else _arrow_groups
    try:
        with opened(source) as stream:
            file = pyarrow.PythonFile(stream) if is_remote(source.path) else pyarrow.memory_map(source.path)
            for first, done, table, unit in groups(file, stretch, text_key, keep_records):
                yield _rows_of(table, first, text_key, keep_records, int(done * stretch.num_bytes), unit)
    except pyarrow.ArrowException as error:
        name = source.kind.capitalize()
        raise DataError(f"{source.path} is damaged or not {name} ({error}); fetch it again, or leave it out") from error


def _parquet_groups(file: Any, stretch: Stretch, text_key: str, keep_records: bool) -> Iterator[tuple[int, float, Any, str]]:
    """(first row, share of the stretch that is done before it, rows, how rows are named) in pieces of a row group."""
    from pyarrow import parquet

    table = parquet.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False)
    _check_column(table.schema_arrow, stretch, text_key)
    column = text_key if text_key in table.schema_arrow.names else text_key.split(".")[0]
    metadata = table.metadata
    first = 0
    for index in range(metadata.num_row_groups):
        group = metadata.row_group(index)
        chunk = group.column(0)
        offset = chunk.dictionary_page_offset or chunk.data_page_offset
        if stretch.start <= offset < stretch.end:
            row, done = first, (offset - stretch.start) / max(1, stretch.num_bytes)
            columns = None if keep_records else [column]
            for rows in table.iter_batches(batch_size=ROWS, row_groups=[index], columns=columns, use_threads=False):
                yield row, done, rows, "row"
                row += rows.num_rows
        first += group.num_rows


def _arrow_groups(file: Any, stretch: Stretch, text_key: str, keep_records: bool) -> Iterator[tuple[int, float, Any, str]]:
    """The same for Arrow: the file format by record batch; the stream format whole, by whoever has its start."""
    import pyarrow

    first = 0
    if file.read(6) != b"ARROW1":
        file.seek(0)
        if stretch.start:
            return
        stream = pyarrow.ipc.open_stream(file)
        _check_column(stream.schema, stretch, text_key)
        for rows in stream:
            for begin in range(0, rows.num_rows, ROWS):
                yield first + begin, file.tell() / max(1, stretch.num_bytes), rows.slice(begin, ROWS), "row"
            first += rows.num_rows
        return
    table = pyarrow.ipc.open_file(file)
    _check_column(table.schema, stretch, text_key)
    count = table.num_record_batches
    for index in range(count):
        offset = stretch.source.num_bytes * index // count
        if stretch.start <= offset < stretch.end:
            rows = table.get_batch(index)
            for begin in range(0, rows.num_rows, ROWS):
                yield (
                    begin,
                    (offset - stretch.start) / stretch.num_bytes,
                    rows.slice(begin, ROWS),
                    f"record batch {index + 1}, row",
                )


def _rows_of(table: Any, first: int, text_key: str, keep_records: bool, position: int, unit: str) -> Rows:
    import pyarrow
    from pyarrow import compute

    name, *inner = [text_key] if text_key in table.schema.names else text_key.split(".")
    column = table.column(table.schema.names.index(name))
    for key in inner:
        column = compute.struct_field(column, key)
    texts = column.cast(pyarrow.large_binary()).to_pylist()
    return Rows(first, texts, table.to_pylist() if keep_records else [], position, unit)


def _text_kinds() -> list[Callable[[Any], bool]]:
    from pyarrow import types

    return [types.is_string, types.is_large_string, types.is_binary, types.is_large_binary, types.is_string_view]


def _check_column(schema: Any, stretch: Stretch, text_key: str) -> None:
    path = stretch.source.path
    name, *inner = [text_key] if text_key in schema.names else text_key.split(".")
    if name not in schema.names:
        raise DataError(f"{path} has no column {text_key!r} but {', '.join(schema.names)}; name one by --text-key")
    kind = schema.field(name).type
    for key in inner:
        names = [kind.field(index).name for index in range(kind.num_fields)]
        if key not in names:
            raise DataError(f"{path}: column {name!r} has no field {key!r} but {', '.join(names)}; name one by --text-key")
        kind = kind.field(names.index(key)).type
    if not any(is_kind(kind) for is_kind in _text_kinds()):
        raise DataError(f"{path}: column {text_key!r} holds {kind}, not text; name another by --text-key")

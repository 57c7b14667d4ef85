"""Limit the memory that tables take. A table with repeated values is small on disk and can be very large in memory.

A page or record batch is decompressed as a whole, so one that becomes far larger than a record may be is refused. A dictionary
repeats a value for each row and for each entry of a list, so only as many rows are read at a time as fit into memory.
"""

import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

ALLOWED_BYTES = 64 << 20
"""Size in memory that is always allowed for a stored column or record batch."""
ALLOWED_RATIO = 100
"""Allowed ratio of the sizes in memory and on disk. Text compresses less than that, unless it repeats itself."""
ROWS = 256
"""Limit on the rows that are converted at a time."""
ROWS_BYTES = 16 << 20
"""Approximate limit on the memory of these rows. pyarrow keeps several copies of them."""
VALUE_BYTES = 8
"""Size of a number, and of a position in a list."""
RECORD_BATCH, DICTIONARY_BATCH = 3, 2
"""Kinds of Arrow messages (MessageHeader in format/Message.fbs)."""


def is_too_large(stored_bytes: int, unfolded_bytes: int, max_record_bytes: int) -> bool:
    """Return True if a stored column or batch would take too much memory."""
    return unfolded_bytes > max(ALLOWED_BYTES, max_record_bytes) + ALLOWED_RATIO * stored_bytes


def rows_at_once(longest_value: int) -> int:
    """Return the number of rows to convert at a time if a value has up to `longest_value` bytes."""
    return max(1, min(ROWS, ROWS_BYTES // max(1, longest_value)))


def cuts(sizes: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Yield (begin, end) of consecutive rows to convert together. sizes: bytes of each row. A row above the limit is alone."""
    total = np.concatenate([[0], np.cumsum(sizes)])
    begin = 0
    while begin < len(sizes):
        fitting = int(np.searchsorted(total, total[begin] + ROWS_BYTES, side="right")) - 1
        end = max(begin + 1, min(fitting, begin + ROWS, len(sizes)))
        yield begin, end
        begin = end


def longest_in_dictionaries(array: Any) -> int:
    """Return the bytes of the longest value that an Arrow array or the fields of a struct repeat from dictionaries; 0 for lists."""
    from pyarrow import types

    if types.is_dictionary(array.type):
        return int(row_bytes(array.dictionary).max(initial=0))
    if types.is_struct(array.type):
        return sum(longest_in_dictionaries(array.field(index)) for index in range(array.type.num_fields))
    return 0


def row_bytes(array: Any) -> NDArray[np.int64]:
    """Return the approximate bytes in memory of each row of an Arrow array. A repeated value counts every time, at any depth."""
    from pyarrow import ExtensionType, types

    kind = array.type
    if isinstance(kind, ExtensionType):
        return row_bytes(array.storage)
    if is_text(kind):
        return np.asarray(lengths_of(array).fill_null(0), dtype=np.int64)
    if types.is_dictionary(kind):
        return _taken(row_bytes(array.dictionary), np.asarray(array.indices.fill_null(-1), dtype=np.int64))
    if types.is_run_end_encoded(kind):
        rows = array.offset + np.arange(len(array))
        return _taken(row_bytes(array.values), np.searchsorted(np.asarray(array.run_ends), rows, side="right"))
    if types.is_struct(kind):
        fields = [row_bytes(array.field(index)) for index in range(kind.num_fields)]
        return sum(fields, np.zeros(len(array), np.int64))
    if types.is_nested(kind) and not types.is_union(kind):
        return _of_lists(array)
    return np.full(len(array), VALUE_BYTES, np.int64)


def _taken(sizes: NDArray[np.int64], indices: NDArray[Any]) -> NDArray[np.int64]:
    """Return the sizes at some indices; index -1 is a null and has size 0."""
    with_null: NDArray[np.int64] = np.append(sizes, np.int64(0))
    return with_null.take(indices)


def _of_lists(array: Any) -> NDArray[np.int64]:
    """Return the row bytes of lists of any kind and of maps: the sum over their values."""
    from pyarrow import types

    kind = array.type
    values = row_bytes(array.keys) + row_bytes(array.items) if types.is_map(kind) else row_bytes(array.values)
    total = np.concatenate([[0], np.cumsum(values + VALUE_BYTES)])
    if types.is_fixed_size_list(kind):
        bounds = (array.offset + np.arange(len(array) + 1)) * kind.list_size
        begin, end = bounds[:-1], bounds[1:]
    elif types.is_list_view(kind) or types.is_large_list_view(kind):
        begin = np.asarray(array.offsets)
        end = begin + np.asarray(array.sizes)
    else:
        begin, end = np.asarray(array.offsets)[:-1], np.asarray(array.offsets)[1:]
    return np.where(np.asarray(array.is_valid()), total[end] - total[begin], 0)


def is_text(kind: Any) -> bool:
    """Return True if an Arrow type is one of strings or binary values."""
    from pyarrow import types

    is_plain = types.is_string(kind) or types.is_large_string(kind) or types.is_binary(kind) or types.is_large_binary(kind)
    return bool(is_plain or types.is_string_view(kind) or types.is_binary_view(kind))


def lengths_of(texts: Any) -> Any:
    """Return the bytes of each text in an array of strings or binary values; null for a null."""
    import pyarrow
    from pyarrow import compute

    if texts.type in (pyarrow.string_view(), pyarrow.binary_view()):
        return pyarrow.array([text.as_buffer().size if text.is_valid else None for text in texts], pyarrow.int64())
    return compute.binary_length(texts)


def batch_sizes(source: Any) -> Iterator[tuple[int, int]]:
    """Yield (stored bytes, bytes in memory) of each compressed record batch or dictionary of an open Arrow stream."""
    from pyarrow import ipc

    for message in ipc.MessageReader.open_stream(source):
        if message.body is None or not message.body.size:
            continue
        buffers = _compressed_buffers(bytes(message.metadata))
        if buffers is None:
            return
        unfolded = 0
        for offset, length in buffers:
            if length >= 8:
                (size,) = struct.unpack_from("<q", message.body, offset)
                unfolded += length if size < 0 else size  # -1: this buffer is not compressed
        yield message.body.size, unfolded


def _compressed_buffers(metadata: bytes) -> list[tuple[int, int]] | None:
    """Return (offset, length) of each buffer in the body of a message, from its flatbuffer; None if they are not compressed."""
    message = _Table(metadata, struct.unpack_from("<I", metadata)[0])
    kind = metadata[message.field(1)] if message.field(1) else 0
    if kind not in (RECORD_BATCH, DICTIONARY_BATCH):
        return []
    batch = message.table(2)
    if kind == DICTIONARY_BATCH:
        batch = batch.table(1)
    if not batch.field(3):
        return None
    start = batch.target(2)
    (count,) = struct.unpack_from("<I", metadata, start)
    return [struct.unpack_from("<qq", metadata, start + 4 + 16 * number) for number in range(count)]


class _Table:
    """A table of a flatbuffer, with numbered fields."""

    def __init__(self, content: bytes, position: int) -> None:
        self._content, self._position = content, position
        self._fields = position - struct.unpack_from("<i", content, position)[0]

    def field(self, number: int) -> int:
        """Return the position of a field, or 0 if it is absent and so has its default value."""
        (size,) = struct.unpack_from("<H", self._content, self._fields)
        entry = 4 + 2 * number
        offset = struct.unpack_from("<H", self._content, self._fields + entry)[0] if entry < size else 0
        return self._position + offset if offset else 0

    def target(self, number: int) -> int:
        """Return the position that a field points to."""
        position = self.field(number)
        return position + int(struct.unpack_from("<I", self._content, position)[0])

    def table(self, number: int) -> "_Table":
        """Return the table that a field points to."""
        return _Table(self._content, self.target(number))

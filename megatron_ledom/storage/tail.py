"""Read a growing file of records without reading it whole: its last records, or records spread over it.

A reader may meet a file that is being written, cut or replaced: an incomplete line is passed over, a damaged one is counted.
"""

import json
import os
from typing import BinaryIO

from megatron_ledom.storage.records import Record

BLOCK_BYTES = 1 << 16
LONGEST_LINE = 1 << 18
"""Most bytes of a line of `spread_records`: a damaged file may have no line breaks."""
MOST_BYTES = 1 << 24
"""Most bytes that `last_records` reads from the end of a file."""


def last_records(path: str, count: int, most_bytes: int = MOST_BYTES) -> tuple[list[Record], int]:
    """Return the last records of a file, oldest first, and the number of damaged lines among its last `count` lines.

    At most about `most_bytes` are read. Both are empty without a file. Raise OSError for a file that cannot be read.
    """
    try:
        with open(path, "rb") as file:
            lines = _last_lines(file, count, most_bytes)
    except FileNotFoundError:
        return [], 0
    records = [record for record in map(_parsed, lines) if record is not None]
    return records, len(lines) - len(records)


def spread_records(path: str, count: int) -> list[Record]:
    """Return at most `count` records at equal distances in bytes, in the order of the file; [] without a file. Raise OSError.

    The time does not depend on the size of the file. Damaged lines are passed over.
    """
    found: dict[int, Record] = {}
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            for number in range(count):
                file.seek(start := size * number // count)
                if start > 0:
                    file.readline(LONGEST_LINE)  # the rest of a line
                position, line = file.tell(), file.readline(LONGEST_LINE)
                record = _parsed(line) if line.endswith(b"\n") else None
                if record is not None:
                    found[position] = record
    except FileNotFoundError:
        return []
    return [found[position] for position in sorted(found)]


def count_lines(path: str, most_bytes: int) -> int | None:
    """Return the number of whole lines of a file; 0 without a file, None if it is longer than `most_bytes`. Raise OSError."""
    try:
        with open(path, "rb", buffering=0) as file:
            if file.seek(0, os.SEEK_END) > most_bytes:
                return None
            file.seek(0)
            return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))
    except FileNotFoundError:
        return 0


def _last_lines(file: BinaryIO, count: int, most_bytes: int) -> list[bytes]:
    """Return the last `count` whole lines, read from the end in blocks."""
    end = file.seek(0, os.SEEK_END)
    start, blocks, num_lines = end, list[bytes](), 0
    while start > 0 and num_lines <= count and end - start < most_bytes:
        length = min(BLOCK_BYTES, start)
        start -= length
        file.seek(start)
        blocks.append(file.read(length))
        num_lines += blocks[-1].count(b"\n")
    lines = b"".join(reversed(blocks)).splitlines(keepends=True)  # JSON escapes every other line break
    if start > 0:
        lines = lines[1:]  # its beginning was not read
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
    return lines[-count:]


def _parsed(line: bytes) -> Record | None:
    """Return the record of a line; None if it is damaged."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None

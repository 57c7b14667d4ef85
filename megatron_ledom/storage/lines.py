"""Files that grow line by line. A line is written whole or not at all; a kill loses at most the last one."""

import contextlib
import os
from pathlib import Path
from typing import BinaryIO

from megatron_ledom.storage.files import sync

BLOCK_BYTES = 4096


class LineFile:
    """An open file that grows line by line. An incomplete last line, left by a kill, is removed first."""

    def __init__(self, path: str | Path) -> None:
        """Open the file, or make it; only its end is read. Raise OSError."""
        self._path = path
        self._file = open(path, "a+b", buffering=0)  # noqa: SIM115  closed in close()
        try:
            end = _end_of_lines(self._file)
            self._file.truncate(end)
        except BaseException:
            self._file.close()
            raise
        self._is_new = end == 0

    def append(self, lines: bytes) -> None:
        """Add whole lines. Raise OSError, after which none of them is in the file."""
        left, descriptor = memoryview(lines), self._file.fileno()
        before = os.fstat(descriptor).st_size
        try:
            while left:
                left = left[os.write(descriptor, left) :]
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(descriptor, before)
            raise

    def sync(self) -> None:
        """Force the lines to the disk."""
        os.fsync(self._file.fileno())
        if self._is_new:
            sync(os.path.dirname(os.path.realpath(self._path)))
            self._is_new = False

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def append_lines(path: str | Path, lines: bytes) -> None:
    """Add whole lines and force them to the disk. Raise OSError, after which none of them is in the file."""
    with contextlib.closing(LineFile(path)) as file:
        file.append(lines)
        file.sync()


def whole_lines(path: str | Path) -> list[bytes]:
    """Return the whole lines of a file, each with its line end; an empty list if there is no file."""
    if not os.path.isfile(path):
        return []
    return [line for line in Path(path).read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]


def cut_lines(path: str | Path, num_bytes: int) -> None:
    """Cut a file to its first `num_bytes`; make an empty one if it is missing. Raise OSError."""
    with open(path, "ab") as file:
        file.truncate(num_bytes)


def _end_of_lines(file: BinaryIO) -> int:
    """Return the number of bytes up to the end of the last whole line."""
    end = file.seek(0, os.SEEK_END)
    block = 1  # the last byte is nearly always a line end
    while end > 0:
        start = max(0, end - block)
        file.seek(start)
        newline = file.read(end - start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end, block = start, BLOCK_BYTES
    return 0

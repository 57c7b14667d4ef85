"""Files of lines that grow at their ends: a line is in them whole or not at all, and a kill costs the last one at most."""

import contextlib
import os
from pathlib import Path
from typing import BinaryIO

from megatron_ledom.storage.files import sync

BLOCK_BYTES = 4096


class LineFile:
    """A file of lines that grows, kept open. What a kill left of a last line is cut off first: a new one would join it."""

    def __init__(self, path: str | Path) -> None:
        """Make the file if it is not there; reads its end only. Raise OSError."""
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
        """Add whole lines. Raise OSError, and then nothing of them stays."""
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
    """Add whole lines; they are on disk when this returns. Raise OSError, and then nothing of them stays."""
    with contextlib.closing(LineFile(path)) as file:
        file.append(lines)
        file.sync()


def whole_lines(path: str | Path) -> list[bytes]:
    """Return the lines of a file, each with its end; not what a kill left of a last one. None without a file."""
    if not os.path.isfile(path):
        return []
    return [line for line in Path(path).read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]


def cut_lines(path: str | Path, num_bytes: int) -> None:
    """Cut a file to its first `num_bytes`; make an empty one where it is not there. Raise OSError."""
    with open(path, "ab") as file:
        file.truncate(num_bytes)


def _end_of_lines(file: BinaryIO) -> int:
    """Return the bytes up to the end of the last whole line."""
    end = file.seek(0, os.SEEK_END)
    block = 1  # nearly always a line's end
    while end > 0:
        start = max(0, end - block)
        file.seek(start)
        newline = file.read(end - start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end, block = start, BLOCK_BYTES
    return 0

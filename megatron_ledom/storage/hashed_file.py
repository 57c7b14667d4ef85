"""Large files written at the disk's speed: what is written of a file is hashed and goes to disk while the rest is made.

hashlib, reads, writes and fsync all let other threads run, so threads are enough.
"""

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

Thing = TypeVar("Thing")
SMALL_BYTES = 1 << 20
"""Less is hashed at once: a thread would cost more."""
MOST_AT_ONCE = 1 << 26
"""The system takes at most 2 GiB in one call."""
SYNCED_BYTES = 1 << 28
"""So much more is sent to disk at once. The system by itself lets gigabytes gather first, while the disk has nothing to do."""


class HashedFile:
    """A new file, written from its start to its end. `close` returns at once; `sums` waits until all of it is on disk."""

    def __init__(self, path: str, threads: ThreadPoolExecutor) -> None:
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115 (closed by a thread)
        self._threads, self._digest, self._size = threads, hashlib.sha256(), 0
        self._sent = 0
        self._sending: list[Future[None]] = []
        self._synced: Future[None] | None = None

    def write(self, content: Any) -> int:
        """Append bytes, or anything that shows its bytes; returns how many. Raises OSError."""
        content = memoryview(content).cast("B")
        if len(content) < SMALL_BYTES:
            self._digest.update(content)
            self._append(content)
            return len(content)
        hashed = self._threads.submit(self._digest.update, content)
        try:
            self._append(content)
        finally:
            hashed.result()  # the content is the caller's again
        return len(content)

    def _append(self, content: memoryview) -> None:
        done = 0
        while done < len(content):
            done += self._file.write(content[done : done + MOST_AT_ONCE])
        self._size += done
        if self._size - self._sent >= SYNCED_BYTES and all(sending.done() for sending in self._sending):
            self._sent = self._size
            self._sending.append(self._threads.submit(os.fdatasync, self._file.fileno()))

    def tell(self) -> int:
        """Bytes written so far."""
        return self._size

    def flush(self) -> None:
        """Nothing is held back."""

    def close(self) -> None:
        """No more comes; the disk may take its time."""
        if self._synced is None:
            self._synced = self._threads.submit(self._sync)

    def _sync(self) -> None:
        with self._file:
            for sending in self._sending:
                sending.result()  # the system reports an error once only
            os.fsync(self._file.fileno())

    def sums(self) -> dict[str, Any]:
        """Size and sha256 of the closed file, which is on disk then. Raises OSError."""
        assert self._synced is not None
        self._synced.result()
        return {"bytes": self._size, "sha256": self._digest.hexdigest()}


def read_ahead(things: Iterator[Thing], threads: ThreadPoolExecutor) -> Iterator[Thing]:
    """The same things; each is made while the one before it is used."""
    end: Any = object()
    coming = threads.submit(next, things, end)
    while (thing := coming.result()) is not end:
        coming = threads.submit(next, things, end)
        yield thing

"""Large files at the speed of the disk: threads hash and sync the first part of a file while the rest is computed.

Threads are enough, because hashlib, reads, writes and fsync let other threads run.
"""

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

Thing = TypeVar("Thing")
SMALL_BYTES = 1 << 20
"""Fewer bytes are hashed in the calling thread, because passing them to another thread costs more."""
MOST_AT_ONCE = 1 << 26
"""Most bytes in one write call; the system accepts at most 2 GiB."""
SYNCED_BYTES = 1 << 28
"""The file is synced each time it has grown by this many bytes: Linux alone would collect gigabytes while the disk is idle."""


class HashedFile:
    """A new file, written from start to end. `close` returns at once; `sums` waits until the file is on disk."""

    def __init__(self, path: str, threads: ThreadPoolExecutor) -> None:
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115 (closed by a thread)
        self._threads, self._digest, self._size = threads, hashlib.sha256(), 0
        self._sent = 0
        self._sending: list[Future[None]] = []
        self._synced: Future[None] | None = None

    def write(self, content: Any) -> int:
        """Append bytes, or an object with the buffer protocol. Returns the number of bytes. Raises OSError."""
        content = memoryview(content).cast("B")
        if len(content) < SMALL_BYTES:
            self._digest.update(content)
            self._append(content)
            return len(content)
        hashed = self._threads.submit(self._digest.update, content)
        try:
            self._append(content)
        finally:
            hashed.result()  # afterwards the caller may change the content
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
        """Return the number of bytes written so far."""
        return self._size

    def flush(self) -> None:
        """Do nothing: writes are not buffered."""

    def close(self) -> None:
        """End the file; a thread syncs and closes it."""
        if self._synced is None:
            self._synced = self._threads.submit(self._sync)

    def _sync(self) -> None:
        with self._file:
            for sending in self._sending:
                sending.result()  # the system reports an error only once
            os.fsync(self._file.fileno())

    def sums(self) -> dict[str, Any]:
        """Wait until the closed file is on disk, and return its size and sha256. Raises OSError."""
        assert self._synced is not None
        self._synced.result()
        return {"bytes": self._size, "sha256": self._digest.hexdigest()}


def read_ahead(things: Iterator[Thing], threads: ThreadPoolExecutor) -> Iterator[Thing]:
    """Yield the items of an iterator; a thread computes the next one while the caller uses the current one."""
    end: Any = object()
    coming = threads.submit(next, things, end)
    while (thing := coming.result()) is not end:
        coming = threads.submit(next, things, end)
        yield thing


@contextmanager
def one_thread() -> Iterator[ThreadPoolExecutor]:
    """Yield a pool of one thread. After an error the thread finishes its current task and starts no other."""
    with ThreadPoolExecutor(1) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise

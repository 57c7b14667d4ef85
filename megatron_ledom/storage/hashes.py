"""Large files written at the disk's speed: what is written of a file is hashed and goes to disk while the rest is made.

hashlib, reads, writes and fsync all let other threads run, so threads are enough.

Size and sha256 of every file of a checkpoint: kept in its manifest, checked before its content is believed.

sha256 because the standard library has it, shards use it, and processors have instructions for it: it is computed by the
process that writes, while training goes on, and checked by all ranks together, each its share of the files.
"""

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from megatron_ledom.errors import DataError

FileSums = dict[str, dict[str, Any]]
"""Name in the checkpoint's folder -> {"bytes": size, "sha256": hex digits}."""


def sha256_of(path: str | Path) -> str:
    """Return the SHA-256 of a file, in hex. Raise OSError."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksum(path: str) -> dict[str, Any]:
    """Size in bytes and sha256 of one file."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return {"bytes": file.tell(), "sha256": digest.hexdigest()}


def size_faults(folder: str, files: FileSums) -> list[str]:
    """A sentence for each file that is missing or of another size; reads nothing."""
    faults = []
    for name, expected in files.items():
        path = os.path.join(folder, name)
        try:
            found = os.stat(path).st_size
        except OSError as error:
            faults.append(f"{path} is missing ({error.strerror})")
            continue
        if found != expected["bytes"]:
            faults.append(f"{path} has {found:,} bytes, the manifest says {expected['bytes']:,}")
    return faults


def content_faults(folder: str, files: FileSums, share: int = 0, num_shares: int = 1) -> list[str]:
    """A sentence for each file whose sha256 is not the manifest's; reads every `num_shares`-th file, from `share` on."""
    faults = []
    for name in sorted(files)[share::num_shares]:
        path = os.path.join(folder, name)
        try:
            found = sha256_of(path)
        except OSError as error:
            faults.append(f"{path} cannot be read ({error.strerror})")
            continue
        if found != files[name]["sha256"]:
            faults.append(f"{path} has sha256 {found}, the manifest says {files[name]['sha256']}")
    return faults


def refuse_damaged(checkpoint: str, faults: list[str]) -> None:
    """Raise DataError with all faults, if there are any."""
    if faults:
        raise DataError(
            f"{checkpoint} is damaged: {'; '.join(faults)}; use an earlier one: let the file `latest` beside it name that one"
        )


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

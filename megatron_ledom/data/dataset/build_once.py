"""Let one process build the sample index, while the others wait and see its progress."""

import logging
import os
import socket
import time
from collections.abc import Callable

from tqdm import tqdm

from megatron_ledom.errors import DataError, UsageError
from megatron_ledom.storage.locks import POLL_SECONDS, REPORT_SECONDS, Lock

log = logging.getLogger(__name__)

PATIENCE_SECONDS = 120.0
"""Time that the other processes wait while nobody builds."""


def node() -> str:
    """Return the name of the host, for messages, because a path alone does not identify a disk."""
    return socket.gethostname()


class Progress:
    """Progress of building: a bar on a terminal or log lines with the remaining time, and a note for the waiting processes."""

    def __init__(self, what: str, total: int, note: Callable[[str], None]) -> None:
        self.what, self.total, self.note = what, total, note
        self.done = 0
        self.started = self.reported = time.monotonic()
        self.bar = tqdm(total=total, desc=what, unit="document", unit_scale=True, disable=None)

    def advance(self, amount: int = 0) -> None:
        """Add `amount` finished documents. Call without arguments now and then to keep the waiting processes informed."""
        self.done += amount
        self.bar.update(amount)
        now = time.monotonic()
        if now - self.reported < REPORT_SECONDS:
            return
        self.reported = now
        left = (now - self.started) * (self.total - self.done) / self.done if self.done else float("nan")
        text = f"{self.what}: {self.done / max(self.total, 1):.0%} of {self.total:,} documents, {left:,.0f} s left"
        log.info("%s", text)
        self.note(text)


def build_once(
    lock_path: str,
    is_done: Callable[[], bool],
    build: Callable[[Callable[[str], None]], None],
    *,
    may_build: bool,
    patience_seconds: float = PATIENCE_SECONDS,
) -> None:
    """Wait until `is_done()` is true, or call `build(note)` if this process may build and no other one does.

    `note` leaves a line for the waiting processes. If the locks of the file system do not reach other nodes, several nodes build,
    which only wastes work, because finished files appear as a whole. Raises DataError on a process that must not build after
    `patience_seconds` without a builder, and UsageError if the folder of `lock_path` cannot be written.
    """
    lock, folder = Lock(lock_path), os.path.dirname(lock_path)
    last_seen = reported = time.monotonic()
    while not is_done():
        try:
            os.makedirs(folder, exist_ok=True)
            is_free = lock.take(is_shared=not may_build)
        except OSError as error:
            raise cannot_build(error, folder) from error
        if is_free and may_build:
            _build(lock, is_done, build)
            return
        now = time.monotonic()
        if is_free:
            lock.release(keep_file=True)
        else:
            last_seen = now
        if now - last_seen > patience_seconds:
            raise DataError(
                f"node {node()}: {folder} lacks the sample index and no process has built it for {patience_seconds:,.0f} s; the"
                " first rank of the node should do that: look for its error in the log"
            )
        if now - reported > REPORT_SECONDS:
            reported = now
            log.warning("node %s waits for the sample index in %s; %s", node(), folder, lock.holder())
        time.sleep(POLL_SECONDS)


def _build(lock: Lock, is_done: Callable[[], bool], build: Callable[[Callable[[str], None]], None]) -> None:
    """Build, and release the lock."""

    def note(text: str) -> None:
        """Write a line to the file of the lock."""
        lock.note(f"{node()}, process {os.getpid()}: {text}")

    try:
        note("has begun")
        if not is_done():  # another node may have built it meanwhile
            build(note)
    finally:
        lock.release(keep_file=True)


def cannot_build(error: OSError, folder: str) -> UsageError:
    """Return the error for an index folder that cannot be written."""
    return UsageError(
        f"node {node()}: the sample index cannot be written to {folder} ({error.strerror}); set data.path_to_cache to a"
        " folder with write permission and free space"
    )

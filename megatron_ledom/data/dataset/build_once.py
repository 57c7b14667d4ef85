"""The sample index is built by one process, while those that need it wait and read how far it is."""

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
"""Those that do not build wait so long while nobody does."""


def node() -> str:
    """Return the name of this process's host; a path alone does not say on which disk."""
    return socket.gethostname()


class Progress:
    """Show how much has been built: a bar on a terminal, a line with the time left otherwise, and a note for those that wait."""

    def __init__(self, what: str, total: int, note: Callable[[str], None]) -> None:
        self.what, self.total, self.note = what, total, note
        self.done = 0
        self.started = self.reported = time.monotonic()
        self.bar = tqdm(total=total, desc=what, unit="document", unit_scale=True, disable=None)

    def advance(self, amount: int = 0) -> None:
        """Add what was just built; call it with nothing now and then to keep the others informed."""
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
    """Return when `is_done`; call `build(note)` where that is this process's task and no other one is at it.

    `note` leaves a line for those that wait. Nothing but wasted work comes of a file system whose locks do not reach other nodes,
    because finished files appear whole. Raises DataError on a process that must not build, when nobody has built for
    `patience_seconds`: the one that should is dead. Raises UsageError when the folder of `lock_path` cannot be written.
    """
    lock, folder = Lock(lock_path), os.path.dirname(lock_path)
    last_seen = told = time.monotonic()
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
                f"node {node()}: {folder} lacks the sample index and nobody has built it for {patience_seconds:,.0f} s; the first"
                " rank of the node should, look for its error in the log"
            )
        if now - told > REPORT_SECONDS:
            told = now
            log.warning("node %s waits for the sample index in %s; %s", node(), folder, lock.holder())
        time.sleep(POLL_SECONDS)


def _build(lock: Lock, is_done: Callable[[], bool], build: Callable[[Callable[[str], None]], None]) -> None:
    """Build what is missing while the lock is held, and release it."""

    def note(text: str) -> None:
        """Leave a line in the lock's file."""
        lock.note(f"{node()}, process {os.getpid()}: {text}")

    try:
        note("has begun")
        if not is_done():  # another node may have been at it
            build(note)
    finally:
        lock.release(keep_file=True)


def cannot_build(error: OSError, folder: str) -> UsageError:
    """Return the error to raise when the folder of the index cannot be written."""
    return UsageError(
        f"node {node()}: the sample index cannot be written to {folder} ({error.strerror}); set data.path_to_cache to a"
        " writable folder with room"
    )

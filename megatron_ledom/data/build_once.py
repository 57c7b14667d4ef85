"""Files that one process makes and many wait for, on one node or on a shared path, without a collective among them.

A lock of the kernel (flock) says that somebody builds; it is gone with its holder, however that ends. Others look now and then
whether the files are there. Nothing but wasted work comes of a file system whose locks do not reach other nodes, because
finished files appear whole, by a rename.
"""

import fcntl
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from megatron_ledom.errors import NO_LOCKS, DataError, UsageError

log = logging.getLogger(__name__)

POLL_SECONDS = 0.1
REPORT_SECONDS = 15.0
PATIENCE_SECONDS = 120.0
"""How long those that do not build wait while nobody does."""


def node() -> str:
    """Of this process; a path alone does not say on which disk."""
    return socket.gethostname()


class Progress:
    """What has been built: a bar on a terminal, a line with the time left otherwise, and a note for those that wait."""

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

    `note` leaves a line for those that wait. Raises DataError on a process that must not build, when nobody has built for
    `patience_seconds`: the one that should is dead. Raises UsageError when the folder of `lock_path` cannot be written.
    """
    last_seen = told = time.monotonic()
    while not is_done():
        with _lock(lock_path, shared=not may_build) as (is_mine, note):
            if may_build and is_mine:
                if not is_done():  # another node may have been at it
                    build(note)
                return
        now = time.monotonic()
        if not is_mine:
            last_seen = now
        if now - last_seen > patience_seconds:
            raise DataError(
                f"node {node()}: {os.path.dirname(lock_path)} lacks the sample index and nobody has built it for"
                f" {patience_seconds:,.0f} s; the first rank of the node should, look for its error in the log"
            )
        if now - told > REPORT_SECONDS:
            told = now
            log.warning("node %s waits for the sample index in %s; %s", node(), os.path.dirname(lock_path), _read(lock_path))
        time.sleep(POLL_SECONDS)


@contextmanager
def _lock(path: str, *, shared: bool) -> Iterator[tuple[bool, Callable[[str], None]]]:
    """(whether nobody else builds, what leaves a note). A shared lock is only a look. Without locks nobody is seen."""
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise cannot_build(error, os.path.dirname(path)) from error

    def note(text: str) -> None:
        """Write who is at it, and how far, into the lock file."""
        content = f"{node()}, process {os.getpid()}: {text}\n".encode()
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, content, 0)

    try:
        is_mine = _take(descriptor, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        if is_mine and not shared:
            note("has begun")
        yield is_mine, note
    finally:
        os.close(descriptor)  # and with it the lock


def _take(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    return True


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").strip() or "nobody has begun"
    except OSError:
        return "nobody has begun"


def cannot_build(error: OSError, folder: str) -> UsageError:
    """What to say when the folder of the index cannot be written."""
    return UsageError(
        f"node {node()}: the sample index cannot be written to {folder} ({error.strerror}); set data.path_to_cache to a"
        " writable folder with room"
    )

"""Locks of outputs: two processes never write the same output.

The lock is one of the kernel (flock) on a small file beside a file, or inside a folder. It is gone with its holder, however that
ends, and with the last worker that the holder forked. The holder removes the file at its end; one that a killed process left
behind holds nothing.

Files that one process makes and many wait for, on one node or on a shared path, without a collective among them.

A lock of the kernel (flock) says that somebody builds; it is gone with its holder, however that ends. Others look now and then
whether the files are there. Nothing but wasted work comes of a file system whose locks do not reach other nodes, because
finished files appear whole, by a rename.
"""

import contextlib
import fcntl
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from tqdm import tqdm

from megatron_ledom.errors import NO_LOCKS, DataError, UsageError

log = logging.getLogger(__name__)

LOCK_SUFFIX = ".lock"
"""FILE.lock beside an output file or a shard prefix; FOLDER/.lock inside an output folder."""


@contextmanager
def output_file_lock(path: str | Path, option: str = "--output") -> Iterator[None]:
    """Hold the output file, or shard prefix, `path` until the context ends. Raise UsageError when another process holds it.

    The folder of `path` must exist. Two names of one file, such as a link and its target, share the lock.
    """
    real = os.path.realpath(path)
    with _locked(real + LOCK_SUFFIX, path, option):
        yield


@contextmanager
def output_folder_lock(folder: str | Path, option: str = "--output") -> Iterator[None]:
    """Make the output folder and hold it until the context ends. Raise UsageError when another process holds it."""
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{option} {folder} cannot be made ({error.strerror}); name a folder that you may write to") from error
    with _locked(os.path.join(os.path.realpath(folder), LOCK_SUFFIX), folder, option):
        yield


def this_process(job: str | None = None) -> str:
    """Return who this is, for the process that finds the output in use: process, host, SLURM job if given, and since when."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return f"process {os.getpid()} on {socket.gethostname()}{f', SLURM job {job}' if job else ''}, since {now}"


@contextmanager
def _locked(lock: str, output: str | Path, option: str) -> Iterator[None]:
    descriptor = _acquire(lock, output, option)
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{this_process()}\n".encode(), 0)
        yield
    finally:
        with contextlib.suppress(OSError):  # removed before it is released: nobody can hold a file that has no name
            os.unlink(lock)
        os.close(descriptor)


def _acquire(lock: str, output: str | Path, option: str) -> int:
    """Return the descriptor of the locked file; closing it releases the lock."""
    while True:
        try:
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise UsageError(
                f"{option} {output} cannot be written ({error.strerror}: {lock}); name a place that you may write to"
            ) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(descriptor, 1000, 0).decode(errors="replace").strip() or "another process"
            os.close(descriptor)
            raise UsageError(
                f"{option} {output} is being written by {holder}; wait until it ends, stop it, or name another {option}"
            ) from error
        except OSError as error:
            if error.errno not in NO_LOCKS:
                os.close(descriptor)
                raise
            log.warning("%s is on a file system without locks (%s): a second process is not noticed", output, error.strerror)
        if _is_current(descriptor, lock):
            return descriptor
        os.close(descriptor)  # its holder removed it between our opening and locking; try the new one


def _is_current(descriptor: int, lock: str) -> bool:
    """Return True if the open file still has its name."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(lock))
    except FileNotFoundError:
        return False


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

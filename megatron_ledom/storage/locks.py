"""Locks of outputs: two processes never write the same one; of files that one process makes, many wait for it.

A lock is one of the kernel on a small file beside a file, or inside a folder. It is gone with its holder, however that ends. The
file says who holds it, for those that are refused or wait; one that a killed process left behind holds nothing. On a file system
without locks a warning is logged and the work goes on.

Libraries of locks do less: filelock 4 closes the lock in forked workers, which may outlive the process that they write for, has no
shared key, leaves its files behind, and where there are no locks makes some that a kill leaves for ever.
"""

import contextlib
import errno
import fcntl
import functools
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

from megatron_ledom.errors import NO_LOCKS, DataError, UsageError, cannot_write

log = logging.getLogger(__name__)

LOCK_SUFFIX = ".lock"
"""FILE.lock beside an output file or a shard prefix; FOLDER/.lock inside an output folder."""
POLL_SECONDS = 0.1
REPORT_SECONDS = 15.0
PATIENCE_SECONDS = 120.0
"""How long those that do not build wait while nobody does."""


class Lock:
    """The lock of a file, whose folder must exist. Nothing here waits.

    is_inherited: forked workers hold it too (flock), until the last of them has ended; else this process alone does (POSIX).
    """

    def __init__(self, path: str, *, is_inherited: bool = True) -> None:
        self.path = path
        self._lock = fcntl.flock if is_inherited else fcntl.lockf
        self._file: BinaryIO

    def take(self, *, is_shared: bool = False) -> bool:
        """Return True if the lock is ours now, or there are no locks here. Raise OSError where its file cannot be made.

        is_shared: beside others that share it, which is no more than a look.
        """
        while True:
            file = open(self.path, "r+b", buffering=0, opener=_open_or_make)  # noqa: SIM115  closed in release()
            try:
                self._lock(file, (fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    file.close()
                    if error.errno in (errno.EACCES, errno.EAGAIN):
                        return False
                    raise
                _warn_of_no_locks(os.path.dirname(self.path), error.strerror)
            self._file = file
            if self._is_current():
                return True
            file.close()  # its holder removed it between our opening and locking; try the new one

    def note(self, text: str) -> None:
        """Write into the file who holds the lock, or how far that one is. Call while it is held. Raise OSError."""
        os.ftruncate(self.fileno(), 0)
        os.pwrite(self.fileno(), f"{text}\n".encode(), 0)

    def holder(self) -> str:
        """Return the note of the process that holds the lock, which is another one."""
        try:
            return Path(self.path).read_text(encoding="utf-8", errors="replace").strip() or "another process"
        except OSError:
            return "another process"

    def fileno(self) -> int:
        """Return the descriptor that a process started by this one keeps open to hold the lock as well."""
        return self._file.fileno()

    def release(self, *, keep_file: bool = False) -> None:
        """Give the lock up, and remove its file before: nobody can hold a file that has no name."""
        if not keep_file and self._is_current():
            with contextlib.suppress(OSError):
                os.unlink(self.path)
        self._file.close()

    def _is_current(self) -> bool:
        """Return True if the open file still has its name."""
        try:
            return os.path.samestat(os.fstat(self.fileno()), os.stat(self.path))
        except OSError:
            return False


def _open_or_make(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CREAT, 0o666)


@functools.cache
def _warn_of_no_locks(folder: str, reason: str) -> None:
    """Log once that a folder has no locks."""
    log.warning("%s is on a file system without locks (%s): a second process that writes there is not noticed", folder, reason)


def this_process() -> str:
    """Return who this is, for the process that finds the output in use: process, host, SLURM job if there is one, since when."""
    job = os.environ.get("SLURM_JOB_ID")
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return f"process {os.getpid()} on {socket.gethostname()}{f', SLURM job {job}' if job else ''}, since {now}"


@contextmanager
def hold(lock: Lock, what: str, advice: str, *, patience_seconds: float = 0.0, keep_file: bool = False) -> Iterator[None]:
    """Hold a lock until the context ends. Raise UsageError when another process has it for `patience_seconds`, with `advice`.

    what: the output, as the user named it. Raise UsageError too where the lock's file cannot be made.
    """
    _wait_for(lock, what, advice, patience_seconds)
    try:
        try:
            lock.note(this_process())
        except OSError as error:
            raise cannot_write(error, lock.path) from error
        yield
    finally:
        lock.release(keep_file=keep_file)


def _wait_for(lock: Lock, what: str, advice: str, patience_seconds: float) -> None:
    begun = told = time.monotonic()
    while True:
        try:
            if lock.take():
                return
        except OSError as error:
            raise UsageError(
                f"{what} cannot be written ({error.strerror}: {lock.path}); name a place that you may write to"
            ) from error
        holder, now = lock.holder(), time.monotonic()
        if now - begun >= patience_seconds:
            raise UsageError(f"{what} is being written by {holder}; {advice}")
        if told == begun or now - told > REPORT_SECONDS:
            told = now
            log.warning("%s is being written by %s; waiting up to %.0f s for its end", what, holder, patience_seconds)
        time.sleep(POLL_SECONDS)


def output_file_lock(path: str | Path, option: str = "--output") -> AbstractContextManager[None]:
    """Hold the output file, or shard prefix, `path` until the context ends. Raise UsageError when another process holds it.

    The folder of `path` must exist. Two names of one file, such as a link and its target, share the lock.
    """
    return _output_lock(os.path.realpath(path) + LOCK_SUFFIX, path, option)


@contextmanager
def output_folder_lock(folder: str | Path, option: str = "--output") -> Iterator[None]:
    """Make the output folder and hold it until the context ends. Raise UsageError when another process holds it."""
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{option} {folder} cannot be made ({error.strerror}); name a folder that you may write to") from error
    with _output_lock(os.path.join(os.path.realpath(folder), LOCK_SUFFIX), folder, option):
        yield


def _output_lock(lock: str, output: str | Path, option: str) -> AbstractContextManager[None]:
    return hold(Lock(lock), f"{option} {output}", f"wait until it ends, stop it, or name another {option}")


def node() -> str:
    """Return the name of this process's host; a path alone does not say on which disk."""
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
    """What to say when the folder of the index cannot be written."""
    return UsageError(
        f"node {node()}: the sample index cannot be written to {folder} ({error.strerror}); set data.path_to_cache to a"
        " writable folder with room"
    )

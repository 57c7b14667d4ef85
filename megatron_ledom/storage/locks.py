"""Locks of outputs: two processes never write the same one.

A lock is a kernel lock on a small file next to an output file, or inside an output folder. It ends when its process ends, also by
a kill. The file names the process, for the messages of other processes; a file left by a killed process locks nothing. On a file
system without locks a warning is logged and the work continues.

Libraries do less: filelock 4 closes the lock in forked workers, which may outlive their parent; it has no shared locks and leaves
its files; on a file system without locks it uses files that stay for ever after a kill.
"""

import contextlib
import errno
import fcntl
import functools
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from megatron_ledom.errors import NO_LOCKS, UsageError, cannot_write

log = logging.getLogger(__name__)

LOCK_SUFFIX = ".lock"
"""FILE.lock for an output file or a shard prefix; FOLDER/.lock for an output folder."""
POLL_SECONDS = 0.1
REPORT_SECONDS = 15.0


class Lock:
    """The lock of a file, whose folder must exist. No method waits.

    is_inherited: forked workers hold the lock too (flock), until the last one ends; otherwise only this process does (POSIX).
    """

    def __init__(self, path: str, *, is_inherited: bool = True) -> None:
        self.path = path
        self._lock = fcntl.flock if is_inherited else fcntl.lockf
        self._file: BinaryIO

    def take(self, *, is_shared: bool = False) -> bool:
        """Take the lock. Return False if another process has it, True otherwise, also on a file system without locks.

        Raise OSError if the file of the lock cannot be made.
        is_shared: take a shared lock, which several processes can hold at once.
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
            file.close()  # the previous holder removed it before we locked it; try the new file

    def note(self, text: str) -> None:
        """Write the holder of the lock, or its progress, into the file. Call while holding the lock. Raise OSError."""
        os.ftruncate(self.fileno(), 0)
        os.pwrite(self.fileno(), f"{text}\n".encode(), 0)

    def holder(self) -> str:
        """Return the note of the other process that holds the lock."""
        try:
            return Path(self.path).read_text(encoding="utf-8", errors="replace").strip() or "another process"
        except OSError:
            return "another process"

    def fileno(self) -> int:
        """Return the file descriptor; a child process that keeps it open holds the lock as well."""
        return self._file.fileno()

    def release(self, *, keep_file: bool = False) -> None:
        """Remove the file, unless `keep_file` is set, and then release the lock."""
        if not keep_file and self._is_current():
            with contextlib.suppress(OSError):
                os.unlink(self.path)
        self._file.close()

    def _is_current(self) -> bool:
        """Return True if the path still names the open file."""
        try:
            return os.path.samestat(os.fstat(self.fileno()), os.stat(self.path))
        except OSError:
            return False


def _open_or_make(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CREAT, 0o666)


@functools.cache
def _warn_of_no_locks(folder: str, reason: str) -> None:
    """Log once per folder that it has no locks."""
    log.warning(
        "%s is on a file system without locks (%s): do not start a second process that writes there; it would not be noticed",
        folder,
        reason,
    )


def this_process() -> str:
    """Return a description of this process for a lock file: process, host, SLURM job if there is one, start of the lock."""
    job = os.environ.get("SLURM_JOB_ID")
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return f"process {os.getpid()} on {socket.gethostname()}{f', SLURM job {job}' if job else ''}, since {now}"


@contextmanager
def hold(lock: Lock, what: str, advice: str, *, patience_seconds: float = 0.0, keep_file: bool = False) -> Iterator[None]:
    """Hold a lock until the context ends.

    what: the output, as the user named it. Raise UsageError with `advice` if another process keeps the lock for
    `patience_seconds`, and UsageError if the lock's file cannot be made.
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
    begun = reported = time.monotonic()
    while True:
        try:
            if lock.take():
                return
        except OSError as error:
            raise UsageError(
                f"{what} cannot be written ({error.strerror}: {lock.path}); name a path that you may write to"
            ) from error
        holder, now = lock.holder(), time.monotonic()
        if now - begun >= patience_seconds:
            raise UsageError(f"{what} is being written by {holder}; {advice}")
        if reported == begun or now - reported > REPORT_SECONDS:
            reported = now
            log.warning(
                "%s is being written by %s; waiting up to %.0f s for that process to end", what, holder, patience_seconds
            )
        time.sleep(POLL_SECONDS)


def output_file_lock(path: str | Path, option: str = "--output") -> AbstractContextManager[None]:
    """Lock the output file, or shard prefix, `path` until the context ends. Raise UsageError if another process has the lock.

    The folder of `path` must exist. A link and its target have the same lock.
    """
    return _output_lock(os.path.realpath(path) + LOCK_SUFFIX, path, option)


@contextmanager
def output_folder_lock(folder: str | Path, option: str = "--output") -> Iterator[None]:
    """Make the output folder and lock it until the context ends. Raise UsageError if another process has the lock."""
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{option} {folder} cannot be made ({error.strerror}); name a folder that you may write to") from error
    with _output_lock(os.path.join(os.path.realpath(folder), LOCK_SUFFIX), folder, option):
        yield


def _output_lock(lock: str, output: str | Path, option: str) -> AbstractContextManager[None]:
    return hold(Lock(lock), f"{option} {output}", f"wait until it ends, stop it, or name another {option}")

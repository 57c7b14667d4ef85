"""Locks of outputs: two processes never write the same output.

The lock is one of the kernel (flock) on a small file beside a file, or inside a folder. It is gone with its holder, however that
ends, and with the last worker that the holder forked. The holder removes the file at its end; one that a killed process left
behind holds nothing.
"""

import contextlib
import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from megatron_ledom.errors import NO_LOCKS, UsageError

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

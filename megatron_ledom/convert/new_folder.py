"""A folder that appears whole or not at all: written under a temporary name beside it, renamed last."""

import contextlib
import fcntl
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_ledom.checkpoint.folder import fsync_path
from megatron_ledom.errors import FULL, NO_LOCKS, DataError, UsageError

log = logging.getLogger(__name__)

PART, OLD, LOCK = ".part", ".old", ".lock"


@contextmanager
def new_folder(save: str, key: str, may_replace: Callable[[], None] | None = None) -> Iterator[str]:
    """Inside, an empty folder to write into; afterwards it is `save`. Whatever is raised inside leaves nothing behind.

    key: path in the folder of the file without which nothing loads it; to be written as `key` + PART, since it gets its name in the
    moment before the folder gets its own. A killed process leaves `save`.part, which does not load, and which the next one clears.
    A link is followed, and stays. `may_replace`: called when `save` exists already, to raise if it must not be replaced; without it,
    an existing one is refused.
    Raises UsageError for a target that cannot be used, or that another process is writing now, DataError when the disk is full.
    """
    save = _followed(save)
    _check_name(save)
    _check_target(save, may_replace)
    part = save.rstrip("/") + PART
    made = _make_folder(part)
    with _held(part, save):
        try:
            _take_back(save)
            _check_target(save, may_replace)  # another process may just have finished it
            _clear(part)
            yield part
            _sync_all(part)
            _put_in_place(part, save, key)
        except BaseException as error:
            shutil.rmtree(part, ignore_errors=True)
            for folder in made:
                with contextlib.suppress(OSError):  # somebody else wrote into it
                    folder.rmdir()
            if isinstance(error, OSError) and error.errno in FULL:
                where = error.filename or part
                raise DataError(
                    f"{where} cannot be written: {error.strerror}; nothing of it is left: make room, then run the command again"
                ) from error
            raise


def _followed(save: str) -> str:
    """The folder behind a link, which stays a link. Raises UsageError for a link that leads nowhere."""
    link = save.rstrip("/")
    if not os.path.islink(link):
        return save
    folder = os.path.realpath(link)
    if not os.path.exists(folder) and not os.path.exists(folder + OLD):  # a killed conversion leaves the old one there
        raise UsageError(
            f"--save {save} is a link to {os.readlink(link)}, which is not there; remove the link, or name that folder"
        )
    return folder


def _check_name(save: str) -> None:
    """Refuse a folder that cannot be renamed, and beside which nothing can be made."""
    if os.path.basename(save.rstrip("/")) in ("", ".", "..") or os.path.ismount(save):
        raise UsageError(
            f"--save {save} is no folder that can be replaced by a new one (the working folder, one above it, or where a disk is"
            " mounted); name a folder in it, or call it by its own name from another folder"
        )


def _take_back(save: str) -> None:
    """Put an old folder back which a process had moved aside when it was killed."""
    old = save.rstrip("/") + OLD
    if os.path.exists(old) and not os.path.lexists(save):
        log.warning("a conversion was killed while it replaced %s: the old one is put back first", save)
        os.rename(old, save)


def _check_target(save: str, may_replace: Callable[[], None] | None) -> None:
    if not os.path.lexists(save):
        return
    if may_replace is None:
        raise UsageError(f"{save} exists already; name another folder with --save")
    may_replace()


@contextmanager
def _held(part: str, save: str) -> Iterator[None]:
    """Inside, no other process writes to `part`: a lock of the kernel on a file in it, gone with its holder however that ends.

    Raises UsageError when another one has it. A file system without locks is warned of.
    """
    path = os.path.join(part, LOCK)
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except FileNotFoundError as error:  # the one that had it has this moment put it in place
        raise _in_use(save) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise _in_use(save) from error
    except OSError as error:
        if error.errno not in NO_LOCKS:
            os.close(descriptor)
            raise
        log.warning("%s is on a file system without locks (%s): nothing hinders a second conversion", save, error.strerror)
    try:
        if not os.path.exists(path) or not os.path.samestat(os.fstat(descriptor), os.stat(path)):
            raise _in_use(save)
        yield
    finally:
        os.close(descriptor)  # and with it the lock


def _in_use(save: str) -> UsageError:
    return UsageError(
        f"--save {save} is being written by another conversion now; wait for that one, or name another folder with --save"
    )


def _clear(part: str) -> None:
    """Remove what a killed process left, but not the lock."""
    for entry in os.scandir(part):
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path)
        elif entry.name != LOCK:
            os.unlink(entry.path)


def _make_folder(folder: str) -> list[Path]:
    """Make a folder; returns the folders above it that had to be made too, the innermost first. Raises UsageError."""
    made = [path for path in Path(folder).parents if not path.exists()]
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--save {folder} cannot be made ({error.strerror}); name a folder you may write to") from error
    return made


def _put_in_place(new: str, folder: str, key: str) -> None:
    """Put `new`, complete with its key, where `folder` is; the old content is moved aside first and removed last."""
    old = folder.rstrip("/") + OLD
    os.rename(os.path.join(new, key + PART), os.path.join(new, key))
    if os.path.exists(folder):
        shutil.rmtree(old, ignore_errors=True)
        os.rename(folder, old)
    try:
        os.rename(new, folder)
    except BaseException:
        if os.path.exists(old):
            os.rename(old, folder)
        raise
    fsync_path(os.path.dirname(os.path.join(folder, key)))
    os.unlink(os.path.join(folder, LOCK))  # not before, or another process could take the folder
    fsync_path(os.path.dirname(os.path.abspath(folder)))
    shutil.rmtree(old, ignore_errors=True)


def _sync_all(folder: str) -> None:
    """Everything below a folder is on disk after this, its lists of names too."""
    for path, _, files in os.walk(folder):
        for name in files:
            fsync_path(os.path.join(path, name))
        fsync_path(path)

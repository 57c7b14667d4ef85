"""Folders that appear whole or not at all: written under a temporary name, forced to disk, then renamed."""

import contextlib
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_ledom.errors import FULL, DataError, UsageError
from megatron_ledom.storage.files import PART_SUFFIX, publish, sync
from megatron_ledom.storage.locks import output_file_lock

log = logging.getLogger(__name__)

OLD = ".old"


@contextmanager
def new_folder(
    path: str, key: str | None = None, may_replace: Callable[[], None] | None = None, *, option: str = "--save"
) -> Iterator[str]:
    """Yield an empty folder to write into, which becomes `path`, on disk, after the context. An error leaves nothing.

    key: the file that every reader needs, as a path inside the folder. Write it as `key` + PART_SUFFIX: it gets its name just
    before the folder does, so that the `path`.part of a killed process does not load. The next process removes `path`.part.
    may_replace: called if `path` exists already; it raises if `path` must not be replaced. Without it, an existing `path` is
    an error. option: the user's name for the path. A link is followed, and stays.
    Raises UsageError if the target cannot be used or another process is writing it, DataError if the disk is full.
    """
    path = _followed(path, option)
    _check_name(path, option)
    path = path.rstrip("/")
    _check_target(path, may_replace, option)
    part, made = path + PART_SUFFIX, _make_parents(path, option)
    try:
        with output_file_lock(path, option):
            _restore_old(path)
            _check_target(path, may_replace, option)  # another process may have finished it in the meantime
            with _empty_folder(part, option):
                yield part
                sync_tree(part)
                _replace(part, path, key)
    except BaseException:
        for folder in made:
            with contextlib.suppress(OSError):  # another process wrote into it
                folder.rmdir()
        raise


@contextmanager
def _empty_folder(part: str, option: str) -> Iterator[None]:
    """Make an empty folder for the context; an error removes it. A full disk raises DataError."""
    try:
        shutil.rmtree(part, ignore_errors=True)  # a killed process may have left it
        os.makedirs(part)
    except OSError as error:
        raise _cannot_make(part, option, error) from error
    try:
        yield
    except BaseException as error:
        shutil.rmtree(part, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in FULL:
            raise DataError(
                f"{error.filename or part} cannot be written: {error.strerror}; the unfinished output was removed: make room, then run the"
                " command again"
            ) from error
        raise


def sync_tree(folder: str) -> None:
    """Force all files and folders below a folder to the disk."""
    for path, _, files in os.walk(folder):
        for name in files:
            sync(os.path.join(path, name))
        sync(path)


def _followed(path: str, option: str) -> str:
    """Return the target of a link, or the path itself. Raises UsageError for a link to a missing folder."""
    link = path.rstrip("/")
    if not os.path.islink(link):
        return path
    folder = os.path.realpath(link)
    if not os.path.exists(folder) and not os.path.exists(folder + OLD):  # a killed process may have left only the old folder
        raise UsageError(
            f"{option} {path} is a link to {os.readlink(link)}, which does not exist; remove the link, or name the folder itself"
        )
    return folder


def _check_name(path: str, option: str) -> None:
    """Raise UsageError for a folder that cannot be renamed."""
    if os.path.basename(path.rstrip("/")) in ("", ".", "..") or os.path.ismount(path):
        raise UsageError(
            f"{option} {path} cannot be replaced by a new folder (it is the working folder, a folder above it, or a mount point);"
            " name a folder inside it, or give its full path from another folder"
        )


def _restore_old(path: str) -> None:
    """Restore an old folder that a killed process had moved aside."""
    if os.path.exists(path + OLD) and not os.path.lexists(path):
        log.warning("a process was killed while it replaced %s: the old folder is restored", path)
        publish(path + OLD, path)


def _check_target(path: str, may_replace: Callable[[], None] | None, option: str) -> None:
    if not os.path.lexists(path):
        return
    if may_replace is None:
        raise UsageError(f"{path} exists already; name another folder with {option}")
    may_replace()


def _make_parents(path: str, option: str) -> list[Path]:
    """Make the folders above a path. Returns the new ones, the innermost first. Raises UsageError."""
    made = [folder for folder in Path(path).parents if not folder.exists()]
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot_make(path, option, error) from error
    return made


def _cannot_make(path: str, option: str, error: OSError) -> UsageError:
    return UsageError(f"{option} {path} cannot be made ({error.strerror}); name a folder you may write to")


def _replace(new: str, path: str, key: str | None) -> None:
    """Rename `new`, with its key, to `path`; the old folder is moved aside first and removed last."""
    old = path + OLD
    shutil.rmtree(old, ignore_errors=True)
    if key is not None:
        os.rename(os.path.join(new, key + PART_SUFFIX), os.path.join(new, key))
    if os.path.exists(path):
        os.rename(path, old)
    try:
        os.rename(new, path)
    except BaseException:
        if os.path.exists(old):
            os.rename(old, path)
        raise
    sync(os.path.dirname(os.path.join(path, key or "")))
    sync(os.path.dirname(os.path.abspath(path)))
    shutil.rmtree(old, ignore_errors=True)

"""Folders that appear whole or not at all: written under a temporary name beside it, forced to disk, renamed last."""

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
    """Inside, an empty folder to write into; afterwards it is `path`, on disk. Whatever is raised inside leaves nothing behind.

    key: path in the folder of the file without which nothing loads it; to be written as `key` + PART_SUFFIX, since it gets its name
    in the moment before the folder gets its own. A killed process leaves `path`.part, which does not load, and which the next one
    clears. A link is followed, and stays. `may_replace`: called when `path` exists already, to raise if it must not be replaced;
    without it, an existing one is refused. option: the user's name for the path.
    Raises UsageError for a target that cannot be used, or that another process is writing now, DataError when the disk is full.
    """
    path = _followed(path, option)
    _check_name(path, option)
    path = path.rstrip("/")
    _check_target(path, may_replace, option)
    part, made = path + PART_SUFFIX, _make_parents(path, option)
    try:
        with output_file_lock(path, option):
            _take_back(path)
            _check_target(path, may_replace, option)  # another process may just have finished it
            with _empty_folder(part, option):
                yield part
                sync_tree(part)
                _put_in_place(part, path, key)
    except BaseException:
        for folder in made:
            with contextlib.suppress(OSError):  # somebody else wrote into it
                folder.rmdir()
        raise


@contextmanager
def _empty_folder(part: str, option: str) -> Iterator[None]:
    """Inside, an empty folder, which an error removes; where that is of a full disk it becomes a DataError."""
    try:
        shutil.rmtree(part, ignore_errors=True)  # what a killed process left
        os.makedirs(part)
    except OSError as error:
        raise _cannot_make(part, option, error) from error
    try:
        yield
    except BaseException as error:
        shutil.rmtree(part, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in FULL:
            raise DataError(
                f"{error.filename or part} cannot be written: {error.strerror}; nothing of it is left: make room, then run the"
                " command again"
            ) from error
        raise


def sync_tree(folder: str) -> None:
    """Force everything below a folder to the disk, its lists of names too."""
    for path, _, files in os.walk(folder):
        for name in files:
            sync(os.path.join(path, name))
        sync(path)


def _followed(path: str, option: str) -> str:
    """Return the folder behind a link, which stays a link. Raises UsageError for a link that leads nowhere."""
    link = path.rstrip("/")
    if not os.path.islink(link):
        return path
    folder = os.path.realpath(link)
    if not os.path.exists(folder) and not os.path.exists(folder + OLD):  # a killed process leaves the old one there
        raise UsageError(
            f"{option} {path} is a link to {os.readlink(link)}, which is not there; remove the link, or name that folder"
        )
    return folder


def _check_name(path: str, option: str) -> None:
    """Refuse a folder that cannot be renamed, and beside which nothing can be made."""
    if os.path.basename(path.rstrip("/")) in ("", ".", "..") or os.path.ismount(path):
        raise UsageError(
            f"{option} {path} is no folder that can be replaced by a new one (the working folder, one above it, or where a disk is"
            " mounted); name a folder in it, or call it by its own name from another folder"
        )


def _take_back(path: str) -> None:
    """Put an old folder back which a process had moved aside when it was killed."""
    if os.path.exists(path + OLD) and not os.path.lexists(path):
        log.warning("a process was killed while it replaced %s: the old one is put back first", path)
        publish(path + OLD, path)


def _check_target(path: str, may_replace: Callable[[], None] | None, option: str) -> None:
    if not os.path.lexists(path):
        return
    if may_replace is None:
        raise UsageError(f"{path} exists already; name another folder with {option}")
    may_replace()


def _make_parents(path: str, option: str) -> list[Path]:
    """Make the folders above a path; returns those that were not there, the innermost first. Raises UsageError."""
    made = [folder for folder in Path(path).parents if not folder.exists()]
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot_make(path, option, error) from error
    return made


def _cannot_make(path: str, option: str, error: OSError) -> UsageError:
    return UsageError(f"{option} {path} cannot be made ({error.strerror}); name a folder you may write to")


def _put_in_place(new: str, path: str, key: str | None) -> None:
    """Put `new`, complete with its key, where `path` is; the old content is moved aside first and removed last."""
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

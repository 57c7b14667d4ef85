"""A folder that appears whole or not at all: written under a temporary name beside it, renamed last."""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_ledom.checkpoint.folder import fsync_path
from megatron_ledom.errors import FULL, DataError, UsageError

PART, OLD = ".part", ".old"


@contextmanager
def new_folder(save: str, may_replace: Callable[[], None] | None = None) -> Iterator[str]:
    """Inside, an empty folder to write into; afterwards it is `save`. Whatever is raised inside leaves nothing behind.

    A killed process leaves `save`.part, which the next one removes. `may_replace`: called when `save` exists already, to raise
    if it must not be replaced; without it, an existing one is refused. Raises UsageError for a target that cannot be used,
    DataError when the disk is full.
    """
    if os.path.lexists(save):
        if may_replace is None:
            raise UsageError(f"{save} exists already; name another folder with --save")
        may_replace()
    part = save.rstrip("/") + PART
    shutil.rmtree(part, ignore_errors=True)
    made = _make_folder(part)
    try:
        yield part
        fsync_path(part)
        _put_in_place(part, save)
    except OSError as error:
        if error.errno in FULL:
            where = error.filename or part
            raise DataError(
                f"{where} cannot be written: {error.strerror}; nothing of it is left: make room, then run the command again"
            ) from error
        raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
        for folder in made:
            with contextlib.suppress(OSError):  # it holds the new folder, or what somebody else wrote
                folder.rmdir()


def _make_folder(folder: str) -> list[Path]:
    """Make a folder; returns the folders above it that had to be made too, the innermost first. Raises UsageError."""
    made = [path for path in Path(folder).parents if not path.exists()]
    try:
        os.makedirs(folder)
    except OSError as error:
        raise UsageError(f"--save {folder} cannot be made ({error.strerror}); name a folder you may write to") from error
    return made


def _put_in_place(new: str, folder: str) -> None:
    """Put `new` where `folder` is; the old content is moved aside first and removed last."""
    old = folder.rstrip("/") + OLD
    shutil.rmtree(old, ignore_errors=True)
    if os.path.exists(folder):
        os.rename(folder, old)
    os.rename(new, folder)
    fsync_path(os.path.dirname(os.path.abspath(folder)))
    shutil.rmtree(old, ignore_errors=True)

"""Whole files: written under another name, forced to disk, then renamed. JSON is written with NaN and Infinity refused.

Only this package renames, forces to disk and locks. After a kill or a power failure a file is as it was before or as it was to
become: its content is on disk before it gets its name, and the folder's list of names before the caller goes on.
"""

import contextlib
import errno
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from megatron_ledom.errors import DataError, UsageError, cannot_write

PART_SUFFIX = ".part"


def real_path(path: str | Path) -> str:
    """Return the file behind `path`: its `.part` must lie beside that file, or the rename would replace the link.

    The target of a link that is not there yet is to be made. Raise UsageError for a link into a missing folder, or in a circle,
    and for what is neither file nor folder, such as /dev/null, which a rename would replace as well.
    """
    real = os.path.realpath(path)
    is_link = os.path.islink(path)
    if os.path.islink(real) or (is_link and not os.path.isdir(os.path.dirname(real))):
        raise UsageError(
            f"{path} is a link to {os.readlink(path)}, where no file can be made (no folder is there, or the links form a circle);"
            " make that folder, or remove the link"
        )
    if os.path.exists(real) and not os.path.isfile(real) and not os.path.isdir(real):
        raise UsageError(f"{path} is no regular file; name a file, which is written under another name and renamed")
    return real


def sync(path: str | Path) -> None:
    """Force a file's content, or a folder's list of names, to the disk."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:
        if os.path.isdir(path):  # one may write into it and not list it: the file system orders the names by itself
            return
        raise
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP) or not os.path.isdir(path):
            raise  # some network file systems cannot force a folder
    finally:
        os.close(descriptor)


def sync_stream(stream: BinaryIO) -> None:
    """Force what was written to an open file to the disk."""
    stream.flush()
    os.fsync(stream.fileno())


def close_synced(stream: BinaryIO) -> None:
    """Close an open file whose content is on disk then."""
    sync_stream(stream)
    stream.close()


def publish(source: str | Path, target: str | Path) -> None:
    """Rename a file or folder whose content is on disk, and force its new name to the disk."""
    os.replace(source, target)
    sync(os.path.dirname(os.path.abspath(target)))


def withdraw(path: str | Path) -> None:
    """Remove a file if it is there, and force that to the disk: what it vouches for may change from then on."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    sync(os.path.dirname(os.path.abspath(path)))  # also when it is gone: a process that was killed may have removed it


@contextmanager
def new_file(path: str | Path, *, is_shared: bool = False) -> Iterator[BinaryIO]:
    """Give an open file to write to, which is `path`, whole and on disk, after the context; an error leaves `path` as it was.

    A link is followed. is_shared: other processes may write the same file now: each has a temporary name of its own, and those that
    killed processes of this host left are removed. Raise OSError, and UsageError of `real_path`.
    """
    real = real_path(path)
    part = f"{real}{PART_SUFFIX}"
    if is_shared:
        part = f"{real}.{socket.gethostname()}.{os.getpid()}{PART_SUFFIX}"
        _remove_abandoned(Path(real))
    try:
        with open(part, "wb") as stream:
            yield stream
            sync_stream(stream)
        publish(part, real)
    except BaseException:
        with contextlib.suppress(OSError):  # its bytes may be those that the disk lacks
            os.unlink(part)
        raise


def _remove_abandoned(file: Path) -> None:
    """Delete what killed processes of this host have left of a shared file."""
    for part in file.parent.glob(f"{file.name}.{socket.gethostname()}.*{PART_SUFFIX}"):
        if not os.path.exists(f"/proc/{part.name.split('.')[-2]}"):
            part.unlink(missing_ok=True)


def write_whole(path: str | Path, data: bytes, *, is_shared: bool = False) -> None:
    """Write a small file so that it is there whole or not at all, see `new_file`."""
    with new_file(path, is_shared=is_shared) as stream:
        stream.write(data)


def write_synced(path: str | Path, data: bytes) -> None:
    """Write a small file under its own name and force it to the disk: one that `publish` renames later, alone or with its folder."""
    with open(path, "wb") as stream:
        stream.write(data)
        sync_stream(stream)


def write_file(path: str | Path, content: str | bytes) -> None:
    """Write a small file so that it is there whole or not at all, see `write_whole`. Raise LedomError with its path."""
    try:
        write_whole(path, content.encode() if isinstance(content, str) else content)
    except OSError as error:
        raise cannot_write(error, str(path)) from error


def json_text(value: Any, *, where: str | Path, indent: int | None = None, ensure_ascii: bool = False) -> str:
    """Return `value` as JSON. Raise DataError, with the key, for a NaN or Infinity: these are no JSON and no result.

    where: the file or line that the value is for, for the message.
    """
    try:
        return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii, allow_nan=False)
    except ValueError as error:
        key = _key_not_finite(value, "")
        if key is None:  # something else than a number
            raise
        raise DataError(
            f"{where}: {key} is not a finite number, so it is no result and is not written; look for the step that computed it"
        ) from error


def write_json(path: str | Path, value: Any, *, indent: int | None = 1, ensure_ascii: bool = False) -> None:
    """Write `value` as a whole JSON file; see `write_file` and `json_text`."""
    write_file(path, json_text(value, where=path, indent=indent, ensure_ascii=ensure_ascii) + "\n")


def _key_not_finite(value: Any, key: str) -> str | None:
    """Return where in `value` the first NaN or Infinity stands, such as `scores[2].reward`; None if there is none."""
    if isinstance(value, float):
        return (key or "the value") if value != value or value in (float("inf"), float("-inf")) else None
    if isinstance(value, dict):
        found = (_key_not_finite(inner, f"{key}.{name}" if key else str(name)) for name, inner in value.items())
    elif isinstance(value, list | tuple):
        found = (_key_not_finite(inner, f"{key}[{index}]") for index, inner in enumerate(value))
    else:
        return None
    return next((place for place in found if place is not None), None)

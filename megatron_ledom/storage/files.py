"""Files that appear whole or not at all: written under another name, forced to disk, then renamed. JSON has no NaN or Infinity.

Only `megatron_ledom/storage` renames, forces to disk and locks. After a kill or a power failure a file is either old or new, never mixed:
its content is on disk before it gets its name, and the name is on disk before the caller continues.
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
    """Return the target of `path` if it is a link, so that a rename replaces the target and not the link.

    The target may be a new file. Raise UsageError for a link into a missing folder, a circle of links, and a path that is
    neither file nor folder: the rename would replace even /dev/null.
    """
    real = os.path.realpath(path)
    is_link = os.path.islink(path)
    if os.path.islink(real) or (is_link and not os.path.isdir(os.path.dirname(real))):
        raise UsageError(
            f"{path} is a link to {os.readlink(path)}, where no file can be made (the folder is missing, or the links form a circle);"
            " make that folder, or remove the link"
        )
    if os.path.exists(real) and not os.path.isfile(real) and not os.path.isdir(real):
        raise UsageError(
            f"{path} is not a regular file; name a file, because the output is written under another name and then renamed"
        )
    return real


def sync(path: str | Path) -> None:
    """Force a file's content, or a folder's list of names, to the disk."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:
        if os.path.isdir(path):  # writable but not listable: the file system must order the names itself
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
    """Force an open file to the disk and close it."""
    sync_stream(stream)
    stream.close()


def publish(source: str | Path, target: str | Path) -> None:
    """Rename a file or folder whose content is on disk, and force its new name to the disk."""
    os.replace(source, target)
    sync(os.path.dirname(os.path.abspath(target)))


def withdraw(path: str | Path) -> None:
    """Remove a file if it exists, and force the removal to the disk. Call it before you change the files that it describes."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    sync(os.path.dirname(os.path.abspath(path)))  # also if it was missing: a killed process may have removed it


@contextmanager
def new_file(path: str | Path, *, is_shared: bool = False) -> Iterator[BinaryIO]:
    """Yield an open file that becomes `path`, whole and on disk, after the context. An error leaves `path` unchanged.

    A link is followed. is_shared: other processes may write the same file at the same time, so each uses a temporary name of its
    own, and temporary files of killed processes of this host are removed. Raise OSError, or UsageError as `real_path` does.
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
        with contextlib.suppress(OSError):  # free its bytes: the disk may be full
            os.unlink(part)
        raise


def _remove_abandoned(file: Path) -> None:
    """Delete the temporary files of a shared file that killed processes of this host left."""
    for part in file.parent.glob(f"{file.name}.{socket.gethostname()}.*{PART_SUFFIX}"):
        if not os.path.exists(f"/proc/{part.name.split('.')[-2]}"):
            part.unlink(missing_ok=True)


def write_whole(path: str | Path, data: bytes, *, is_shared: bool = False) -> None:
    """Write a small file, whole or not at all; see `new_file`."""
    with new_file(path, is_shared=is_shared) as stream:
        stream.write(data)


def write_synced(path: str | Path, data: bytes) -> None:
    """Write a small file under its own name and force it to the disk; `publish` renames it or its folder later."""
    with open(path, "wb") as stream:
        stream.write(data)
        sync_stream(stream)


def write_file(path: str | Path, content: str | bytes) -> None:
    """Write a small file, whole or not at all; see `write_whole`. Raise LedomError with its path."""
    try:
        write_whole(path, content.encode() if isinstance(content, str) else content)
    except OSError as error:
        raise cannot_write(error, str(path)) from error


def json_text(value: Any, *, where: str | Path, indent: int | None = None, ensure_ascii: bool = False) -> str:
    """Return `value` as JSON. Raise DataError with the key of a NaN or Infinity, which JSON does not have.

    where: the file or line that will contain the value, for the message.
    """
    try:
        return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii, allow_nan=False)
    except ValueError as error:
        key = _key_not_finite(value, "")
        if key is None:  # not caused by a number
            raise
        raise DataError(
            f"{where}: {key} is not a finite number, so nothing is written; look for the step that computed it"
        ) from error


def write_json(path: str | Path, value: Any, *, indent: int | None = 1, ensure_ascii: bool = False) -> None:
    """Write `value` as a whole JSON file; see `write_file` and `json_text`."""
    write_file(path, json_text(value, where=path, indent=indent, ensure_ascii=ensure_ascii) + "\n")


def _key_not_finite(value: Any, key: str) -> str | None:
    """Return the key of the first NaN or Infinity in `value`, such as `scores[2].reward`, or None."""
    if isinstance(value, float):
        return (key or "the value") if value != value or value in (float("inf"), float("-inf")) else None
    if isinstance(value, dict):
        found = (_key_not_finite(inner, f"{key}.{name}" if key else str(name)) for name, inner in value.items())
    elif isinstance(value, list | tuple):
        found = (_key_not_finite(inner, f"{key}[{index}]") for index, inner in enumerate(value))
    else:
        return None
    return next((key for key in found if key is not None), None)

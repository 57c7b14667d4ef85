"""The folder of a run's checkpoints: `iter_0001000/` for each, `latest` with the name of the newest whole one.

`iter_0001000.part` is being written, `iter_0001000.0.trash` is being deleted: neither is ever taken for a checkpoint.
"""

import os
import re

from megatron_ledom.checkpoint.manifest import MANIFEST
from megatron_ledom.errors import DataError, UsageError

LATEST = "latest"
PART = ".part"
TRASH = ".trash"
NAME = re.compile(r"iter_(\d{7,})")


def checkpoint_name(iteration: int) -> str:
    """`iter_0001000`."""
    return f"iter_{iteration:07d}"


def finished_checkpoints(folder: str) -> dict[int, str]:
    """Iteration -> name of every checkpoint that was finished, by iteration; {} without the folder."""
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    whole = [name for name in names if NAME.fullmatch(name) and os.path.exists(os.path.join(folder, name, MANIFEST))]
    return dict(sorted((int(name.removeprefix("iter_")), name) for name in whole))


def latest_checkpoint(folder: str) -> str | None:
    """The checkpoint that `folder/latest` names, None without one. Raises DataError when it names none that is whole."""
    try:
        with open(os.path.join(folder, LATEST), encoding="utf-8") as file:
            name = file.read().strip()
    except (FileNotFoundError, NotADirectoryError):
        return None
    checkpoint = os.path.join(folder, name)
    if not name or not os.path.isdir(checkpoint):
        raise DataError(
            f"{folder}/{LATEST} names {name!r}, which is not there; write the name of a finished checkpoint into it"
        )
    return checkpoint


def find_checkpoint(load: str) -> str:
    """The checkpoint that `load` means: itself, or the latest one of a run folder. Raises UsageError."""
    if not os.path.isdir(load):
        raise UsageError(
            f"{load} is not a folder; give a run folder or one of its checkpoints, such as RUN/checkpoints/iter_0001000"
        )
    checkpoints = os.path.join(load, "checkpoints")
    if not os.path.isdir(checkpoints):
        return load
    latest = latest_checkpoint(checkpoints)
    if latest is None:
        raise UsageError(f"{load} has no finished checkpoint yet; train further, or name another run")
    return latest


def point_latest(folder: str, name: str) -> None:
    """Let `latest` name a checkpoint; at any moment it names the old one or the new one."""
    part = os.path.join(folder, LATEST + PART)
    with open(part, "w", encoding="utf-8") as file:
        file.write(name + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.rename(part, os.path.join(folder, LATEST))
    fsync_path(folder)


def move_to_trash(folder: str, name: str) -> None:
    """Take a checkpoint away in one step, so that it is never seen half deleted."""
    number = 0
    while os.path.exists(trash := os.path.join(folder, f"{name}.{number}{TRASH}")):
        number += 1
    os.rename(os.path.join(folder, name), trash)


def fsync_path(path: str) -> None:
    """What a file, or a folder's list of names, holds is on disk after this."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""The folder of a run's checkpoints: `iter_0001000/` for each, `latest` with the name of the newest whole one.

`iter_0001000.part` is being written, `iter_0001000.0.trash` is being deleted: neither is ever taken for a checkpoint. `retire` deletes
checkpoints: the newest few stay, those that replays begin from, and those at a multiple of `checkpoint.keep_interval`.
"""

import json
import logging
import os
import re
import shlex
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from megatron_ledom.checkpoint.manifest import MANIFEST, load_manifest
from megatron_ledom.config.schema import CheckpointConfig
from megatron_ledom.errors import DataError, LedomError, UsageError
from megatron_ledom.storage.files import publish, write_synced
from megatron_ledom.storage.hashes import size_problems

LATEST = "latest"
PART = ".part"
NEXT = ".next"
"""`latest.next` names the checkpoint that is about to be put in place."""
TRASH = ".trash"
NAME = re.compile(r"iter_(\d{7,})")
LEFT_OVER = re.compile(rf"{NAME.pattern}({re.escape(PART)}|({re.escape(PART)})?\.\d+{re.escape(TRASH)})")
BACKENDS = "metadata.json"
"""Names megatron-core's formats: its CheckpointingConfig, spelled out here because importing that takes seconds."""
COMMON_FILES = ("common.pt", BACKENDS, ".metadata")
"""Beside the ranks' shares and the manifest."""


def checkpoint_name(iteration: int) -> str:
    """`iter_0001000`."""
    return f"iter_{iteration:07d}"


def finished_checkpoints(folder: str) -> dict[int, str]:
    """Iteration -> name of every checkpoint that was finished, by iteration; {} without the folder."""
    whole = [name for name in _named_checkpoints(folder) if os.path.exists(os.path.join(folder, name, MANIFEST))]
    return {int(name.removeprefix("iter_")): name for name in whole}


def _named_checkpoints(folder: str) -> list[str]:
    """Return every name of a checkpoint in the folder, by iteration, with a manifest or without."""
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted((name for name in names if NAME.fullmatch(name)), key=lambda name: int(name.removeprefix("iter_")))


def latest_name(folder: str) -> str | None:
    """Return what `folder/latest` holds, whatever it is; None without such a file."""
    return _content_of(os.path.join(folder, LATEST))


def latest_checkpoint(folder: str) -> str | None:
    """The checkpoint that `folder/latest` names; None where no checkpoint has been saved yet.

    A kill right after the first checkpoint was put in place leaves its name in `latest.next`, and it counts. Raises DataError,
    with the newest whole checkpoint and how to go on from it, when `latest` names none that is there, or is missing beside
    checkpoints, damaged ones too: a checkpoint gets its name when it is whole.
    """
    name = latest_name(folder)
    if name is None:
        finished = finished_checkpoints(folder).values()
        name = _content_of(os.path.join(folder, LATEST + NEXT))
        if name is not None and name in finished:
            return os.path.join(folder, name)
        named = _named_checkpoints(folder)
        if not named:
            return None
        damaged = [found for found in named if found not in finished]
        without = f" ({', '.join(damaged)} without a {MANIFEST})" if damaged else ""
        fault = f"is missing, but there are checkpoints, {', '.join(named)}{without}"
    elif not name:
        fault = "is empty"
    elif not NAME.fullmatch(name):
        fault = f"names {name[:100]!r}, which is not the name of a checkpoint, such as iter_0001000"
    elif not os.path.isdir(os.path.join(folder, name)):
        fault = f"names {name!r}, which is not there"
    else:
        return os.path.join(folder, name)
    raise DataError(f"{folder}/{LATEST} {fault}; {how_to_resume(folder)}")


def how_to_resume(folder: str, other_than: str | None = None) -> str:
    """Say how to go on where `latest` cannot be followed: from the newest whole checkpoint but the one called `other_than`."""
    for name in reversed(finished_checkpoints(folder).values()):
        checkpoint = os.path.join(folder, name)
        try:
            faults = size_problems(checkpoint, load_manifest(checkpoint).files)
        except LedomError:
            continue
        if not faults and name != other_than:
            return (
                f"the newest{' other' if other_than else ''} checkpoint that is whole, by the sizes of its files, is {name}: to go on"
                f" from it, echo {name} > {shlex.quote(os.path.join(folder, LATEST))}"
            )
    return f"{folder} has no {'other ' if other_than else ''}whole checkpoint: bring one back, or set another run_dir for a new run"


@contextmanager
def advising_another(checkpoint: str) -> Iterator[None]:
    """Inside, a DataError about the checkpoint also names the newest other one that is whole."""
    try:
        yield
    except DataError as error:
        folder, name = os.path.split(os.path.abspath(checkpoint))
        raise DataError(f"{error}; {how_to_resume(folder, other_than=name)}") from error


def saved_iteration(folder: str) -> int:
    """Return the iteration of the latest checkpoint in the folder; 0 without one."""
    latest = latest_checkpoint(folder)
    if latest is None:
        return 0
    with advising_another(latest):
        return load_manifest(latest).iteration


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


def announce_latest(folder: str, name: str) -> None:
    """Write which checkpoint is about to be put in place: the first one of a run counts as soon as it is there."""
    write_synced(os.path.join(folder, LATEST + NEXT), f"{name}\n".encode())


def publish_latest(folder: str) -> None:
    """Let `latest` name what was announced."""
    publish(os.path.join(folder, LATEST + NEXT), os.path.join(folder, LATEST))


def put_in_place(folder: str, name: str) -> None:
    """Give the checkpoint `name`, which is on disk under its temporary name, its own, and let `latest` name it."""
    if os.path.exists(os.path.join(folder, name)):  # of a run that was taken back to an earlier one
        move_to_trash(folder, name)
    announce_latest(folder, name)
    publish(os.path.join(folder, name + PART), os.path.join(folder, name))
    publish_latest(folder)


def settle_latest(folder: str) -> None:
    """Publish what a kill left announced, see `latest_checkpoint`. Call while no other launch has the run."""
    if latest_name(folder) is None and latest_checkpoint(folder) is not None:
        publish_latest(folder)


def _content_of(path: str) -> str | None:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read().strip()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except IsADirectoryError as error:
        raise DataError(
            f"{path} is a folder, not a file with the name of a checkpoint: move it away; then {how_to_resume(os.path.dirname(path))}"
        ) from error


def move_to_trash(folder: str, name: str) -> None:
    """Take a checkpoint away in one step, so that it is never seen half deleted."""
    number = 0
    while os.path.exists(trash := os.path.join(folder, f"{name}.{number}{TRASH}")):
        number += 1
    publish(os.path.join(folder, name), trash)


log = logging.getLogger(__name__)


def outdated(iterations: list[int], latest: int, settings: CheckpointConfig, replayed: Iterable[int] = ()) -> list[int]:
    """Those of the `iterations` that may go: not the last one before each of `replayed`.

    Checkpoints behind `latest` belong to a run that was taken back to it: they neither count nor go, the run will replace them.
    """
    if settings.keep_last is None:
        return []
    past = sorted(iteration for iteration in iterations if iteration <= latest)
    interval = settings.keep_interval
    begun_from = {max((iteration for iteration in past if iteration < step), default=None) for step in replayed}
    return [
        iteration
        for iteration in past[: -settings.keep_last]
        if iteration != latest and iteration not in begun_from and not (interval and iteration % interval == 0)
    ]


def retire(folder: str, settings: CheckpointConfig, replayed: Iterable[int] = ()) -> None:
    """Move checkpoints to the trash that are `outdated`. What cannot be moved stays, with a warning: a run does not end for that."""
    latest = latest_name(folder)
    if latest is None:
        return
    names = finished_checkpoints(folder)
    try:
        for iteration in outdated(list(names), int(latest.removeprefix("iter_")), settings, replayed):
            move_to_trash(folder, names[iteration])
    except (OSError, ValueError) as error:
        log.warning("outdated checkpoints in %s stay: %s", folder, error)


def sweep(folder: str, keep: str | None = None) -> None:
    """Delete the trash and what killed saves have left, except the folder named `keep`."""
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return
    for name in sorted(names):
        path = os.path.join(folder, name)
        if name in (LATEST + PART, LATEST + NEXT):
            os.unlink(path)
        elif LEFT_OVER.fullmatch(name) and name != keep:
            shutil.rmtree(path, ignore_errors=True)
            if os.path.exists(path):
                log.warning("%s cannot be deleted; delete it by hand", path)


def save_backends(folder: str) -> None:
    """Write what megatron-core looks at first when it loads a checkpoint."""
    formats = {
        "sharded_backend": "torch_dist",
        "sharded_backend_version": 1,
        "common_backend": "torch",
        "common_backend_version": 1,
    }
    write_synced(os.path.join(folder, BACKENDS), json.dumps(formats, allow_nan=False).encode())

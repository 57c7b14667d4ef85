"""The folder of a run's checkpoints: a folder `iter_0001000/` for each, and the file `latest` with the name of the newest.

`iter_0001000.part` is being written and `iter_0001000.0.trash` is being deleted; neither counts as a checkpoint. `retire`
moves outdated checkpoints to the trash. It keeps the newest `checkpoint.keep_last`, those from which replays start, and those
at multiples of `checkpoint.keep_interval`.
"""

import json
import logging
import os
import re
import shlex
import shutil
from collections.abc import Iterable, Iterator, Set
from contextlib import contextmanager

from megatron_ledom.checkpoint.branches import abandoned_checkpoints
from megatron_ledom.checkpoint.manifest import MANIFEST, load_manifest
from megatron_ledom.config.schema import CheckpointConfig
from megatron_ledom.errors import DataError, LedomError, UsageError
from megatron_ledom.storage.files import publish, write_synced
from megatron_ledom.storage.hashes import size_problems

LATEST = "latest"
PART = ".part"
NEXT = ".next"
"""`latest.next` names the checkpoint that will be published next."""
TRASH = ".trash"
NAME = re.compile(r"iter_(\d{7,})")
LEFT_OVER = re.compile(rf"{NAME.pattern}({re.escape(PART)}|({re.escape(PART)})?\.\d+{re.escape(TRASH)})")
BACKENDS = "metadata.json"
"""File that names megatron-core's formats. `save_backends` writes it itself: importing megatron-core for it takes seconds."""
COMMON_STATE = "common.pt"
"""File with the state that is equal on all ranks."""
COMMON_FILES = (COMMON_STATE, BACKENDS, ".metadata")
"""Files of a checkpoint, apart from those of the ranks and the manifest."""


def checkpoint_name(iteration: int) -> str:
    """Return the name of a checkpoint, such as `iter_0001000`."""
    return f"iter_{iteration:07d}"


def finished_checkpoints(folder: str) -> dict[int, str]:
    """Return iteration -> name of every finished checkpoint, in order; {} without the folder."""
    whole = [name for name in _named_checkpoints(folder) if os.path.exists(os.path.join(folder, name, MANIFEST))]
    return {int(name.removeprefix("iter_")): name for name in whole}


def own_checkpoints(folder: str) -> dict[int, str]:
    """Return `finished_checkpoints` without those of a branch that the run has abandoned (see branches.py)."""
    names = finished_checkpoints(folder)
    others = abandoned_checkpoints(folder, names)
    return {iteration: name for iteration, name in names.items() if iteration not in others}


def _named_checkpoints(folder: str) -> list[str]:
    """Return the names of all checkpoints in the folder by iteration, with a manifest or without."""
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted((name for name in names if NAME.fullmatch(name)), key=lambda name: int(name.removeprefix("iter_")))


def latest_name(folder: str) -> str | None:
    """Return the content of `folder/latest`, unchecked; None without the file."""
    return _content_of(os.path.join(folder, LATEST))


def latest_checkpoint(folder: str) -> str | None:
    """Return the checkpoint that `folder/latest` names; None if no checkpoint has been saved yet.

    If the run was killed right after its first checkpoint was renamed, `latest.next` names the checkpoint. Raises DataError if
    `latest` names a missing checkpoint, or is itself missing although there are checkpoints. The error names the newest
    complete checkpoint and how to resume from it.
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
        if latest_name(folder) is not None:  # another process has just renamed it
            return latest_checkpoint(folder)
        damaged = [found for found in named if found not in finished]
        without = f" ({', '.join(damaged)} without a {MANIFEST})" if damaged else ""
        problem = f"is missing, but there are checkpoints, {', '.join(named)}{without}"
    elif not name:
        problem = "is empty"
    elif not NAME.fullmatch(name):
        problem = f"names {name[:100]!r}, which is not the name of a checkpoint, such as iter_0001000"
    elif not os.path.isdir(os.path.join(folder, name)):
        problem = f"names {name!r}, which does not exist"
    else:
        return os.path.join(folder, name)
    raise DataError(f"{folder}/{LATEST} {problem}; {how_to_resume(folder)}")


def how_to_resume(folder: str, other_than: str | None = None) -> str:
    """Return advice on how to resume without `latest`: from the newest complete checkpoint, except `other_than`."""
    for name in reversed(own_checkpoints(folder).values()):
        checkpoint = os.path.join(folder, name)
        try:
            problems = size_problems(checkpoint, load_manifest(checkpoint).files)
        except LedomError:
            continue
        if not problems and name != other_than:
            return (
                f"the newest{' other' if other_than else ''} complete checkpoint, by the sizes of its files, is {name}: to resume"
                f" from it, run: echo {name} > {shlex.quote(os.path.join(folder, LATEST))}"
            )
    return f"{folder} has no {'other ' if other_than else ''}complete checkpoint: restore one, or set another run_dir for a new run"


@contextmanager
def advising_another(checkpoint: str) -> Iterator[None]:
    """Add the newest other complete checkpoint to each DataError inside the context."""
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
    """Return the checkpoint for `load`: itself, or the latest one of a run folder. Raises UsageError."""
    if not os.path.isdir(load):
        raise UsageError(
            f"{load} is not a folder; give a run folder or one of its checkpoints, such as RUN/checkpoints/iter_0001000"
        )
    checkpoints = os.path.join(load, "checkpoints")
    if not os.path.isdir(checkpoints):
        return load
    latest = latest_checkpoint(checkpoints)
    if latest is None:
        raise UsageError(f"{load} has no finished checkpoint yet; train longer, or give another run")
    return latest


def announce_latest(folder: str, name: str) -> None:
    """Write `latest.next`, so that the first checkpoint of a run counts as soon as it is renamed."""
    write_synced(os.path.join(folder, LATEST + NEXT), f"{name}\n".encode())


def publish_latest(folder: str) -> None:
    """Rename `latest.next` to `latest`."""
    publish(os.path.join(folder, LATEST + NEXT), os.path.join(folder, LATEST))


def put_in_place(folder: str, name: str) -> None:
    """Rename the checkpoint `name`, which is on disk under its temporary name, and let `latest` name it."""
    if os.path.exists(os.path.join(folder, name)):  # the run was set back to an earlier checkpoint
        move_to_trash(folder, name)
    announce_latest(folder, name)
    publish(os.path.join(folder, name + PART), os.path.join(folder, name))
    publish_latest(folder)


def settle_latest(folder: str) -> None:
    """Rename `latest.next` to `latest` if a kill left it (see `latest_checkpoint`). Call it while no other launch uses the run."""
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
            f"{path} is a folder, not a file with the name of a checkpoint: move it away; {how_to_resume(os.path.dirname(path))}"
        ) from error


def move_to_trash(folder: str, name: str) -> None:
    """Rename a checkpoint to trash, so that nobody reads a partly deleted one."""
    number = 0
    while os.path.exists(trash := os.path.join(folder, f"{name}.{number}{TRASH}")):
        number += 1
    publish(os.path.join(folder, name), trash)


log = logging.getLogger(__name__)


def outdated(iterations: list[int], latest: int, settings: CheckpointConfig, replayed: Iterable[int] = ()) -> list[int]:
    """Return the `iterations` whose checkpoints may be deleted. The last one before each of `replayed` is kept.

    If a run was set back to `latest`, there are later checkpoints. They are neither counted nor deleted, because the run will
    replace them.
    """
    if settings.keep_last is None:
        return []
    past = sorted(iteration for iteration in iterations if iteration <= latest)
    interval = settings.keep_interval
    replay_starts = {max((iteration for iteration in past if iteration < step), default=None) for step in replayed}
    return [
        iteration
        for iteration in past[: -settings.keep_last]
        if iteration != latest and iteration not in replay_starts and not (interval and iteration % interval == 0)
    ]


def outdated_others(others: Iterable[int], own: Iterable[int], latest: int, settings: CheckpointConfig) -> list[int]:
    """Return those of an abandoned branch (`others`) that are older than each of the `keep_last` newest of the run's own.

    They are deleted no earlier than if they counted, because a clock that was set back makes own checkpoints look like them.
    """
    kept = sorted(iteration for iteration in own if iteration <= latest)[-(settings.keep_last or 0) :]
    return [iteration for iteration in others if settings.keep_last is not None and kept and iteration < kept[0]]


def retire(folder: str, settings: CheckpointConfig, replayed: Iterable[int] = (), held: Set[int] = frozenset()) -> None:
    """Move `outdated` checkpoints to the trash, except those of the iterations `held`, whose turn comes later.

    Those of an abandoned branch do not count. If one cannot be moved, log a warning: the run continues.
    """
    latest = latest_name(folder)
    if latest is None or settings.keep_last is None:
        return
    names = finished_checkpoints(folder)
    try:
        newest, others = int(latest.removeprefix("iter_")), abandoned_checkpoints(folder, names)
        own = [iteration for iteration in names if iteration not in others]
        passed = [iteration for iteration in outdated_others(others, own, newest, settings) if iteration not in held]
        if passed:
            log.info("deleting %s of a branch that the run has abandoned", ", ".join(map(checkpoint_name, passed)))
        for iteration in passed + outdated(own, newest, settings, replayed):
            if iteration not in held:
                move_to_trash(folder, names[iteration])
    except (OSError, ValueError) as error:
        log.warning("outdated checkpoints in %s could not be deleted: %s", folder, error)


def sweep(folder: str, keep: str | None = None) -> None:
    """Delete the trash and the remains of killed saves, except the folder named `keep`."""
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
                log.warning("%s cannot be deleted; delete it yourself", path)


def save_backends(folder: str) -> None:
    """Write the file that megatron-core reads first when it loads a checkpoint."""
    formats = {
        "sharded_backend": "torch_dist",
        "sharded_backend_version": 1,
        "common_backend": "torch",
        "common_backend_version": 1,
    }
    write_synced(os.path.join(folder, BACKENDS), json.dumps(formats, allow_nan=False).encode())

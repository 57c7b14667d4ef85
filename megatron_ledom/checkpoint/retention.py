"""Which checkpoints stay: the newest few, those that replays begin from, and for ever those at a multiple of an interval."""

import logging
import os
import re
import shutil
from collections.abc import Iterable

from megatron_ledom.checkpoint.folder import (
    LATEST,
    NAME,
    NEXT,
    PART,
    TRASH,
    finished_checkpoints,
    fsync_path,
    latest_name,
    move_to_trash,
)
from megatron_ledom.config.schema import CheckpointConfig

log = logging.getLogger(__name__)

LEFT_OVER = re.compile(rf"{NAME.pattern}({re.escape(PART)}|({re.escape(PART)})?\.\d+{re.escape(TRASH)})")


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
        fsync_path(folder)
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

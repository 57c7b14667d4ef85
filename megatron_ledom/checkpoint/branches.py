"""Checkpoints of a branch that the run has abandoned: it was set back to an earlier one by hand, and its later ones were never replaced.

A launch that begins at an earlier iteration abandons every later checkpoint. If it saves at other iterations, some of them stay among its
own. `launches.jsonl` has the first iteration and the start of each launch, and a manifest has the time of its checkpoint. One that counts
was made by the last launch that began before its iteration, so both times are of one clock.
"""

import logging
import os
from collections.abc import Callable, Iterable, Sequence

from megatron_ledom.checkpoint.manifest import load_manifest
from megatron_ledom.errors import DataError
from megatron_ledom.storage.records import LAUNCHES, Record, read_records

log = logging.getLogger(__name__)


def abandoned(launches: Sequence[Record], iterations: Iterable[int], created_at: Callable[[int], str | None]) -> list[int]:
    """Return the iterations whose checkpoints are of an abandoned branch.

    launches: the records of launches.jsonl. created_at: the time in the manifest of a checkpoint, in ISO format; None if it is not
    known, and then the checkpoint counts.
    """
    found = []
    for iteration in iterations:
        before = [launch for launch in launches if launch.get("from_iteration", 0) < iteration]
        if len(before) < 2:
            continue
        created, started = created_at(iteration), before[-1].get("started_at")
        if created is not None and isinstance(started, str) and created < started:
            found.append(iteration)
    return found


def abandoned_checkpoints(folder: str, names: dict[int, str]) -> list[int]:
    """Return the iterations of an abandoned branch among the checkpoints of a folder, iteration -> name."""
    launches = launches_of(os.path.dirname(os.path.abspath(folder)))
    return abandoned(launches, names, lambda iteration: _created_at(os.path.join(folder, names[iteration])))


def launches_of(run_dir: str) -> list[Record]:
    """Return the records of launches.jsonl of a run folder. Log a warning and return none if it is damaged."""
    try:
        records: list[Record] = read_records(os.path.join(run_dir, LAUNCHES))
    except DataError as error:
        log.warning("%s; so all checkpoints count, also those of a branch that the run has abandoned", error)
        return []
    return records


def _created_at(checkpoint: str) -> str | None:
    try:
        return load_manifest(checkpoint).created_at
    except DataError:
        return None

"""Exact deduplication across tasks: of equal texts only the first document is kept, in the order of tasks and files.

Texts are compared by a 128-bit hash (XXH3). Tasks do not wait for each other: the first pass of the array writes the hashes of
all documents of each task, and in the second pass each task reads the hashes of the tasks before it. Duplicates are removed before
the filter runs, so of equal texts the first record counts.
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import orjson
import xxhash

from megatron_ledom.data.preprocess.encode_parts import PartWork
from megatron_ledom.data.preprocess.part_store import PartRecord
from megatron_ledom.data.preprocess.task import PreprocessTask
from megatron_ledom.data.shards.shard import check_may_write
from megatron_ledom.errors import UsageError
from megatron_ledom.storage.files import write_whole
from megatron_ledom.storage.locks import output_file_lock

logger = logging.getLogger(__name__)
Hashes = npt.NDArray[np.uint64]
"""128-bit hashes [documents, 2]."""
HASHES_SUFFIX = ".hashes"
DIGEST_BYTES = 32


def write_hashes(task: PreprocessTask) -> None:
    """Write the hashes of the documents of a task, in order: the first pass. The later tasks read them in the second pass."""
    check_may_write(task.prefix, overwrite=True)
    Path(task.prefix).parent.mkdir(parents=True, exist_ok=True)
    with output_file_lock(task.prefix, "--output-prefix"):
        hashes = _hashes_of_parts(task)
        content = b"".join(np.ascontiguousarray(part).tobytes() for part in hashes)
        write_whole(task.prefix + HASHES_SUFFIX, _digest(task) + content)
    logger.info("%s: hashes of %s documents", task.prefix, f"{sum(map(len, hashes)):,}")


def check_hashes(task: PreprocessTask) -> None:
    """Raise UsageError if an earlier task has no hashes, or hashes of other inputs or options."""
    for number in range(task.task_id):
        _check_hashes(task, number)


def documents_to_keep(task: PreprocessTask) -> list[npt.NDArray[np.bool_]]:
    """Return a mask [documents] for each part: True for the first document with its text, in all tasks up to this one."""
    own = _hashes_of_parts(task)
    earlier = (_read_hashes(task, number) for number in range(task.task_id))
    is_first = first_occurrences(np.concatenate([np.empty((0, 2), np.uint64), *own]), earlier)
    return np.split(is_first, np.cumsum([len(part) for part in own])[:-1]) if own else []


def _hashes_of_parts(task: PreprocessTask) -> list[Hashes]:
    return list(task.map_parts(PartHasher(parts=task.parts, read=task.read), range(len(task.parts)), "hash"))


@dataclass(slots=True, kw_only=True)
class PartHasher(PartWork):
    """Work that hashes the documents of a part."""

    def __call__(self, number: int) -> Hashes:
        """Return the hashes [documents, 2] of a part, in the reading order of PartEncoder."""
        hashes = [hashes_of(batch.texts) for batch in self.batches(number, PartRecord(), Counter())]
        return np.concatenate([np.empty((0, 2), np.uint64), *hashes])


def hashes_of(texts: Sequence[str]) -> Hashes:
    """Return the hash of the UTF-8 bytes of each text."""
    digests = b"".join(xxhash.xxh3_128_digest(text.encode()) for text in texts)
    return np.frombuffer(digests, np.uint64).reshape(-1, 2)


def _check_hashes(task: PreprocessTask, number: int) -> str:
    path = Path(task.prefix_of(number) + HASHES_SUFFIX)
    if not path.is_file():
        raise UsageError(f"{path} does not exist: run all tasks with --hash-only first, then again without it")
    with path.open("rb") as stream:
        if stream.read(DIGEST_BYTES) != _digest(task):
            raise UsageError(f"{path} was made from other inputs or options; run all tasks with --hash-only again")
    return str(path)


def _read_hashes(task: PreprocessTask, number: int) -> Hashes:
    return np.fromfile(_check_hashes(task, number), np.uint64, offset=DIGEST_BYTES).reshape(-1, 2)


def _digest(task: PreprocessTask) -> bytes:
    return hashlib.sha256(orjson.dumps(task.reading_request())).digest()


def first_occurrences(own: Hashes, earlier: Iterator[Hashes]) -> npt.NDArray[np.bool_]:
    """Return a mask [documents]: True if the text occurs neither before the document nor in an earlier task."""
    is_first = np.zeros(len(own), np.bool_)
    if not len(own):
        return is_first
    order = np.lexsort((np.arange(len(own)), own[:, 1], own[:, 0]))
    ranked = own[order]
    is_new = np.ones(len(own), np.bool_)
    is_new[1:] = (ranked[1:] != ranked[:-1]).any(axis=1)
    distinct = ranked[is_new]
    seen = np.zeros(len(distinct), np.bool_)
    for others in earlier:
        seen |= _is_among(distinct, others)
    is_first[order[is_new]] = ~seen
    return is_first


def _is_among(distinct: Hashes, others: Hashes) -> npt.NDArray[np.bool_]:
    """Return a mask of the rows of `distinct` (sorted, without repetition) that are rows of `others`."""
    found = np.zeros(len(distinct), np.bool_)
    positions = np.searchsorted(distinct[:, 0], others[:, 0])
    while len(others):  # one round, unless different hashes have the same first half
        inside = positions < len(distinct)
        positions, others = positions[inside], others[inside]
        same_half = distinct[positions, 0] == others[:, 0]
        positions, others = positions[same_half], others[same_half]
        same = distinct[positions, 1] == others[:, 1]
        found[positions[same]] = True
        positions, others = positions[~same] + 1, others[~same]
    return found

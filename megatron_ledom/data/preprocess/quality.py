"""Optional steps of preprocessing: length limits, a filter of the user's, exact deduplication across tasks, a document shuffle.

Deduplication is exact: of documents with the same text the first one is kept, in the order of tasks and files. Texts are compared
by a 128-bit hash (XXH3). Tasks do not wait for each other: a first pass of the array writes the hashes of each task's
documents, and the second one reads those of the tasks before it. Duplicates are told before the filter is asked: of equal texts
the first record counts.
"""

import hashlib
import importlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
import xxhash

from megatron_ledom.errors import UsageError
from megatron_ledom.storage.files import write_whole
from megatron_ledom.storage.jobs import Request

Filter = Callable[[str, Mapping[str, Any]], bool]
Hashes = npt.NDArray[np.uint64]
"""128-bit hashes [documents, 2]."""

DUPLICATE, FILTERED, TOO_SHORT, TOO_LONG = "duplicate", "filtered", "too_short", "too_long"
HASHES_SUFFIX = ".hashes"
DIGEST_BYTES = 32
GATHERED_TOKENS = 1 << 22
GATHERED_DOCUMENTS = 1 << 16


def load_filter(name: str) -> Filter:
    """The function `module:function` (text, record) -> whether to keep the document."""
    module_name, _, function_name = name.partition(":")
    if not module_name or not function_name:
        raise UsageError(f"--filter {name} is not of the form module:function")
    if "" not in sys.path:
        sys.path.insert(0, "")  # as `python -m` does: the folder the command is started in
    try:
        found = getattr(importlib.import_module(module_name), function_name)
    except Exception as error:  # it is the user's code
        kind = type(error).__name__
        raise UsageError(f"--filter {name} cannot be loaded ({kind}: {error}); check the name, and PYTHONPATH") from error
    if not callable(found):
        raise UsageError(f"--filter {name} is no function; name one that takes (text, record) and returns whether to keep it")
    return found  # type: ignore[no-any-return]


def source_hash(keep: Filter) -> str:
    """SHA-256 of the file a filter is in: what an edited filter left out is not what the new one would."""
    file = getattr(sys.modules.get(keep.__module__), "__file__", None)
    return hashlib.sha256(Path(file).read_bytes()).hexdigest() if file and Path(file).is_file() else "unknown"


def hashes_of(texts: Sequence[str]) -> Hashes:
    """The hash of each text's UTF-8 bytes."""
    digests = b"".join(xxhash.xxh3_128_digest(text.encode()) for text in texts)
    return np.frombuffer(digests, np.uint64).reshape(-1, 2)


def write_hashes(prefix: str, request: Request, parts: Sequence[Hashes]) -> None:
    """What the first pass of a task leaves for the second pass of the others: hashes of its documents, in order."""
    content = b"".join(np.ascontiguousarray(part).tobytes() for part in parts)
    write_whole(prefix + HASHES_SUFFIX, _digest(request) + content)


def check_hashes(prefixes: Sequence[str], request: Request) -> None:
    """Refuse tasks where the first pass has not been, or was about other inputs."""
    for prefix in prefixes:
        path = Path(prefix + HASHES_SUFFIX)
        if not path.is_file():
            raise UsageError(f"{path} does not exist: run all tasks with --hash-only first, then all again without it")
        with path.open("rb") as stream:
            if stream.read(DIGEST_BYTES) != _digest(request):
                raise UsageError(f"{path} is of other inputs or options; run all tasks with --hash-only again")


def read_hashes(prefix: str, request: Request) -> Hashes:
    """The hashes of a task's documents."""
    check_hashes([prefix], request)
    return np.fromfile(prefix + HASHES_SUFFIX, np.uint64, offset=DIGEST_BYTES).reshape(-1, 2)


def _digest(request: Request) -> bytes:
    return hashlib.sha256(orjson.dumps(request)).digest()


def first_occurrences(own: Hashes, earlier: Iterator[Hashes]) -> npt.NDArray[np.bool_]:
    """Which documents [documents] of a task have a text that stands neither before them in the task nor in an earlier task."""
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
    """Which rows of `distinct` (sorted, each once) are rows of `others`."""
    found = np.zeros(len(distinct), np.bool_)
    places = np.searchsorted(distinct[:, 0], others[:, 0])
    while len(others):  # as often as 64-bit halves coincide: once, almost surely
        inside = places < len(distinct)
        places, others = places[inside], others[inside]
        same_half = distinct[places, 0] == others[:, 0]
        places, others = places[same_half], others[same_half]
        same = distinct[places, 1] == others[:, 1]
        found[places[same]] = True
        places, others = places[~same] + 1, others[~same]
    return found


def shuffled_documents(
    paths: Sequence[str], dtype: np.dtype[Any], seed: int
) -> Iterator[tuple[npt.NDArray[Any], npt.NDArray[np.int32]]]:
    """All documents of some parts (paths without ending) in random order, in arrays of bounded size, with their lengths.

    The order is a function of the number of documents and the seed alone. Memory: 28 bytes a document.
    """
    parts = [np.fromfile(f"{path}.len", np.int32) for path in paths]
    ids = [np.memmap(f"{path}.bin", dtype, "r") if len(part) else None for path, part in zip(paths, parts, strict=True)]
    lengths = np.concatenate([np.empty(0, np.int32), *parts])
    part_of = np.repeat(np.arange(len(parts), dtype=np.int32), [len(part) for part in parts])
    starts = np.concatenate([np.empty(0, np.int64), *(np.cumsum(part, dtype=np.int64) - part for part in parts)])
    order = np.random.default_rng(seed).permutation(len(lengths))
    begin = 0
    while begin < len(order):
        ends = np.cumsum(lengths[order[begin : begin + GATHERED_DOCUMENTS]], dtype=np.int64)
        chosen = order[begin : begin + max(1, int(np.searchsorted(ends, GATHERED_TOKENS, "right")))]
        yield np.concatenate([ids[part_of[k]][starts[k] : starts[k] + lengths[k]] for k in chosen.tolist()]), lengths[chosen]
        begin += len(chosen)

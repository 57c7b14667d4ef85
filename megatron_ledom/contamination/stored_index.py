"""Indexes of items in a folder, one file for each content: built once, then mapped by every process that needs it.

File: PREFIX, the header as JSON, and the arrays of the items and of the index, each at a multiple of 64 bytes, little-endian. The name is
the key, a hash of all that determines the content, so a file of other items or settings is never used. The whole file is compared with its
checksum when it is opened, and its numbers with their ranges. A damaged file is built again.
"""

import errno
import json
import logging
import os
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from megatron_ledom.contamination import normalization
from megatron_ledom.contamination.item_index import (
    ItemIndex,
    build_index,
    check_arrays,
    fold_pool,
    index_version,
    ngram_index,
)
from megatron_ledom.contamination.item_table import Arrays, ItemTable
from megatron_ledom.contamination.items import EvaluationItem
from megatron_ledom.contamination.search import Decontamination
from megatron_ledom.contamination.settings import SearchSettings
from megatron_ledom.errors import LedomError, TransientError, UsageError, cannot_write, may_pass
from megatron_ledom.storage.files import new_file
from megatron_ledom.storage.hashes import sha256_of
from megatron_ledom.storage.locks import Lock, hold

logger = logging.getLogger(__name__)
MAGIC = b"LEDOMITM"
FORMAT = 1
PREFIX = struct.Struct("<8sQQQ")
"""Magic, size of the header, size of the file, and xxh3 of all that follows this prefix."""
ALIGNMENT = 64
ITEM_ARRAYS = ("sets", "numbers", "firsts", "offsets", "bytes")
PATIENCE_SECONDS = 600.0
"""Time to wait for another process that builds the same index."""
LASTING = (errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ELOOP, errno.ENAMETOOLONG, errno.EROFS)
"""Errors of a wrong name of the folder, which a new start would meet again."""


def request_of_index(settings: SearchSettings) -> dict[str, Any]:
    """Return all that determines an index apart from the items."""
    return {
        "format": [FORMAT, index_version()],
        "normalization": normalization.normalization_version(),
        "code": _code(),
        **{name: getattr(settings, name) for name in ("match", "ngram", "min_words", "ignore_numbers")},
    }


def _code() -> dict[str, str]:
    """Return the hash of each file of code that makes an index: this package, and the compiled C++ index."""
    from megatron_ledom import _helpers

    files = [*sorted(Path(__file__).parent.glob("*.py")), Path(str(_helpers.__file__))]
    return {file.name: sha256_of(file) for file in files}


def stored_decontamination(
    folder: str, key: str, settings: SearchSettings, read_items: Callable[[], Sequence[EvaluationItem]]
) -> Decontamination:
    """Return a search whose index is mapped from FOLDER/KEY.items, which is built first if it is missing or damaged.

    One process builds while others wait. Raises UsageError if the folder cannot be written, and TransientError after PATIENCE_SECONDS.
    """
    path = os.path.join(folder, f"{key[:32]}.items")
    found = open_index(path, key, settings)
    if found is not None:
        return found
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise _kind(error)(
            f"--index-folder {folder} cannot be made ({error.strerror}); name a folder that you may write to"
        ) from error
    with ExitStack() as held:
        _wait_for_builder(held, path)
        found = open_index(path, key, settings)  # another process may have built it meanwhile
        if found is None:
            started = time.monotonic()
            items = read_items()
            try:
                write_index(path, key, Decontamination(settings, items))
            except OSError as error:
                raise cannot_write(error, path) from error
            found = open_index(path, key, settings)
            if found is None:
                raise UsageError(f"the index {path} is not as it was written; check the disk, or name another --index-folder")
            logger.info("%s: index of %s items built in %.1f s", path, f"{len(found.items):,}", time.monotonic() - started)
    return found


def _wait_for_builder(held: ExitStack, path: str) -> None:
    """Hold the lock of an index. Raises TransientError if another process keeps it, because a new start finds its index."""
    advice = "start again when it has ended, stop it, or name another --index-folder"
    lock = hold(Lock(f"{path}.lock"), f"the index {path}", advice, patience_seconds=PATIENCE_SECONDS)
    try:
        held.enter_context(lock)
    except UsageError as error:
        if isinstance(error.__cause__, OSError):  # the file of the lock cannot be made
            raise
        raise TransientError(str(error)) from error


def write_index(path: str, key: str, decontamination: Decontamination) -> None:
    """Build the index of the items and write it, whole or not at all. Raises OSError."""
    index = build_index(decontamination.settings, decontamination.items)
    arrays = {name: _little_endian(array) for name, array in {**index.items.arrays, **index.arrays}.items()}
    places: dict[str, tuple[str, list[int], int]] = {}
    end = 0
    for name, array in arrays.items():
        places[name] = (array.dtype.str, list(array.shape), end)
        end += _aligned(array.nbytes)
    header = {
        "key": key,
        "items_sha256": decontamination.items_sha256,
        "sets": index.items.sets,
        "pool": fold_pool(),
        "lengths": index.ngrams.tables()[2],
        "arrays": places,
    }
    written = json.dumps(header).encode()
    written += b" " * (_aligned(PREFIX.size + len(written)) - PREFIX.size - len(written))
    blocks = [written, *_blocks(arrays)]
    digest = xxhash.xxh3_64()
    for block in blocks:
        digest.update(block)
    size = PREFIX.size + sum(len(block) for block in blocks)
    with new_file(path, is_shared=True) as stream:
        stream.write(PREFIX.pack(MAGIC, len(written), size, digest.intdigest()))
        for block in blocks:
            stream.write(block)


def open_index(path: str, key: str, settings: SearchSettings) -> Decontamination | None:
    """Return the search with the stored index; None if there is none. Warns of a damaged one, and returns None too.

    Raises TransientError or UsageError if it cannot be read.
    """
    try:
        found = _opened(path, os.stat(path).st_size, key, settings)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise _kind(error)(
            f"the index {path} cannot be read ({error.strerror}); make it readable, or name another --index-folder"
        ) from error
    except LedomError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError, struct.error) as error:
        logger.warning("the index %s is damaged (%s) and will be built again", path, error)
        return None
    logger.info("%s: stored index of %s items", path, f"{len(found.items):,}")
    return found


def _kind(error: OSError) -> type[LedomError]:
    return TransientError if may_pass(error) and error.errno not in LASTING else UsageError


def _opened(path: str, size: int, key: str, settings: SearchSettings) -> Decontamination:
    """Return the search with the stored index. Raises OSError, and what `open_index` catches if the file is damaged."""
    _check(size > PREFIX.size, f"it has {size} bytes")
    content = np.asarray(np.memmap(path, np.uint8, "r"))
    magic, header_bytes, expected_size, checksum = PREFIX.unpack(content[: PREFIX.size].tobytes())
    _check(magic == MAGIC, "it does not begin like an index")
    _check(size == expected_size, f"it has {size:,} of {expected_size:,} bytes")
    _check(xxhash.xxh3_64_intdigest(content[PREFIX.size :].data) == checksum, "its checksum differs")
    body = PREFIX.size + header_bytes
    header = json.loads(content[PREFIX.size : body].tobytes())
    _check(header["key"] == key, "it has another key")
    arrays = {name: _array(content[body:], *place) for name, place in header["arrays"].items()}
    items = ItemTable(header["sets"], {name: arrays.pop(name) for name in ITEM_ARRAYS})
    table = arrays["table"]
    _check(table.dtype == "<u4" and table.shape == (normalization.TABLE_SIZE,), f"table has the shape {table.shape}")
    ngrams = ngram_index(settings, table, header["pool"])
    ngrams.use(arrays["slots"], arrays["bits"], header["lengths"])
    check_arrays(items, arrays, int(ngrams.num_ngrams), settings.ngram)
    return Decontamination(settings, items, ItemIndex(items, arrays, ngrams), str(header["items_sha256"]))


def _check(is_good: bool, problem: str) -> None:
    if not is_good:
        raise ValueError(problem)


def _array(body: npt.NDArray[np.uint8], dtype: str, shape: list[int], start: int) -> npt.NDArray[Any]:
    num_bytes = np.dtype(dtype).itemsize * int(np.prod(shape, dtype=np.int64))
    return body[start : start + num_bytes].view(dtype).reshape(shape)


def _little_endian(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return np.ascontiguousarray(array, array.dtype.newbyteorder("<"))


def _blocks(arrays: Arrays) -> Iterator[memoryview | bytes]:
    """Yield the bytes of arrays, each followed by zeros up to the alignment."""
    for array in arrays.values():
        yield array.reshape(-1).view(np.uint8).data
        yield bytes(_aligned(array.nbytes) - array.nbytes)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT

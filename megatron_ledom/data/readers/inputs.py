"""Which files a corpus is: paths, globs, folders, lists and object stores, and the byte ranges of them that a task reads.

Work is divided by bytes. The files, sorted by path, lie one after the other on one axis of bytes; a task owns an equal
stretch of it, and a record belongs to the stretch in which it begins. One file of 500 GB and 500,000 small ones divide alike.
"""

import glob
import logging
import os
import re
import stat
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_ledom.data.readers.folder_walk import HIDDEN, LeftOut, Walk, check_name
from megatron_ledom.data.readers.json_lines import refuse_saved_datasets
from megatron_ledom.errors import UsageError, visible

logger = logging.getLogger(__name__)

Kind = Literal["lines", "parquet", "arrow", "text", "warc"]
Compression = Literal["", "gz", "zst", "bz2", "xz"]

ENDINGS: dict[str, Kind] = {
    ".jsonl": "lines",
    ".ndjson": "lines",
    ".json": "lines",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".txt": "text",
    ".warc": "warc",
    ".wet": "warc",
}
COMPRESSIONS: tuple[Compression, ...] = ("gz", "zst", "bz2", "xz")
SUPPORTED = (
    "*.jsonl, *.ndjson, *.json, *.txt, *.warc or *.wet (each also .gz, .zst, .bz2 or .xz), *.parquet, *.arrow, *.feather"
)

COMPRESSED_BLOCK = 1 << 16
"""Compressed input is read in blocks of this size; a stretch of a compressed file begins and ends with one."""
PART_BYTES = 32 << 20
"""What one part of the work reads at most, about: what a kill can cost a worker."""
SMALL_PART_BYTES = 4 << 20
"""What a part reads at least if a task has little to read, so that many workers share it to the end."""
PARTS_OF_A_TASK = 128
"""So many parts are aimed at between these two sizes."""
COMPRESSED_PART_BYTES = 256 << 20
"""The same for compressed files, which have to be decompressed from their start: smaller parts would repeat that more often."""
MOST_LOGGED = 10
"""Things left out that are logged one by one."""
MOST_COMPRESSED_PARTS = 64
"""Parts of one compressed file, for the same reason: 500 GB are decompressed 32 times over, by 64 workers at once."""


@dataclass(frozen=True, slots=True)
class InputPath:
    """One input file, local or in an object store."""

    path: str
    """As it was named; with a protocol such as s3:// for an object store."""
    num_bytes: int
    version: str
    """Time of modification or the store's checksum: with another one, work that was done is not this file's."""

    @property
    def compression(self) -> Compression:
        """By the ending; empty for none."""
        return next((name for name in COMPRESSIONS if self.path.endswith(f".{name}")), "")

    @property
    def kind(self) -> Kind:
        """By the ending."""
        kind = _kind(self.path)
        assert kind is not None, self.path
        return kind

    @property
    def is_divisible(self) -> bool:
        """Whether workers can share it: JSON lines at line ends, tables between their row groups."""
        if self.kind == "lines":
            return not self.compression or self.num_bytes >= COMPRESSED_PART_BYTES
        return self.kind in ("parquet", "arrow")


@dataclass(frozen=True, slots=True)
class Stretch:
    """Bytes [start, end) of a file: the records that begin there. A compressed file is measured as it is stored."""

    source: InputPath
    start: int
    end: int

    @property
    def num_bytes(self) -> int:
        """Bytes of the file."""
        return self.end - self.start


Part = tuple[Stretch, ...]
"""What a worker does in one go: consecutive stretches."""


def _kind(path: str) -> Kind | None:
    for name in COMPRESSIONS:
        inner = path.removesuffix(f".{name}")
        if inner != path:
            kind = ENDINGS.get(os.path.splitext(inner)[1])
            return None if kind in ("parquet", "arrow") else kind
    return ENDINGS.get(os.path.splitext(path)[1])


def is_remote(path: str) -> bool:
    """Whether a path names an object store or another file system of fsspec."""
    return "://" in path


def remote_file_system(path: str) -> Any:
    """The fsspec file system of a URL. Raises UsageError when its package is missing."""
    import fsspec

    protocol = path.split("://")[0]
    try:
        return fsspec.filesystem(protocol)
    except (ImportError, ValueError) as error:
        raise UsageError(f"input {path}: {error}; for s3:// install s3fs (pip install 'megatron-ledom[s3]')") from error


def expand_inputs(patterns: Sequence[str]) -> list[InputPath]:
    """The files that are named, see `find_inputs`; what is left out is logged."""
    sources, left_out = find_inputs(patterns)
    log_left_out(left_out)
    return sources


def log_left_out(left_out: Sequence[LeftOut]) -> None:
    """Say what is not read, and why."""
    for entry in left_out[:MOST_LOGGED]:
        logger.warning(
            "not read: %s (%s%s)", visible(entry.path), f"{entry.num_files:,} files, " * (entry.num_files > 1), entry.reason
        )
    if len(left_out) > MOST_LOGGED:
        logger.warning("not read: %d more like these", len(left_out) - MOST_LOGGED)


def find_inputs(patterns: Sequence[str]) -> tuple[list[InputPath], list[LeftOut]]:
    """(the files that are named, each once however often and by whatever path it is named, sorted by path; what is left out).

    A pattern is a path, a glob, a folder (all files of known endings below it), `@LIST` (a file with one pattern a line), or any
    of the first three in an object store. Links are followed. Refused: no match, an unknown ending, no access, a link that
    leads nowhere or in a loop. Left out: hidden files and folders that no pattern names, and the second path to one file.
    """
    found: dict[str | tuple[int, int], InputPath] = {}
    walk = Walk(lambda path: _kind(path) is not None)
    for pattern in _listed(patterns):
        for source in _expand_remote(pattern, walk) if is_remote(pattern) else _expand_local(pattern, walk):
            first = found.setdefault(_identity(source.path), source)
            if os.path.normpath(first.path) != os.path.normpath(source.path):
                walk.leave_out(source.path, f"the same file as {first.path}")
    refuse_saved_datasets(source.path for source in found.values() if not is_remote(source.path))
    return sorted(found.values(), key=lambda source: source.path), walk.all_left_out()


def _identity(path: str) -> str | tuple[int, int]:
    """Equal for two paths of one file."""
    if is_remote(path):
        return path
    state = os.stat(path)
    return (state.st_dev, state.st_ino) if state.st_nlink > 1 and state.st_ino else os.path.realpath(path)


def _listed(patterns: Sequence[str]) -> Iterator[str]:
    for pattern in patterns:
        if not pattern.startswith("@") or os.path.lexists(pattern):
            yield _plain(pattern)
            continue
        try:
            lines = Path(pattern[1:]).read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"input list {pattern[1:]} cannot be read ({error}); give @FILE with one path a line") from error
        named = [line.strip() for line in lines if line.strip()]
        if not named:
            raise UsageError(f"input list {pattern[1:]} names nothing; give @FILE with one path a line")
        yield from map(_plain, named)


def _plain(pattern: str) -> str:
    """A pattern of the local disk without its protocol."""
    if pattern.split("://")[0] in ("file", "local") and is_remote(pattern):
        return str(remote_file_system(pattern)._strip_protocol(pattern))
    return pattern


def _expand_local(pattern: str, walk: Walk) -> Iterator[InputPath]:
    matches = [pattern] if os.path.lexists(pattern) else walk.matches(pattern)
    if not matches:
        hidden = "; hidden files are read only where their path is given" if walk.left_out else ""
        raise UsageError(f"input {pattern} does not exist or matches no file; check --input{hidden}")
    for match in matches:
        if os.path.isdir(match):
            inside = False
            for path in walk.files(match):
                inside = True
                yield _local(path)
            if not inside and not walk.was_read_before(match):
                raise UsageError(f"input {match} is a folder without a file of a known ending; expected {SUPPORTED}")
        else:
            yield _local(match)


def _local(path: str) -> InputPath:
    check_name(path)
    _check_ending(path)
    try:
        state = os.stat(path)
    except OSError as error:
        raise UsageError(f"input {path} cannot be read ({error.strerror}); repair it or leave it out of --input") from error
    if not stat.S_ISREG(state.st_mode):
        raise UsageError(f"input {path} is no regular file: its size decides who reads what; write it to a file first")
    if not os.access(path, os.R_OK):
        raise UsageError(f"input {path} cannot be read; change its permissions or leave it out of --input")
    return InputPath(path, state.st_size, str(state.st_mtime_ns))


def _check_ending(path: str) -> None:
    if _kind(path) is None:
        raise UsageError(f"input {path} has an ending that is not known; expected {SUPPORTED}")


def _expand_remote(pattern: str, walk: Walk) -> Iterator[InputPath]:
    system = remote_file_system(pattern)
    try:
        if glob.has_magic(pattern):
            entries = system.glob(pattern, detail=True)
        elif system.isdir(pattern):
            entries = _known(system.find(pattern, detail=True), pattern, walk)
        else:
            entries = {str(system._strip_protocol(pattern)): system.info(pattern)}
    except FileNotFoundError:
        entries = {}
    except Exception as error:  # each store has errors of its own: no credentials, no such bucket, no route
        raise UsageError(f"input {pattern} cannot be listed ({error}); check the address and the credentials") from error
    plain = str(system._strip_protocol(pattern))
    for name in [name for name in entries if _is_hidden(name, plain)]:
        walk.leave_out(system.unstrip_protocol(name), HIDDEN)
        del entries[name]
    if not entries:
        raise UsageError(f"input {pattern} does not exist or matches no file; check --input")
    for name, entry in entries.items():
        path = system.unstrip_protocol(name)
        _check_ending(path)
        if entry.get("size") is None:
            raise UsageError(f"input {path} has no size, which decides who reads what; download it first")
        version = entry.get("ETag") or entry.get("etag") or entry.get("mtime") or entry.get("LastModified") or ""
        yield InputPath(path, int(entry["size"]), str(version))


def _known(entries: dict[str, Any], folder: str, walk: Walk) -> dict[str, Any]:
    """Those with a known ending; the others are counted."""
    for name in entries:
        if _kind(name) is None and not name.endswith("/"):
            walk.others[folder, os.path.splitext(name)[1]] += 1
    return {name: entry for name, entry in entries.items() if _kind(name)}


def _is_hidden(path: str, pattern: str) -> bool:
    """Whether an object is hidden, or in a hidden folder, which the pattern does not name."""
    named = pattern if not glob.has_magic(pattern) else re.split(r"[*?\[]", pattern)[0].rpartition("/")[0]
    return "/." in path.removeprefix(named) and "/." not in pattern.removeprefix(named)


def stretches_of_task(sources: Sequence[InputPath], task_id: int, num_tasks: int) -> list[Stretch]:
    """A task's equal stretch of the axis of all bytes, as stretches of files, in order.

    A file that cannot be divided belongs to the task in whose stretch it begins. Empty files yield an empty stretch.
    """
    if num_tasks < 1:
        raise UsageError(f"--num-tasks {num_tasks} is not possible; use 1 or more")
    if not 0 <= task_id < num_tasks:
        raise UsageError(f"--task-id {task_id} is not in 0..{num_tasks - 1} (--num-tasks {num_tasks})")
    begins = [0]
    for source in sources:
        begins.append(begins[-1] + source.num_bytes)
    total = begins[-1]
    low, high = total * task_id // num_tasks, total * (task_id + 1) // num_tasks
    owned = []
    for index in range(max(0, bisect_left(begins, low) - 1), len(sources)):
        source, begin = sources[index], begins[index]
        if begin >= high and (source.num_bytes or task_id + 1 < num_tasks):
            break
        if source.is_divisible and source.num_bytes:
            start, end = _aligned(source, low - begin), _aligned(source, high - begin)
            if start < end:
                owned.append(Stretch(source, start, end))
        elif low <= begin:
            owned.append(Stretch(source, 0, source.num_bytes))
    return owned


def _aligned(source: InputPath, position: int) -> int:
    """A cut of the axis as a cut of the file: within it, and between blocks if it is compressed."""
    inside = min(max(position, 0), source.num_bytes)
    if not source.compression or inside in (0, source.num_bytes):
        return inside
    return inside // COMPRESSED_BLOCK * COMPRESSED_BLOCK


def parts_of(stretches: Sequence[Stretch], part_bytes: int | None = None) -> list[Part]:
    """Stretches cut and gathered to parts of about `part_bytes`: the units in which work is done, kept and resumed.

    Without it the size follows from the bytes of all stretches, so a task is always cut in the same way.
    """
    if part_bytes is None:
        in_all = sum(stretch.num_bytes for stretch in stretches)
        part_bytes = min(PART_BYTES, max(SMALL_PART_BYTES, in_all // PARTS_OF_A_TASK))
    parts: list[Part] = []
    gathered: list[Stretch] = []
    size = 0
    for piece in _pieces(stretches, part_bytes):
        if gathered and size + piece.num_bytes > part_bytes:
            parts.append(tuple(gathered))
            gathered, size = [], 0
        gathered.append(piece)
        size += piece.num_bytes
    if gathered:
        parts.append(tuple(gathered))
    return parts


def _compressed_step(source: InputPath) -> int:
    blocks = -(-source.num_bytes // (MOST_COMPRESSED_PARTS * COMPRESSED_BLOCK))
    return max(COMPRESSED_PART_BYTES, blocks * COMPRESSED_BLOCK)


def _pieces(stretches: Sequence[Stretch], part_bytes: int) -> Iterator[Stretch]:
    for stretch in stretches:
        source = stretch.source
        if not source.is_divisible or not stretch.num_bytes:
            yield stretch
            continue
        step = _compressed_step(source) if source.compression else part_bytes
        for start in range(stretch.start, stretch.end, step):
            yield Stretch(source, start, min(start + step, stretch.end))

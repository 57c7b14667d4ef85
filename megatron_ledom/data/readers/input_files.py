"""Find the files of a corpus, given as paths, globs, folders, lists or addresses in object stores.

Links are followed once. A file that cannot be read is refused. Skipped files are logged and listed in the manifest.
"""

import fnmatch
import glob
import logging
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_ledom.data.readers.byte_ranges import InputPath, kind_of
from megatron_ledom.data.readers.remote import is_remote, remote_file_system
from megatron_ledom.data.readers.remote_files import Entry, RemoteListing
from megatron_ledom.data.shards.shard import printable
from megatron_ledom.errors import UsageError, visible

logger = logging.getLogger(__name__)
SUPPORTED = (
    "*.jsonl, *.ndjson, *.json, *.txt, *.warc or *.wet (each also .gz, .zst, .bz2 or .xz), *.parquet, *.arrow, *.feather"
)
SAVED_DATASET = ("state.json", "dataset_info.json", "dataset_dict.json")
"""Files that `datasets.save_to_disk` writes next to Arrow files."""
HIDDEN = "hidden"
MOST_LOGGED = 10
"""Limit on the skipped inputs that are logged one by one."""
MOST_LISTED = 1000
"""Limit on the skipped inputs that are listed one by one."""


@dataclass(frozen=True, slots=True)
class SkippedInput:
    """A file or folder that was found among the inputs and is not read, with the reason."""

    path: str
    reason: str
    num_files: int = 1


def expand_inputs(patterns: Sequence[str]) -> list[InputPath]:
    """Return the input files, see `find_inputs`, and log the skipped ones."""
    sources, skipped = find_inputs(patterns)
    log_skipped_inputs(skipped)
    return sources


def find_inputs(patterns: Sequence[str]) -> tuple[list[InputPath], list[SkippedInput]]:
    """Return (input files sorted by path, skipped inputs). Every file occurs once, even if several paths lead to it.

    A pattern is a path, a glob, a folder (all files below it with a known ending), `@LIST` (a file with one pattern per
    line), or one of the first three in an object store. Links are followed. Raises UsageError for a pattern without a match,
    an unknown ending, a file that cannot be read, a dangling link or a loop of links. Skips hidden files and folders that no
    pattern names, and the second path to a file.
    """
    found: dict[str | tuple[int, int], InputPath] = {}
    search, listing = InputSearch(lambda path: kind_of(path) is not None), RemoteListing()
    for pattern in _listed(patterns):
        for source in _expand_remote(pattern, search, listing) if is_remote(pattern) else _expand_local(pattern, search):
            first = found.setdefault(_identity(source.path), source)
            if os.path.normpath(first.path) != os.path.normpath(source.path):
                search.skip(source.path, f"the same file as {first.path}")
    _refuse_saved_datasets(source.path for source in found.values() if not is_remote(source.path))
    return sorted(found.values(), key=lambda source: source.path), search.all_skipped()


def log_skipped_inputs(skipped: Sequence[SkippedInput]) -> None:
    """Log the skipped inputs with their reasons."""
    for entry in skipped[:MOST_LOGGED]:
        logger.warning(
            "skipped: %s (%s%s)", visible(entry.path), f"{entry.num_files:,} files, " * (entry.num_files > 1), entry.reason
        )
    if len(skipped) > MOST_LOGGED:
        logger.warning("skipped: %d more", len(skipped) - MOST_LOGGED)


@dataclass(slots=True)
class InputSearch:
    """A search for input files, and the inputs that it skips."""

    is_wanted: Callable[[str], bool]
    """Returns True if the ending of a path is known."""
    skipped: dict[str, SkippedInput] = field(default_factory=dict)
    """By path."""
    others: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Number of files with an unknown ending, by input folder and ending."""
    _folders: dict[str, str] = field(default_factory=dict)
    """Path under which each folder was read, by its real path."""

    def skip(self, path: str, reason: str) -> None:
        """Record a skipped input. A name that is not UTF-8 is escaped."""
        path = printable(path)
        self.skipped.setdefault(path, SkippedInput(path, reason))

    def all_skipped(self) -> list[SkippedInput]:
        """Return the skipped inputs: at most MOST_LISTED one by one, the rest in one entry, then the unknown endings."""
        entries = list(self.skipped.values())
        rest = len(entries) - MOST_LISTED
        more = [SkippedInput("...", "more of these kinds", rest)] if rest > 0 else []
        others = [
            SkippedInput(f"{root}/**/*{ending}", "unknown ending", count) for (root, ending), count in self.others.items()
        ]
        return [*entries[:MOST_LISTED], *more, *others]

    def files(self, folder: str) -> Iterator[str]:
        """Yield the files with a known ending below an input folder, in order."""
        yield from self._files(folder, {os.path.realpath(folder)}, folder)

    def was_read_before(self, folder: str) -> bool:
        """Return True if the folder was read under another path."""
        before = self._folders.get(os.path.realpath(folder), folder)
        return os.path.normpath(before) != os.path.normpath(folder)

    def _files(self, folder: str, above: set[str], root: str) -> Iterator[str]:
        real = os.path.realpath(folder)
        if self.was_read_before(folder):
            self.skip(folder, f"the same folder as {printable(self._folders[real])}")
            return
        is_new = real not in self._folders
        self._folders.setdefault(real, folder)
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
            kinds = [(entry, entry.is_dir()) for entry in entries]
        except OSError as error:
            raise UsageError(
                f"input {error.filename or folder} cannot be read ({error.strerror}); change its permissions or omit it"
            ) from error
        for entry, is_folder in kinds:
            if entry.name.startswith("."):
                if is_folder or self.is_wanted(entry.name):
                    self.skip(entry.path, HIDDEN)
            elif is_folder:
                yield from self._files(entry.path, above | {_below(entry, above)}, root)
            elif self.is_wanted(entry.name):
                yield entry.path
            else:
                _check_is_there(entry.path)
                self.others[printable(root), printable(os.path.splitext(entry.name)[1])] += is_new

    def matches(self, pattern: str) -> list[str]:
        """Return the files and folders of a glob, sorted, without hidden ones, as a shell does."""
        if "**" in pattern:  # glob itself follows loops, and ignores folders that it cannot read
            base = os.path.dirname(pattern[: pattern.index("**")])
            self._look_through(base or ".", os.path.basename(pattern))
        for folder in glob.glob(os.path.dirname(pattern), recursive=True):
            _check_is_there(folder)
            if os.path.isdir(folder) and not os.access(folder, os.R_OK | os.X_OK):
                raise UsageError(f"input {folder} cannot be read; change its permissions or remove it from --input")
        found = glob.glob(pattern, recursive=True)
        if "**" not in pattern:
            for path in set(glob.glob(pattern, include_hidden=True)) - set(found):
                if os.path.isdir(path) or self.is_wanted(path):
                    self.skip(path, HIDDEN)
        return sorted(found)

    def _look_through(self, base: str, name: str) -> None:
        inner = InputSearch(self.is_wanted)
        for folder in glob.glob(base):
            for _ in inner.files(folder) if os.path.isdir(folder) else ():
                pass
        hidden = [entry.path for entry in inner.skipped.values() if entry.reason == HIDDEN]
        for path in hidden:
            if os.path.isdir(path) or fnmatch.fnmatch(os.path.basename(path), name):
                self.skip(path, HIDDEN)


def _below(entry: "os.DirEntry[str]", above: set[str]) -> str:
    """Return the real path of a folder. Raises UsageError if it is one of the folders `above` the entry."""
    real = os.path.realpath(entry.path)
    if real in above:
        raise UsageError(
            f"input {entry.path} is a link to {real}, a folder above it: a loop; remove the link, or name the files"
        )
    return real


def _check_is_there(path: str) -> None:
    """Refuse a dangling link: its target, perhaps a folder of texts, would be missing without a message."""
    if os.path.islink(path) and not os.path.exists(path):
        target = printable(os.readlink(path))
        raise UsageError(
            f"input {printable(path)} is a link to {target}, which does not exist; restore the target, or remove the link"
        )


def _listed(patterns: Sequence[str]) -> Iterator[str]:
    for pattern in patterns:
        if not pattern.startswith("@") or os.path.lexists(pattern):
            yield _plain(pattern)
            continue
        try:
            lines = Path(pattern[1:]).read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"input list {pattern[1:]} cannot be read ({error}); give @FILE with one path per line") from error
        named = [line.strip() for line in lines if line.strip()]
        if not named:
            raise UsageError(f"input list {pattern[1:]} is empty; give @FILE with one path per line")
        yield from map(_plain, named)


def _plain(pattern: str) -> str:
    """Return a pattern of the local disk without its protocol, any other pattern unchanged."""
    if pattern.split("://")[0] in ("file", "local") and is_remote(pattern):
        return str(remote_file_system(pattern)._strip_protocol(pattern))
    return pattern


def _identity(path: str) -> str | tuple[int, int]:
    """Return a key that is equal for all paths of one file."""
    if is_remote(path):
        return path
    state = os.stat(path)
    return (state.st_dev, state.st_ino) if state.st_nlink > 1 and state.st_ino else os.path.realpath(path)


def _expand_local(pattern: str, search: InputSearch) -> Iterator[InputPath]:
    matches = [pattern] if os.path.lexists(pattern) else search.matches(pattern)
    if not matches:
        hidden = "; hidden files are read only if their path is given" if search.skipped else ""
        raise UsageError(f"input {pattern} does not exist or matches no file; check --input{hidden}")
    for match in matches:
        if os.path.isdir(match):
            inside = False
            for path in search.files(match):
                inside = True
                yield _local(path)
            if not inside and not search.was_read_before(match):
                raise UsageError(f"input {match} is a folder without a file of a known format; expected {SUPPORTED}")
        else:
            yield _local(match)


def _local(path: str) -> InputPath:
    _check_name(path)
    _check_ending(path)
    try:
        state = os.stat(path)
    except OSError as error:
        raise UsageError(f"input {path} cannot be read ({error.strerror}); repair it or remove it from --input") from error
    if not stat.S_ISREG(state.st_mode):
        raise UsageError(
            f"input {path} is not a regular file, and work is divided by file size; write its content to a file first"
        )
    if not os.access(path, os.R_OK):
        raise UsageError(f"input {path} cannot be read; change its permissions or remove it from --input")
    return InputPath(path, state.st_size, str(state.st_mtime_ns))


def _check_name(path: str) -> None:
    """Refuse a name that is not UTF-8, because no manifest could contain it."""
    try:
        path.encode()
    except UnicodeEncodeError:
        name = os.fsencode(path)
        raise UsageError(f"input {name!r} has a name that is not UTF-8, so no manifest can list it; rename it") from None


def _check_ending(path: str) -> None:
    if kind_of(path) is None:
        raise UsageError(f"input {path} has an unknown ending; expected {SUPPORTED}")


def _expand_remote(pattern: str, search: InputSearch, listing: RemoteListing) -> Iterator[InputPath]:
    pattern = listing.pinned(pattern)
    system = remote_file_system(pattern)
    entries, is_folder = listing.entries(pattern)
    entries = _known(entries, pattern, search) if is_folder else entries
    plain = str(system._strip_protocol(pattern))
    for name in [name for name in entries if _is_hidden(name, plain)]:
        search.skip(system.unstrip_protocol(name), HIDDEN)
        del entries[name]
    if not entries:
        raise UsageError(f"input {pattern} does not exist or matches no file; check --input")
    for name, entry in entries.items():
        _check_ending(str(system.unstrip_protocol(name)))
        source = listing.source(name, entry, pattern)
        listing.check_access(source)
        yield source


def _known(entries: dict[str, Entry], folder: str, search: InputSearch) -> dict[str, Entry]:
    """Return the entries with a known ending, and count the others."""
    for name in entries:
        if kind_of(name) is None and not name.endswith("/"):
            search.others[folder, os.path.splitext(re.split("[?#]", name)[0])[1]] += 1  # a link may have a signed query
    return {name: entry for name, entry in entries.items() if kind_of(name)}


def _is_hidden(path: str, pattern: str) -> bool:
    """Return True if an object or a folder above it is hidden and the pattern does not name it."""
    named = pattern if not glob.has_magic(pattern) else re.split(r"[*?\[]", pattern)[0].rpartition("/")[0]
    return "/." in path.removeprefix(named) and "/." not in pattern.removeprefix(named)


def _refuse_saved_datasets(paths: Iterable[str]) -> None:
    """Raise UsageError if an input is a description file in a folder of `datasets.save_to_disk`."""
    for path in paths:
        folder, name = os.path.split(path)
        if name not in SAVED_DATASET:
            continue
        inside = os.listdir(folder or ".")
        parts = sorted(part for part in inside if os.path.isfile(os.path.join(folder, part, "state.json")))
        if "dataset_dict.json" in inside and parts:
            arrow = " ".join(f"'{os.path.join(folder, part)}/*.arrow'" for part in parts)
        elif any(part.endswith(".arrow") for part in inside):
            arrow = f"'{os.path.join(folder, '*.arrow')}'"
        else:
            continue
        raise UsageError(
            f"input {folder or '.'} was written by save_to_disk of Hugging Face datasets: its texts are in Arrow files, and {name}"
            f" only describes them; give --input {arrow}"
        )

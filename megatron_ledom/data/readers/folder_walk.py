"""Files below a folder or under a glob: links are followed once, what cannot be read is refused, what is left out is said."""

import fnmatch
import glob
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from megatron_ledom.errors import UsageError

HIDDEN = "hidden"
MOST_LISTED = 1000
"""Things left out that are listed one by one."""


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Something that was found at the inputs and is not read."""

    path: str
    reason: str
    num_files: int = 1


@dataclass(slots=True)
class Walk:
    """What was met on the way to the inputs."""

    is_wanted: Callable[[str], bool]
    """Of a path: whether its ending is known."""
    left_out: dict[str, LeftOut] = field(default_factory=dict)
    """By path."""
    others: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Files of unknown endings, by folder that was named and ending."""
    _folders: dict[str, str] = field(default_factory=dict)
    """Path of each folder that was read, by its real path."""

    def leave_out(self, path: str, reason: str) -> None:
        """Enter something that is not read; a name that is not UTF-8 is escaped."""
        path = printable(path)
        self.left_out.setdefault(path, LeftOut(path, reason))

    def all_left_out(self) -> list[LeftOut]:
        """What is not read, the last entry for all beyond MOST_LISTED."""
        entries = list(self.left_out.values())
        rest = len(entries) - MOST_LISTED
        more = [LeftOut("...", "more of these kinds", rest)] if rest > 0 else []
        others = [LeftOut(f"{root}/**/*{ending}", "unknown ending", count) for (root, ending), count in self.others.items()]
        return [*entries[:MOST_LISTED], *more, *others]

    def files(self, folder: str) -> Iterator[str]:
        """The files of known endings below a folder that was named, in order."""
        yield from self._files(folder, {os.path.realpath(folder)}, folder)

    def was_read_before(self, folder: str) -> bool:
        """Whether a folder was read by another path."""
        before = self._folders.get(os.path.realpath(folder), folder)
        return os.path.normpath(before) != os.path.normpath(folder)

    def _files(self, folder: str, above: set[str], root: str) -> Iterator[str]:
        real = os.path.realpath(folder)
        if self.was_read_before(folder):
            self.leave_out(folder, f"the same folder as {printable(self._folders[real])}")
            return
        is_new = real not in self._folders
        self._folders.setdefault(real, folder)
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
            kinds = [(entry, entry.is_dir()) for entry in entries]
        except OSError as error:
            raise UsageError(
                f"input {error.filename or folder} cannot be read ({error.strerror}); change its permissions or leave it out"
            ) from error
        for entry, is_folder in kinds:
            if entry.name.startswith("."):
                if is_folder or self.is_wanted(entry.name):
                    self.leave_out(entry.path, HIDDEN)
            elif is_folder:
                yield from self._files(entry.path, above | {_below(entry, above)}, root)
            elif self.is_wanted(entry.name):
                yield entry.path
            else:
                check_is_there(entry.path)
                self.others[printable(root), printable(os.path.splitext(entry.name)[1])] += is_new

    def matches(self, pattern: str) -> list[str]:
        """The files and folders of a glob, sorted; hidden ones are left out, as a shell does."""
        if "**" in pattern:  # glob itself would follow loops, and pass over what it cannot read
            base = os.path.dirname(pattern[: pattern.index("**")])
            self._look_through(base or ".", os.path.basename(pattern))
        for folder in glob.glob(os.path.dirname(pattern), recursive=True):
            check_is_there(folder)
            if os.path.isdir(folder) and not os.access(folder, os.R_OK | os.X_OK):
                raise UsageError(f"input {folder} cannot be read; change its permissions or leave it out of --input")
        found = glob.glob(pattern, recursive=True)
        if "**" not in pattern:
            for path in set(glob.glob(pattern, include_hidden=True)) - set(found):
                if os.path.isdir(path) or self.is_wanted(path):
                    self.leave_out(path, HIDDEN)
        return sorted(found)

    def _look_through(self, base: str, name: str) -> None:
        look = Walk(self.is_wanted)
        for folder in glob.glob(base):
            for _ in look.files(folder) if os.path.isdir(folder) else ():
                pass
        hidden = [entry.path for entry in look.left_out.values() if entry.reason == HIDDEN]
        for path in hidden:
            if os.path.isdir(path) or fnmatch.fnmatch(os.path.basename(path), name):
                self.leave_out(path, HIDDEN)


def _below(entry: "os.DirEntry[str]", above: set[str]) -> str:
    """The real path of a folder; refused when it is one of those `above` it."""
    real = os.path.realpath(entry.path)
    if real in above:
        raise UsageError(
            f"input {entry.path} is a link to a folder above it, {real}: a loop; remove the link, or name the files"
        )
    return real


def check_is_there(path: str) -> None:
    """Refuse a link that leads nowhere: what it led to, a folder of texts perhaps, would be left out."""
    if os.path.islink(path) and not os.path.exists(path):
        target = printable(os.readlink(path))
        raise UsageError(f"input {printable(path)} is a link to {target}, which does not exist; fetch that, or remove the link")


def check_name(path: str) -> None:
    """Refuse a name that is not UTF-8: no manifest could hold it."""
    try:
        path.encode()
    except UnicodeEncodeError:
        name = os.fsencode(path)
        raise UsageError(f"input {name!r} has a name that is not UTF-8, which no manifest can hold; rename it") from None


def printable(path: str) -> str:
    """Return a path with bytes that are not UTF-8 escaped."""
    return path.encode("utf-8", "backslashreplace").decode()


def as_records(left_out: list[LeftOut]) -> list[dict[str, Any]]:
    """As a manifest holds them."""
    return [asdict(entry) for entry in left_out]

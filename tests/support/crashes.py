"""Processes that are killed at a chosen step of what they write, and what a power failure at that step leaves of it.

A step is an open for writing, a write of lines, an fsync, a rename, a removal, or the end. A disk keeps what was forced to it:
`lose_power` takes the rest away, once the processes are dead.
"""

import contextlib
import itertools
import json
import mmap
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from megatron_ledom.storage.locks import LOCK_SUFFIX

Report = Callable[[], None]
NAMES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate")
"""Events that change a folder, or cut a file."""


class Steps:
    """Counts steps in this process and those that it forks from now on; kills the whole process group before one of them.

    Of a write at that step half is done. A journal beside the folder holds what was forced to the disk, for `lose_power`.
    """

    def __init__(self, kill_at: int, folder: str) -> None:
        self._kill_at, self._folder = kill_at, folder
        self._done = mmap.mmap(-1, 8)  # shared with the processes that are forked from here
        self._fsync, self._write = os.fsync, os.write
        self._attic = _attic(folder)
        self._attic.mkdir(exist_ok=True)
        self._journal = os.open(self._attic / "journal", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for file in _files(folder):
            self._note("forced", file.stat().st_ino, file.stat().st_size)
        os.fsync, os.write = self._synced, self._written  # type: ignore[assignment]
        sys.addaudithook(self._heard)

    def count(self, tear: Callable[[], object] = lambda: None) -> None:
        """Begin a step; at the chosen one, tear what is being written and die."""
        number = int.from_bytes(self._done[:8], "little") + 1
        if number == self._kill_at:
            self._kill_at = 0  # what tears is no step
            tear()
            os.killpg(0, signal.SIGKILL)
        self._done[:8] = number.to_bytes(8, "little")

    def _note(self, event: str, *what: Any) -> None:
        self._write(self._journal, json.dumps([event, *what]).encode() + b"\n")

    def _heard(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if flags & (os.O_WRONLY | os.O_RDWR) and str(path).startswith(self._folder):
                self.count()
                if not os.path.exists(path):
                    self._note("named", None, "", *_place(path))
                elif flags & os.O_TRUNC:
                    self._note("forced", os.stat(path).st_ino, 0)
        elif event in NAMES:
            self.count()
            if event == "os.rename":
                source, target = (_absolute(path, folder) for path, folder in zip(arguments[:2], arguments[2:], strict=True))
                self._note("named", *_place(source), *_place(target), self._kept(target))
            elif event == "os.remove":
                path = _absolute(*arguments)
                if (inode := self._kept(path)) is not None:
                    self._note("removed", inode, *_place(path))

    def _kept(self, path: str) -> int | None:
        """Keep a file that is about to lose its name, so that its inode is not used again; returns that."""
        if not os.path.isfile(path) or not path.startswith(self._folder):
            return None
        inode = os.stat(path).st_ino
        with contextlib.suppress(FileExistsError):
            os.link(path, self._attic / str(inode))
        return inode

    def _synced(self, descriptor: Any) -> None:
        number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
        found = os.fstat(number)
        self.count(lambda: self._note("torn", found.st_ino))
        self._fsync(descriptor)
        self._note("forced", found.st_ino, os.fstat(number).st_size)

    def _written(self, descriptor: int, content: Any) -> int:
        def tear() -> None:
            self._note("torn", os.fstat(descriptor).st_ino)
            self._write(descriptor, content[: len(content) // 2])

        if os.readlink(f"/proc/self/fd/{descriptor}").startswith(self._folder):
            self.count(tear)
        return self._write(descriptor, content)


def _attic(folder: str) -> Path:
    return Path(folder).with_name(f"lost-{Path(folder).name}")


def _files(folder: str) -> Iterator[Path]:
    return (path for path in Path(folder).rglob("*") if path.is_file() and not path.is_symlink())


def _absolute(path: Any, folder: int) -> str:
    return os.path.join(os.getcwd() if folder == -1 else os.readlink(f"/proc/self/fd/{folder}"), os.fspath(path))


def _place(path: str) -> tuple[int, str]:
    """Return the inode of the folder of a path, and its name in that."""
    return os.stat(os.path.dirname(path)).st_ino, os.path.basename(path)


def lose_power(folder: str, *, loses_names: bool, loses_removals: bool = False) -> None:
    """Leave of the folder what was forced to the disk; of the file that was being written or forced also half of the rest.

    loses_names: files that were made or renamed since their folder was forced to the disk lose the new names; else all names are
    kept, as by a disk that writes names before content. loses_removals: files that were removed since then are there again.
    """
    forced: dict[int, int] = {}
    torn: set[int] = set()
    named: list[list[Any]] = []
    removed: list[list[Any]] = []
    for line in (_attic(folder) / "journal").read_text().splitlines():
        event, *what = json.loads(line)
        if event == "named":
            named.append(what)
        elif event == "removed":
            removed.append(what)
        elif event == "torn":
            torn.add(what[0])
        else:
            forced[what[0]] = what[1]
            named = [name for name in named if name[2] != what[0]]
            removed = [name for name in removed if name[1] != what[0]]
    for name in reversed(named if loses_names else []):
        _undo(folder, *name)
    for name in reversed(removed if loses_removals else []):
        _bring_back(folder, *name)
    for file in _files(folder):
        found = file.stat()
        kept = min(forced.get(found.st_ino, 0), found.st_size)
        os.truncate(file, (kept + found.st_size) // 2 if found.st_ino in torn else kept)


def _undo(
    folder: str, source: int | None, source_name: str, target: int, target_name: str, replaced: int | None = None
) -> None:
    """Take a name away, and give back those that it took the place of: the file's own before, and the file of that name before."""
    places = _folders(folder)
    if target not in places or not (places[target] / target_name).exists():
        return  # removed since, or the kill came before it was there
    if source is None:
        (places[target] / target_name).unlink()
    elif source in places:
        (places[target] / target_name).rename(places[source] / source_name)
    if replaced is not None:
        os.link(_attic(folder) / str(replaced), places[target] / target_name)


def _folders(folder: str) -> dict[int, Path]:
    """Return the folders there are, by inode."""
    return {path.stat().st_ino: path for path in (Path(folder), *Path(folder).rglob("*")) if path.is_dir()}


def _bring_back(folder: str, inode: int, place: int, name: str) -> None:
    """Give a removed file its name again, unless the folder is gone, or the name is another file's now."""
    path = _folders(folder).get(place, _attic(folder)) / name
    if path.parent != _attic(folder) and not path.exists():
        os.link(_attic(folder) / str(inode), path)


def start(act: Callable[[], object], kill_at: int = 0, folder: str = "") -> int:
    """Return the process id of a child, in a process group of its own, that acts and is killed at a step (0: at none)."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setsid()
        steps = Steps(kill_at, folder) if kill_at else None
        act()
        if steps is not None:
            steps.count()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def was_killed(pid: int) -> bool:
    """Wait for the child and those that it forked, which hold its locks; it was killed, or it ended well."""
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    end = time.monotonic() + 10
    while _is_running(pid) and time.monotonic() < end:
        time.sleep(0.001)
    assert code in (0, -signal.SIGKILL), code
    return code != 0


def _is_running(group: int) -> bool:
    """Return True if a process of the group runs; one that has ended holds no lock, however late the system buries it."""
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # gone meanwhile
            state, _, found = file.read_text().rpartition(")")[2].split()[:3]
            if int(found) == group and state not in "ZX":
                return True
    return False


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Something that writes below a folder, in which a first start finds what `before` put there."""

    act: Callable[[Path, Report], object]
    """Does the whole job, or what is left of it; calls the report after each unit that it says is done."""
    kept: Callable[[Path], int]
    """How many units the next start finds. Raises AssertionError where something passes for done that is not."""
    steps: int
    """Fewer steps than these mean that the test does not see them."""
    before: Callable[[Path], object] = lambda folder: None
    is_forced: bool = True
    """A power failure, too, leaves what the job says is done; else the job finds out what is gone."""


def content_of(folder: Path) -> dict[str, bytes]:
    """Every file below a folder but locks: one that a killed process left holds nothing, and stays if nothing is left to do."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and not file.name.endswith(LOCK_SUFFIX)]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


@dataclass(frozen=True, slots=True)
class Loss:
    """What is lost at the step beside the processes."""

    is_of_power: bool
    loses_names: bool = False
    loses_removals: bool = False


LOSSES = {
    "kill": Loss(False),
    "power failure": Loss(True),
    "power failure, new names lost": Loss(True, loses_names=True),
    "power failure, removals lost": Loss(True, loses_removals=True),
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


def check_every_crash(job: Job, root: Path, loss: Loss, *, changing: tuple[str, ...] = ()) -> None:
    """Kill the job once at each step and start it again. changing: endings of files that no two runs make alike."""
    quiet = root / "quiet"
    quiet.mkdir()
    job.before(quiet)
    job.act(quiet, lambda: None)
    expected = content_of(quiet)
    for step in itertools.count(1):
        folder, reported = root / f"killed_at_{step}", mmap.mmap(-1, 1)
        folder.mkdir()
        job.before(folder)

        def report(reported: Any = reported) -> None:
            reported[0] = reported[0] + 1

        if not was_killed(start(partial(job.act, folder, report), step, str(folder))):
            break
        if loss.is_of_power:
            lose_power(str(folder), loses_names=loss.loses_names, loses_removals=loss.loses_removals)
        promised = reported[0] if job.is_forced or not loss.is_of_power else 0
        assert job.kept(folder) >= promised, step
        job.act(folder, lambda: None)
        found = content_of(folder)
        assert found.keys() == expected.keys(), step
        for name in expected:
            assert found[name] == expected[name] or name.endswith(changing or ("\0",)), (step, name)
        shutil.rmtree(folder)
    assert step > job.steps

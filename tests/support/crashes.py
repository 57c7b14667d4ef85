"""Kill processes at a chosen step of their writing, and simulate a power failure at that step.

A step is an open for writing, a write of lines, an fsync, a rename, a removal, or the end. After the processes have died,
`lose_power` removes everything that was not forced to the disk.
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
"""Audit events that change a folder or truncate a file."""


class Steps:
    """Counter of the steps of this process and of its later children, which kills the whole process group before one of them.

    If that step is a write, half of it is done. A journal next to the folder records what was forced to the disk.
    """

    def __init__(self, kill_at: int, folder: str) -> None:
        self._kill_at, self._folder = kill_at, folder
        self._done = mmap.mmap(-1, 8)  # shared with processes that this one forks
        self._fsync, self._write = os.fsync, os.write
        self._attic = _attic(folder)
        self._attic.mkdir(exist_ok=True)
        self._journal = os.open(self._attic / "journal", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for file in _files(folder):
            self._note("forced", file.stat().st_ino, file.stat().st_size)
        os.fsync, os.write = self._synced, self._written  # type: ignore[assignment]
        sys.addaudithook(self._heard)

    def count(self, tear: Callable[[], object] = lambda: None) -> None:
        """Begin a step. At the chosen one, leave the current write half done and die."""
        number = int.from_bytes(self._done[:8], "little") + 1
        if number == self._kill_at:
            self._kill_at = 0  # the half write itself is not a step
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
        """Keep a file that is about to lose its name, so that its inode is not reused. Returns the inode."""
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
    """Return (inode of the folder of a path, name in the folder)."""
    return os.stat(os.path.dirname(path)).st_ino, os.path.basename(path)


def lose_power(folder: str, *, loses_names: bool, loses_removals: bool = False) -> None:
    """Remove everything below the folder that was not forced to the disk, except half of the write or fsync in progress.

    loses_names: files that were made or renamed since their folder was forced to the disk lose their new names. Without it all
    names are kept, as on a disk that writes names before content. loses_removals: files that were removed since then reappear.
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
    """Undo a new name: restore the previous name of the file, and the file that had the new name before."""
    places = _folders(folder)
    if target not in places or not (places[target] / target_name).exists():
        return  # removed since then, or the kill came first
    if source is None:
        (places[target] / target_name).unlink()
    elif source in places:
        (places[target] / target_name).rename(places[source] / source_name)
    if replaced is not None:
        os.link(_attic(folder) / str(replaced), places[target] / target_name)


def _folders(folder: str) -> dict[int, Path]:
    """Return the existing folders by inode."""
    return {path.stat().st_ino: path for path in (Path(folder), *Path(folder).rglob("*")) if path.is_dir()}


def _bring_back(folder: str, inode: int, place: int, name: str) -> None:
    """Restore a removed file, unless its folder is gone or another file has its name."""
    path = _folders(folder).get(place, _attic(folder)) / name
    if path.parent != _attic(folder) and not path.exists():
        os.link(_attic(folder) / str(inode), path)


def start(act: Callable[[], object], kill_at: int = 0, folder: str = "") -> int:
    """Start a child in its own process group that calls `act` and is killed at a step (0: never). Returns its process id."""
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
    """Wait for the child and its children, which may hold its locks. Returns True if it was killed, False if it succeeded."""
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    end = time.monotonic() + 10
    while _is_running(pid) and time.monotonic() < end:
        time.sleep(0.001)
    assert code in (0, -signal.SIGKILL), code
    return code != 0


def _is_running(group: int) -> bool:
    """Return True if a thread of the group runs. A zombie does not count, because it holds no lock; its other threads do."""
    for file in Path("/proc").glob("[0-9]*/task/*/stat"):
        with contextlib.suppress(OSError):  # the process ended meanwhile
            state, _, found = file.read_text().rpartition(")")[2].split()[:3]
            if int(found) == group and state not in "ZX":
                return True
    return False


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A job that writes below a folder."""

    act: Callable[[Path, Report], object]
    """Does the whole job, or the rest of it. Calls the report after each unit that it reports as done."""
    kept: Callable[[Path], int]
    """Returns the number of units that the next start finds. Raises AssertionError if an unfinished unit counts as done."""
    steps: int
    """Minimum number of steps. With fewer, the test did not observe the writing."""
    before: Callable[[Path], object] = lambda folder: None
    """Prepares the folder for the first start."""
    is_forced: bool = True
    """If true, reported units survive a power failure; else the job itself finds out which ones are lost."""


def content_of(folder: Path) -> dict[str, bytes]:
    """Return the content of every file below a folder, by path, without locks: a kill may leave an empty lock file."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and not file.name.endswith(LOCK_SUFFIX)]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


@dataclass(frozen=True, slots=True)
class Loss:
    """Losses at the step, apart from the processes."""

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
    """Kill the job once at each step and start it again. changing: endings of files that differ between any two runs."""
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

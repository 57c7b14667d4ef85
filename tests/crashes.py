"""Processes that are killed at a chosen step of what they write: an open for writing, a write of lines, an fsync, a rename or a removal."""

import contextlib
import mmap
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

NAMES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate")
"""Events that change a folder, or cut a file."""


class Steps:
    """Counts steps in this process and those that it forks from now on; kills the whole process group before one of them.

    With `tears` steps are writes and fsyncs only, and half of what was to be written, or forced to the disk, is there afterwards, as
    after a power failure.
    """

    def __init__(self, kill_at: int, folder: str, *, tears: bool = False) -> None:
        self._kill_at, self._folder, self._tears = kill_at, folder, tears
        self._safe: dict[str, int] = {}
        """Bytes of each file that are on disk."""
        self._done = mmap.mmap(-1, 8)  # shared with the processes that are forked from here
        self._fsync, self._write = os.fsync, os.write
        os.fsync, os.write = self._synced, self._written  # type: ignore[assignment]
        sys.addaudithook(self._heard)

    def _count(self, tear: Callable[[], object] | None = None) -> None:
        if self._tears and tear is None:
            return
        number = int.from_bytes(self._done[:8], "little") + 1
        if number == self._kill_at:
            if self._tears and tear is not None:
                tear()
            os.killpg(0, signal.SIGKILL)
        self._done[:8] = number.to_bytes(8, "little")

    def _heard(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if flags & (os.O_WRONLY | os.O_RDWR) and str(path).startswith(self._folder):
                self._count()
                self._safe[str(path)] = 0 if flags & os.O_TRUNC or not os.path.exists(path) else os.path.getsize(path)
        elif event in NAMES:
            self._count()

    def _synced(self, descriptor: Any) -> None:
        number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
        path = os.readlink(f"/proc/self/fd/{number}")

        def tear() -> None:
            self._kill_at = 0  # what follows is no step
            if path in self._safe:
                os.truncate(path, (self._safe[path] + os.path.getsize(path)) // 2)

        self._count(tear)
        self._fsync(descriptor)
        if path in self._safe:
            self._safe[path] = os.path.getsize(path)

    def _written(self, descriptor: int, content: Any) -> int:
        if os.readlink(f"/proc/self/fd/{descriptor}").startswith(self._folder):
            self._count(lambda: self._write(descriptor, content[: len(content) // 2]))
        return self._write(descriptor, content)


def start(act: Callable[[], object], kill_at: int = 0, folder: str = "", *, tears: bool = False) -> int:
    """Return the process id of a child, in a process group of its own, that acts and is killed at a step (0: at none)."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setsid()
        if kill_at:
            Steps(kill_at, folder, tears=tears)
        act()
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
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < end:
            os.killpg(pid, 0)
            time.sleep(0.01)
    assert code in (0, -signal.SIGKILL), code
    return code != 0

"""What a command costs: CPU seconds of its whole process tree, wall seconds, peak memory. Linux.

CPU seconds are user + system of the command and of all its descendants: wait4 gives those that were waited for, and this
process adopts and reaps the others. The largest process is the kernel's own high-water mark; the sum over the tree is sampled
from /proc, as RSS (pages shared by several processes count several times) or as PSS (each page counts once; dearer to read).
"""

import contextlib
import ctypes
import os
import resource
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

PR_SET_CHILD_SUBREAPER = 36
REAP_SECONDS = 10  # how long orphans of a finished command may take to end
TAIL_CHARACTERS = 3000

Memory = Literal["rss", "pss"]


@dataclass(slots=True)
class Usage:
    """What one run of a command took."""

    cpu_seconds: float
    wall_seconds: float
    peak_process_bytes: int
    """RSS of the largest process."""
    peak_tree_bytes: int
    """Sum over the processes alive at one time, sampled."""


def measure(
    command: Sequence[str], environment: Mapping[str, str], *, memory: Memory = "rss", interval_seconds: float = 0.1
) -> Usage:
    """Run `command` to its end; RuntimeError with the end of its output if it fails."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    with tempfile.TemporaryFile() as output:
        started = time.perf_counter()
        child = subprocess.Popen(
            command,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # the session is how its processes are found
        )
        with _sampler(child.pid, memory, interval_seconds) as peak:
            _, status, used = os.wait4(child.pid, 0)
        wall = time.perf_counter() - started
        child.returncode = os.waitstatus_to_exitcode(status)
        cpu = used.ru_utime + used.ru_stime + sum(usage.ru_utime + usage.ru_stime for usage in _reap_orphans())
        if child.returncode:
            output.seek(0)
            tail = output.read().decode(errors="replace")[-TAIL_CHARACTERS:]
            raise RuntimeError(f"{' '.join(command)} ended with code {child.returncode}:\n{tail}")
    largest = used.ru_maxrss * 1024
    return Usage(cpu, wall, largest, max(peak[0], largest) if memory == "rss" else peak[0])


def _reap_orphans() -> Iterator[resource.struct_rusage]:
    """Wait for the processes a finished command left behind, such as multiprocessing's trackers."""
    deadline = time.monotonic() + REAP_SECONDS
    while time.monotonic() < deadline:
        try:
            pid, _, usage = os.wait4(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid:
            yield usage
        else:
            time.sleep(0.01)
    raise RuntimeError(f"a process left behind by the command still runs after {REAP_SECONDS} s; end it and measure again")


@contextlib.contextmanager
def _sampler(session: int, memory: Memory, interval_seconds: float) -> Iterator[list[int]]:
    """A thread that keeps the peak of the session's memory in the list's one element while the block runs."""
    peak, done = [0], threading.Event()

    def sample() -> None:
        while not done.wait(interval_seconds):
            peak[0] = max(peak[0], session_bytes(session, memory))

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def session_bytes(session: int, memory: Memory) -> int:
    """Memory of all processes of a session now; those that end while it is read count as nothing."""
    total = 0
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError, ValueError, IndexError):
            fields = (entry / "stat").read_text().rpartition(")")[2].split()  # the name before may hold spaces
            if int(fields[3]) == session:
                total += _process_bytes(entry, memory)
    return total


def _process_bytes(process: Path, memory: Memory) -> int:
    if memory == "rss":
        return int((process / "statm").read_text().split()[1]) * resource.getpagesize()
    for line in (process / "smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return 0

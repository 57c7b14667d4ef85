"""Measure a command on Linux: CPU seconds of its whole process tree, wall seconds, and peak memory.

CPU seconds are user + system of the command and all its descendants. wait4 returns those of waited-for processes; this process
adopts and reaps the others. The memory of the largest process is the kernel's high-water mark. The sum over the tree is sampled
from /proc, as RSS (shared pages count once per process) or as PSS (each page counts once; slower to read).
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
REAP_SECONDS = 10  # longest time that orphans of a finished command may take to end
TAIL_CHARACTERS = 3000

Memory = Literal["rss", "pss"]


@dataclass(slots=True)
class Usage:
    """Resources of one run of a command."""

    cpu_seconds: float
    wall_seconds: float
    peak_process_bytes: int
    """RSS of the largest process."""
    peak_tree_bytes: int
    """Sampled peak of the sum over all processes."""


def measure(
    command: Sequence[str], environment: Mapping[str, str], *, memory: Memory = "rss", interval_seconds: float = 0.1
) -> Usage:
    """Run `command` to its end. Raises RuntimeError with the end of its output if it fails."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    with tempfile.TemporaryFile() as output:
        started = time.perf_counter()
        child = subprocess.Popen(
            command,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # its processes are found by the session
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
    """Wait for orphans of a finished command, such as the trackers of multiprocessing; yield their usage."""
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
    raise RuntimeError(f"an orphan of the command still runs after {REAP_SECONDS} s; end it and measure again")


@contextlib.contextmanager
def _sampler(session: int, memory: Memory, interval_seconds: float) -> Iterator[list[int]]:
    """Yield a list whose one element a thread sets to the peak of the session's memory while the block runs."""
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
    """Return the current memory of all processes of a session; processes that end meanwhile do not count."""
    total = 0
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError, ValueError, IndexError):
            fields = (entry / "stat").read_text().rpartition(")")[2].split()  # the name before it may contain spaces
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

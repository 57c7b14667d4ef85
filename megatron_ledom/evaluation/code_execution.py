"""Running a program that a model wrote, in a process of its own with limits. This is no sandbox.

What is limited: CPU seconds, memory, the size of written files, open files and child processes, and the time on the clock; the
process has no environment, no standard input, an empty folder of its own, and its group is killed in the end. What is not: it runs
as the same user, may read that user's files and use the network. Evaluate code in a container that has neither.
"""

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from megatron_ledom.errors import UsageError

LIMITED = """
import resource, runpy, sys
seconds, num_bytes, path = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
for name, limit in (("CPU", seconds), ("AS", num_bytes), ("FSIZE", 2**20), ("NOFILE", 64), ("NPROC", 64), ("CORE", 0)):
    kind = getattr(resource, "RLIMIT_" + name)
    hard = resource.getrlimit(kind)[1]
    limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
    resource.setrlimit(kind, (limit, limit))
runpy.run_path(path, run_name="__main__")
"""
MOST_OUTPUT_BYTES = 2000
"""What is kept of the end of a failed program's messages."""


@dataclass(frozen=True, slots=True)
class Limits:
    """cpu_seconds: of the processor; wall_seconds: on the clock; memory_bytes: of address space."""

    cpu_seconds: int = 10
    wall_seconds: float = 20.0
    memory_bytes: int = 2**31


@dataclass(frozen=True, slots=True)
class Outcome:
    """passed: the program ran to its end; reason: else how it ended, and the last lines it wrote."""

    passed: bool
    reason: str = ""


def check_allowed(task: str, *, allowed: bool) -> None:
    """Refuse a task that runs what a model writes, unless the user has said so."""
    if not allowed:
        raise UsageError(
            f"the task {task} runs code that a model wrote, with limits but without a sandbox; pass --allow-code-execution if"
            " this machine may do that, best a container without network, or leave the task out"
        )


def run_program(source: str, limits: Limits | None = None) -> Outcome:
    """Run a Python program; it passes if it comes to its end, so that leaving early with status 0 is no success."""
    limits = limits or Limits()
    mark = secrets.token_hex(16)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "program.py")
        path.write_text(f"{source}\n\nprint({mark!r})\n", encoding="utf-8")
        with tempfile.TemporaryFile() as output:
            ending = _run(path, limits, output.fileno())
            output.seek(max(0, os.fstat(output.fileno()).st_size - MOST_OUTPUT_BYTES))
            written = output.read().decode("utf-8", "replace")
    if ending == "" and written.rstrip().endswith(mark):
        return Outcome(True)
    last = " | ".join(written.strip().splitlines()[-3:])
    return Outcome(False, f"{ending or 'left before its end'}: {last}" if last else ending or "left before its end")


def _run(path: Path, limits: Limits, output: int) -> str:
    """How the program ended; empty if by itself with status 0."""
    command = [sys.executable, "-I", "-c", LIMITED, str(limits.cpu_seconds), str(limits.memory_bytes), str(path)]
    process = subprocess.Popen(
        command, cwd=path.parent, env={}, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
    )
    try:
        status = process.wait(limits.wall_seconds)
    except subprocess.TimeoutExpired:
        return f"ran for more than {limits.wall_seconds:g} s"
    finally:
        _kill_group(process)
    if status < 0:
        return f"was ended by {signal.Signals(-status).name}"
    return f"ended with status {status}" if status else ""


def _kill_group(process: "subprocess.Popen[bytes]") -> None:
    """The program and what it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()

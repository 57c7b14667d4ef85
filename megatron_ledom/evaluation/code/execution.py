"""Run a model-written program and its tests, in a sandbox and with limits (`sandbox`, `isolated`).

The verdict comes from a process that the program cannot reach (see `isolated`). Limits apply to processor time, memory,
file size, open files, child processes and elapsed time. The program has no environment and no standard input.
"""

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import IO

import psutil

from megatron_ledom.errors import UsageError
from megatron_ledom.evaluation.code import isolated
from megatron_ledom.evaluation.code.sandbox import Sandbox, as_user, sandboxed, unprivileged_user

MOST_OUTPUT_BYTES = 2000
"""Bytes that are kept of the end of a failed program's messages."""
PR_SET_CHILD_SUBREAPER = 36
ENDING_SECONDS = 0.2
"""Time that a program has to end by itself after its tests failed, so that its status can be reported."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of a program. cpu_seconds: processor time; wall_seconds: elapsed time; memory_bytes: address space."""

    cpu_seconds: int = 10
    wall_seconds: float = 20.0
    memory_bytes: int = 2**31


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgramTests:
    """The tests of a program. code: calls the program's functions and asserts.

    entry_point: the function under test. prelude: trusted code before the program, whose helper functions the tests may
    use.
    """

    code: str
    entry_point: str = ""
    prelude: str = ""


@dataclass(frozen=True, slots=True)
class Outcome:
    """The outcome of the tests.

    passed: True if all passed; reason: the failure and the last lines of the program's output.
    """

    passed: bool
    reason: str = ""


def check_allowed(task: str, sandbox: Sandbox | None) -> Sandbox:
    """Return the sandbox. Raises UsageError if the user has not allowed running model-written code."""
    if sandbox is None:
        raise UsageError(
            f"the task {task} runs code that a model wrote, inside bubblewrap; pass --allow-code-execution to allow this, or omit the"
            " task"
        )
    return sandbox


def run_program(source: str, tests: ProgramTests, *, sandbox: Sandbox, limits: Limits | None = None) -> Outcome:
    """Run a Python program, then the tests that call its functions."""
    limits = limits or Limits()
    with tempfile.TemporaryFile() as messages, tempfile.TemporaryDirectory() as folder:
        given = json.dumps([source, tests.prelude, tests.code, tests.entry_point])
        verdict, reason = _run(given, folder, messages, sandbox, limits)
        messages.seek(max(0, os.fstat(messages.fileno()).st_size - MOST_OUTPUT_BYTES))
        written = messages.read().decode("utf-8", "replace")
    if verdict.get("passed") is True:
        return Outcome(True)
    last = " | ".join(written.strip().splitlines()[-3:])
    reason = reason or str(verdict.get("reason")) or "failed"
    return Outcome(False, f"{reason}: {last}" if last else reason)


def _run(given: str, folder: str, messages: IO[bytes], sandbox: Sandbox, limits: Limits) -> tuple[dict[str, object], str]:
    """Return the verdict of the test process (empty without one), and without a verdict the reason."""
    questions, answers, task, verdict = os.pipe(), os.pipe(), os.pipe(), os.pipe()
    kept, passed_on = (task[1], verdict[0]), (task[0], verdict[1])
    started: list[subprocess.Popen[bytes]] = []
    with _ending_orphans(sandbox), os.fdopen(task[1], "wb") as task_pipe, os.fdopen(verdict[0], "rb") as verdict_pipe:
        try:
            start = partial(_start, limits=limits, sandbox=sandbox, folder=folder)
            started.append(start("program", (), questions[0], answers[1], messages.fileno()))
            started.append(start("tests", passed_on, answers[0], questions[1], subprocess.DEVNULL))
        finally:
            for end in {*questions, *answers, *task, *verdict} - {*kept}:
                os.close(end)
        try:
            with contextlib.suppress(BrokenPipeError):
                task_pipe.write(given.encode())
                task_pipe.close()
            return _verdict(started[0], started[1], verdict_pipe, limits)
        finally:
            for process in started:
                _kill_group(process)


def _start(
    role: str,
    passed_on: tuple[int, ...],
    stdin: int,
    stdout: int,
    stderr: int,
    *,
    limits: Limits,
    sandbox: Sandbox,
    folder: str,
) -> "subprocess.Popen[bytes]":
    """Start one of the two processes of `isolated`.

    passed_on: file descriptors to inherit, apart from the standard three.
    """
    words = [role, str(limits.cpu_seconds), str(limits.memory_bytes), *map(str, passed_on)]
    command = sandboxed(sandbox, [sys.executable, "-I", "-c", _isolated_source(), *words])
    user = unprivileged_user(sandbox)
    if user is not None:
        os.chown(folder, user, user)
    return subprocess.Popen(
        command,
        cwd=folder,
        env={"PATH": os.environ.get("PATH", "")},  # to find bwrap, which clears it
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        pass_fds=passed_on,
        start_new_session=True,
        **as_user(user),
    )


@cache
def _isolated_source() -> str:
    return Path(isolated.__file__).read_text(encoding="utf-8")


def _verdict(
    program: "subprocess.Popen[bytes]", tests: "subprocess.Popen[bytes]", verdict: IO[bytes], limits: Limits
) -> tuple[dict[str, object], str]:
    try:
        status = tests.wait(limits.wall_seconds)
    except subprocess.TimeoutExpired:
        return {}, f"ran for more than {limits.wall_seconds:g} s"
    written = verdict.read()
    if not written:
        return {}, f"the tests ended without a verdict ({_ending(status)})"
    found: dict[str, object] = json.loads(written)
    with contextlib.suppress(subprocess.TimeoutExpired):
        if not found["passed"] and (ended := program.wait(ENDING_SECONDS)):
            return found, f"{found['reason']} ({_ending(ended)})"
    return found, ""


def _ending(status: int) -> str:
    """Return how a process ended, from its status. A sandbox reports a signal as 128 plus its number."""
    number = -status if status < 0 else status - 128
    if number in {known.value for known in signal.Signals}:
        return f"ended by {signal.Signals(number).name}"
    return f"status {status}"


def _kill_group(process: "subprocess.Popen[bytes]") -> None:
    """Kill a process and its group, which is the whole sandbox."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextmanager
def _ending_orphans(sandbox: Sandbox) -> Iterator[None]:
    """Without a sandbox, kill on exit all processes that the program has started, even in other sessions.

    Until then, hide the memory and environment of this process from other processes of its user (root still sees them).
    """
    if sandbox is not Sandbox.NONE or sys.platform != "linux":
        yield
        return
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # processes whose parent has ended become children of this one
    isolated.hide()
    own = psutil.Process()
    before = set(own.children())
    try:
        yield
    finally:
        while orphans := set(own.children()) - before:
            for orphan in orphans:
                with contextlib.suppress(psutil.NoSuchProcess):
                    orphan.kill()
                    orphan.wait()

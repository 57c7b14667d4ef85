"""Runs a check in a process of its own and judges how that process ended. No process outlives its check."""

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil

from megatron_ledom.errors import visible
from megatron_ledom.hardware_check.check import Check, Outcome, Setting, Status, failed

log = logging.getLogger(__name__)

MARK = "LEDOM_HARDWARE_CHECK"
"""Environment variable of all processes of a check, also of those in sessions of their own, as torchrun starts its ranks."""
JOBS = ("SLURM_", "PMI_", "PMIX_", "OMPI_", "MV2_")
"""Beginnings of the variables of SLURM and MPI."""
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK")
NO_TF32 = {"NVIDIA_TF32_OVERRIDE": "0", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "0"}
"""Switch off products in TF32, whose errors are above every tolerance of fp32; containers may switch it on for torch. Libraries read these
variables when they are loaded, so a check cannot set them itself."""
KILL_SECONDS = 10.0
"""Time in which killed processes end. One that waits inside a broken GPU driver never does, and must not stop the other checks."""
TAIL_LINES, TAIL_BYTES = 15, 1 << 16


@dataclass(frozen=True, slots=True)
class Result:
    """A check in the report."""

    check: Check
    outcome: Outcome
    seconds: float = 0.0
    limit_seconds: float = 0.0
    log_tail: list[str] = field(default_factory=list)
    """Last lines of the log of a failed check."""

    @property
    def has_failed(self) -> bool:
        """Return True for a failed check."""
        return self.outcome.status is Status.FAILED


def run_isolated(check: Check, setting: Setting, folder: Path) -> Result:
    """Run a check in its own process and session, and return its result. Its processes are killed at the time limit.

    folder: gets `log.txt` and `outcome.json`; it must exist. The log has all output of the check. KeyboardInterrupt passes,
    after the processes have been killed.
    """
    outcome_file, log_file = folder / "outcome.json", folder / "log.txt"
    function, limit = check.function, setting.seconds
    arguments = [function, json.dumps(asdict(setting)), str(outcome_file), str(os.getpid())]
    started = time.monotonic()
    with open(log_file, "wb") as output, _no_process_left(f"{os.getpid()}-{folder}") as mark:
        process = subprocess.Popen(
            [sys.executable, "-m", f"{__package__}.one_check", *arguments],
            env=_environment(check, setting.device, mark),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(KILL_SECONDS)
    seconds = time.monotonic() - started
    outcome = _judge(outcome_file, status, limit)
    tail = last_lines(log_file) if outcome.status is Status.FAILED else []
    return Result(check, outcome, seconds, limit, tail)


def _environment(check: Check, device: str, mark: str) -> dict[str, str]:
    """Return the environment of a check: that of this process without the variables of a launcher, unless it keeps its job's."""
    dropped = JOBS if not check.keeps_job else ()
    kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped) and name not in TORCHRUN}
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
    return {**kept, **hidden, **NO_TF32, "PYTHONUNBUFFERED": "1", MARK: mark}


@contextmanager
def _no_process_left(mark: str) -> Iterator[str]:
    """Yield the mark of a check; kill every process that has it after the context. Those that a driver holds are given up."""
    try:
        yield mark
    finally:
        end = time.monotonic() + KILL_SECONDS
        while left := list(_marked(mark)):
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(left, timeout=0.5)
            if time.monotonic() > end:
                log.warning("processes that cannot be killed, as a broken driver holds them: %s", [one.pid for one in left])
                break


def _marked(mark: str) -> Iterator[psutil.Process]:
    """Yield the living processes whose environment has the mark."""
    own = os.getuid()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            is_alive = process.uids().real == own and process.status() != psutil.STATUS_ZOMBIE
            if is_alive and process.environ().get(MARK) == mark:
                yield process


def _judge(outcome_file: Path, status: int | None, limit: float) -> Outcome:
    """Return the outcome that the process has written; a failed one if it wrote none or did not end well."""
    written = _read(outcome_file)
    if status == 0:
        return written or failed("its process ended without a result; the log may show the reason")
    if status is None:
        ending = f"was killed at its time limit of {limit:.0f} s (allow more with --minutes)"
    elif status < 0:
        ending = f"was killed by {signal.Signals(-status).name}"
    else:
        ending = f"ended with exit code {status}"
    if written is None:
        cause = "; the usual cause is too little memory" if status == -signal.SIGKILL else ""
        return failed(f"its process {ending}, without a result{cause}")
    return replace(written, status=Status.FAILED, reason=f"its process {ending}, after its result: {written.reason}")


def _read(outcome_file: Path) -> Outcome | None:
    """Return the outcome of a file; None if there is none, and a failed one for wrong content."""
    try:
        text = outcome_file.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None
    try:
        found: dict[str, Any] = json.loads(text)
        outcome = Outcome(Status(found["status"]), visible(found["reason"]), dict(found["numbers"]))
    except (ValueError, KeyError, TypeError) as error:
        return failed(f"its result is not the JSON of an outcome ({type(error).__name__}: {error})")
    return outcome


def last_lines(log_file: Path, count: int = TAIL_LINES) -> list[str]:
    """Return the last lines of a log, safe to print."""
    with open(log_file, "rb") as stream:
        stream.seek(0, os.SEEK_END)
        stream.seek(max(0, stream.tell() - TAIL_BYTES))
        text = stream.read().decode("utf-8", errors="replace")
    return [line[:500] for line in visible(text).splitlines() if line.strip()][-count:]

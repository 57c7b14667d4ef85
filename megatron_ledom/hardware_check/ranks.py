"""Ranks on this machine. They import the trainer, which takes longer than ten steps, and then wait for their work.

So the processes of several launches start together, and the imports of all take the time of one. Forks of a process that has
imported everything would start at once, but are safe only if no import initializes CUDA, which no test here can show.
"""

import json
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from megatron_ledom.errors import UNFORESEEN
from megatron_ledom.platform.processes import die_with_the_parent

RESERVE_SECONDS = 5.0
"""Time that a check keeps for its report before its limit."""
POLL_SECONDS = 0.05
LINES_OF_LOG = 3


class Ranks:
    """Processes of one launch, each `python -m MODULE FILE PARENT`; the module calls `receive_work`."""

    def __init__(self, module: str, path: Path, num_ranks: int, device: str) -> None:
        """Start the processes. path: the file that will have their work. device: `cpu` hides the GPUs."""
        self.path, self.log_file = path, path.with_suffix(".log")
        command = [sys.executable, "-m", module, str(path), str(os.getpid())]
        shared = {"WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}
        hidden = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
        self.processes: list[subprocess.Popen[bytes]] = []
        with open(self.log_file, "wb") as output:
            for rank in range(num_ranks):
                own = {name: str(value) for name, value in {**shared, "RANK": rank, "LOCAL_RANK": rank}.items()}
                environment = {**os.environ, "OMP_NUM_THREADS": "1", **hidden, **own}
                self.processes.append(
                    subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=output, stderr=output)
                )

    def run(self, work: Mapping[str, Any], end: float) -> list[int] | None:
        """Let the ranks do some work, which is plain JSON; return their exit codes, or None if the time `end` came first.

        No process outlives this call. After an error of one the others are killed soon.
        """
        self.path.write_text(json.dumps(work), encoding="utf-8")
        try:
            for process in self.processes:
                assert process.stdin is not None
                with suppress(BrokenPipeError):  # it has ended already, and its exit code says how
                    process.stdin.write(b"\n")
                    process.stdin.close()
            return wait_for(self.processes, end)
        finally:
            self.kill()

    def kill(self) -> None:
        """End the processes now."""
        for process in self.processes:
            process.kill()
            process.wait()

    def failure(self, codes: Sequence[int]) -> str:
        """Return the end of a sentence about ranks that failed."""
        return f"ended with the exit codes {list(codes)}: {end_of_log(self.log_file)}"


def follow_the_parent() -> None:
    """Let this rank end with the process that started it. The first call of a rank's module, before heavy imports."""
    die_with_the_parent(int(sys.argv[2]))


def receive_work() -> tuple[Path, dict[str, Any]]:
    """Wait for the work of this rank; return its file and content. Ends the process if its parent needs it no more."""
    if not sys.stdin.readline():
        sys.exit(0)
    path = Path(sys.argv[1])
    return path, json.loads(path.read_text(encoding="utf-8"))


def wait_for(
    processes: Sequence["subprocess.Popen[bytes]"], end: float, grace_seconds: float = RESERVE_SECONDS
) -> list[int] | None:
    """Return the exit codes of all processes, or None if some still run at the time `end` (of time.monotonic).

    If one ends with an error, the others have `grace_seconds` left; the code of those that still run is then UNFORESEEN.
    """
    error_end: float | None = None
    while any(process.poll() is None for process in processes):
        now = time.monotonic()
        if error_end is None and any(process.poll() for process in processes):
            error_end = now + grace_seconds
        if error_end is not None and now > error_end:
            return [UNFORESEEN if process.poll() is None else process.returncode for process in processes]
        if now > end:
            return None
        time.sleep(POLL_SECONDS)
    return [process.returncode for process in processes]


def free_ports(count: int) -> list[int]:
    """Return different ports that are free now, from a range that systems do not use for outgoing connections."""
    ports: set[int] = set()
    while len(ports) < count:
        port = random.SystemRandom().randrange(20_000, 30_000)
        with socket.socket() as listener, suppress(OSError):
            listener.bind(("", port))  # all addresses, as the store of rank 0 does
            ports.add(port)
    return list(ports)


def end_of_log(path: Path) -> str:
    """Return the path of a log with its last lines, in one line."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    return f"{' | '.join(line.strip() for line in (errors or lines)[-LINES_OF_LOG:])} ({path})"

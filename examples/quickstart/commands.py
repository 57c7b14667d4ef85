"""Run the project's command lines: each is printed as it can be typed, and one that fails stops the quickstart."""

import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest
from pathlib import Path

from megatron_ledom.errors import LedomError

ROOT = Path(os.path.relpath(Path(__file__).resolve().parents[2]))
"""The project, relative to the folder the quickstart was started in."""
START = "from megatron_ledom.cli.main import main; main()"
"""Starts `ledom` in a Python in which the package can be imported but is not installed."""


class QuickstartError(LedomError):
    """A step of the quickstart failed; the message names its command."""


def ledom(command: str, *arguments: object) -> list[str]:
    """Return the command line of `ledom COMMAND`: the installed program next to this Python, else this Python itself."""
    program = Path(sys.executable).with_name("ledom")
    start = [as_typed(program)] if program.exists() else [*python(), "-c", START]
    return [*start, command, *map(str, arguments)]


def tool(name: str, *arguments: object) -> list[str]:
    """Return the command line of a script of the project, such as `examples/quickstart/collect.py`."""
    return [*python(), str(ROOT / name), *map(str, arguments)]


def module(name: str, *arguments: object) -> list[str]:
    """Return the command line of `python -m name`."""
    return [*python(), "-m", name, *map(str, arguments)]


def python() -> list[str]:
    """Return the running Python as a command line."""
    return [as_typed(Path(sys.executable))]


def as_typed(program: Path) -> str:
    """Return the path of a program, relative to the current folder if it is below it."""
    return str(program.relative_to(Path.cwd()) if program.is_relative_to(Path.cwd()) else program)


def show(command: list[str]) -> None:
    """Print a command as it can be typed."""
    print(f"$ {shlex.join(command)}", flush=True)


def run_all(commands: Sequence[list[str]], stdouts: Sequence[Path | None] = ()) -> None:
    """Print the commands and run them at the same time, with the arguments of `run`. Raises QuickstartError when one fails."""
    with ThreadPoolExecutor() as pool:
        each = [pool.submit(run, command, path) for command, path in zip_longest(commands, stdouts)]
        for done in each:
            done.result()


def run(command: list[str], stdout: Path | None = None) -> None:
    """Print and run a command; its stdout goes into a file if one is named. Raises QuickstartError when it fails."""
    show(command)
    if stdout is None:
        code = subprocess.run(command, check=False).returncode
    else:
        with stdout.open("wb") as file:
            code = subprocess.run(command, check=False, stdout=file).returncode
    check_exit(command, code)


def check_exit(command: list[str], code: int, log: Path | None = None) -> None:
    """Raise QuickstartError, with the end of the log, unless the command exited with 0."""
    if code == 0:
        return
    tail = "" if log is None else f"; the end of {log}:\n" + "\n".join(log.read_text(errors="replace").splitlines()[-15:])
    raise QuickstartError(f"this command failed with exit code {code}:\n  {shlex.join(command)}{tail}")

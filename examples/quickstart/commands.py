"""Running the project's command lines: each is printed as it can be typed, and a failing one stops the quickstart."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

from megatron_ledom.errors import LedomError

ROOT = Path(os.path.relpath(Path(__file__).resolve().parents[2]))
"""The project, relative to the folder the quickstart was started in."""


class QuickstartError(LedomError):
    """A step of the quickstart failed; the message names its command."""


def tool(name: str, *arguments: object) -> list[str]:
    """The command line of a script of the project, such as `tools/generate.py`."""
    return [*python(), str(ROOT / name), *map(str, arguments)]


def module(name: str, *arguments: object) -> list[str]:
    """The command line of `python -m name`."""
    return [*python(), "-m", name, *map(str, arguments)]


def python() -> list[str]:
    """The Python that runs this, relative to the current folder where it lies below it."""
    here = Path(sys.executable)
    return [str(here.relative_to(Path.cwd()) if here.is_relative_to(Path.cwd()) else here)]


def show(command: list[str]) -> None:
    """Print a command as it can be typed."""
    print(f"$ {shlex.join(command)}", flush=True)


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

"""Chooses the Python of the virtual environment, for make_venv.

Prints three lines: the command of the Python, its constraints file, and `cuda` if its own CUDA torch is used, else an empty line.
Says why on stderr; exits with 2 if there is none. constraints/ has one file a supported version. Runs on any Python from 3.7,
so that an old one can say which are supported.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

CONSTRAINTS = Path(__file__).resolve().parents[1] / "constraints"
PIP_SECONDS = 60
"""Time limit of a question to pip: without an index it waits."""
SMI_SECONDS = 30
"""Time limit of nvidia-smi, which hangs where a driver is broken."""

PROBE = """
import importlib.util, json, os, sys, sysconfig
version, header = "%d.%d" % sys.version_info[:2], os.path.join(sysconfig.get_paths()["include"], "Python.h")
lacking = ""
if not (importlib.util.find_spec("venv") and importlib.util.find_spec("ensurepip")):
    lacking = "this Python has no venv; install it (Debian: apt install python%s-venv)" % version
elif not os.path.isfile(header):
    lacking = "the Python headers are missing (%s); install them (Debian: apt install python%s-dev)" % (header, version)
print(json.dumps([version, sys.prefix, lacking]))
"""
HAS_CUDA = "import torch; raise SystemExit(not torch.cuda.is_available())"


class Python(NamedTuple):
    """A Python that runs: its command, its version such as 3.12, its folder, and the error of what it lacks, or an empty text."""

    command: str
    version: str
    prefix: str
    lacking: str


class Choice(NamedTuple):
    """A Python, the reason for it, and True if its own CUDA torch is used."""

    python: Python
    reason: str
    cuda: bool = False


def supported_versions() -> list[str]:
    """Return the supported versions, the newest first."""
    versions = [path.stem[len("python") :] for path in CONSTRAINTS.glob("python*.txt")]
    return sorted(versions, key=lambda version: [int(part) for part in version.split(".")], reverse=True)


def probe(command: str) -> Python | None:
    """Return the Python of a command, or None if there is none or it does not run: a version manager's may not."""
    path = shutil.which(command)
    if path is None:
        return None
    done = subprocess.run([path, "-c", PROBE], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False)
    try:
        return Python(path, *json.loads(done.stdout)) if done.returncode == 0 else None
    except ValueError:
        return None


def find_pythons(versions: list[str]) -> list[Python]:
    """Return the Pythons on the PATH, the newest supported version first, others last; each folder once."""
    found = [python for python in map(probe, [*(f"python{version}" for version in versions), "python3"]) if python]
    unique = list({python.prefix: python for python in reversed(found)}.values())[::-1]
    return sorted(unique, key=lambda python: versions.index(python.version) if python.version in versions else len(versions))


def has_cuda_torch(python: Python) -> bool:
    """Return True if this Python has a torch that sees a GPU."""
    return subprocess.run([python.command, "-c", HAS_CUDA], stderr=subprocess.DEVNULL, check=False).returncode == 0


def has_gpu() -> bool:
    """Return True if this machine has an NVIDIA GPU."""
    if shutil.which("nvidia-smi") is None:
        return False
    try:
        return subprocess.run(["nvidia-smi", "-L"], capture_output=True, timeout=SMI_SECONDS, check=False).returncode == 0
    except subprocess.TimeoutExpired:
        return True  # a driver that hangs is there


def needs_cuda_libraries(report: str) -> bool:
    """Return True if the torch of pip's report needs NVIDIA's libraries, which are gigabytes."""
    [torch] = json.loads(report)["install"]
    return any(re.match(r"(nvidia|cuda)[-_]", requirement) for requirement in torch["metadata"].get("requires_dist", []))


def ask_pip(pythons: list[Python]) -> list[bool | None]:
    """Return one answer a Python: True if pip would install a torch without gigabytes, False for one with, None if it cannot tell.

    The pip of the first Python answers for all. It downloads no wheel.
    """
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor() as threads:
        made = subprocess.run([pythons[0].command, "-m", "venv", folder], stdout=subprocess.DEVNULL, check=False)
        pip = [f"{folder}/bin/python", "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--retries=1"]
        pip += ["--dry-run", "--report=-", "--no-deps", "--only-binary=:all:", f"--target={folder}/unused"]
        return list(threads.map(lambda python: ask_for_torch(pip, python.version), pythons)) if made.returncode == 0 else []


def ask_for_torch(pip: list[str], version: str) -> bool | None:
    """Return the answer of ask_pip for one version of Python."""
    pins = (CONSTRAINTS / f"python{version}.txt").read_text().splitlines()
    [torch] = [pin for pin in pins if pin.startswith("torch==")]
    command = [*pip, f"--python-version={version}", torch]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=PIP_SECONDS, check=True)
        return not needs_cuda_libraries(done.stdout.decode())
    except (subprocess.SubprocessError, ValueError):
        return None


def choose_by_torch(pythons: list[Python], small: list[bool | None]) -> Choice:
    """Return the newest Python with a small torch, or else the newest that pip has a torch for. `small` has the answers of ask_pip."""
    newest = pythons[0]
    if True in small:
        chosen = pythons[small.index(True)]
        if chosen is newest:
            return Choice(chosen, "the newest supported one here")
        torch = "pip finds no torch" if small[0] is None else "torch brings gigabytes of CUDA libraries"
        return Choice(chosen, f"the newest one here whose torch is small (for Python {newest.version} {torch})")
    if False in small:
        chosen = pythons[small.index(False)]
        return Choice(chosen, "the newest one here that pip has a torch for, with gigabytes of CUDA libraries")
    return Choice(newest, "the newest supported one here (pip could not tell the size of its torch)")


def choose(pythons: list[Python]) -> Choice:
    """Return the choice among supported Pythons, the newest first."""
    complete = [python for python in pythons if not python.lacking] or pythons[:1]
    for python in complete:
        if has_cuda_torch(python):
            return Choice(python, "it has a CUDA torch, which is used", cuda=True)
    if len(complete) == 1:
        return Choice(complete[0], "the only supported one here" if len(pythons) == 1 else "the only complete one here")
    if has_gpu():
        return Choice(complete[0], "the newest supported one here, for a machine with a GPU")
    return choose_by_torch(complete, ask_pip(complete))


def choose_here(named: str, versions: list[str]) -> Choice:
    """Return the choice on this machine: `named` if it is not empty. Exits with 2 and the reason if there is none."""
    need = f"supported are {', '.join(reversed(versions))}"
    pythons = [python for python in [probe(named)] if python] if named else find_pythons(versions)
    if not pythons:
        found = f"PYTHON={named} is not a Python that runs" if named else "no Python found"
        fail(f"{found}; {need} (with venv); name one: make PYTHON=/path/to/python{versions[0]}")
    supported = [python for python in pythons if python.version in versions]
    if not supported:
        fail(
            f"found Python {pythons[0].version} ({pythons[0].command}); {need}, for which the versions in constraints/ were tested;"
            f" name one: make PYTHON=/path/to/python{versions[0]}"
        )
    choice = Choice(supported[0], "named by PYTHON", has_cuda_torch(supported[0])) if named else choose(supported)
    if choice.python.lacking:
        fail(f"Python {choice.python.version} ({choice.python.command}): {choice.python.lacking}")
    return choice


def fail(message: str) -> None:
    """Exit with 2 and a message."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def main() -> None:
    """Print the choice."""
    choice = choose_here(os.environ.get("PYTHON", ""), supported_versions())
    python = choice.python
    print(f"Python {python.version} ({python.command}): {choice.reason}; PYTHON=... takes another", file=sys.stderr)
    print(python.command, CONSTRAINTS / f"python{python.version}.txt", "cuda" if choice.cuda else "", sep="\n")


if __name__ == "__main__":
    main()

"""The sandbox of model-written programs: bubblewrap, or none if the user requests it."""

import logging
import os
import shutil
import subprocess
import sys
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Any

from megatron_ledom.errors import UsageError

log = logging.getLogger(__name__)

SYSTEM_FOLDERS = ("/usr", "/lib", "/lib32", "/lib64", "/bin", "/sbin", "/etc/ld.so.cache", "/etc/alternatives")
"""Folders that Python and its libraries need. They are read-only inside the sandbox."""
SCRATCH_BYTES = 2**24
"""Size of each folder that a program may write to, /tmp and /dev/shm. Both are in memory and end with the program."""
NOBODY = 65534
"""User and group of programs if this process is root: no process limit applies to root, and root may read everything."""


class Sandbox(StrEnum):
    """The sandbox of programs.

    bwrap: separate user, process, network, mount, IPC and host namespaces, without the user's files. Only an empty /tmp
    and /dev/shm are writable, and all processes of the program end with it. none: limits and an empty environment only.
    """

    BWRAP = "bwrap"
    NONE = "none"


def sandboxed(sandbox: Sandbox, command: list[str]) -> list[str]:
    """Return the command line that runs `command` in the sandbox, with its inherited file descriptors."""
    return command if sandbox is Sandbox.NONE else [*_bubblewrap(), *command]


def check_sandbox(sandbox: Sandbox) -> None:
    """Raise UsageError if the sandbox does not work on this machine."""
    remedy = (
        "install it (Debian: apt install bubblewrap), or pass --sandbox none if this machine may run such programs without a sandbox,"
        " preferably in a container without network or secrets"
    )
    if sandbox is Sandbox.BWRAP and shutil.which("bwrap") is None:
        raise UsageError(f"programs that a model wrote run inside bubblewrap, which is not installed: {remedy}")
    if os.geteuid() == 0 and unprivileged_user(sandbox) is None:
        log.warning(
            "this process is root, and an unprivileged user cannot run its Python (%s): programs run as root with --sandbox %s,"
            " without a process limit; run the evaluation as an ordinary user",
            sys.executable,
            sandbox,
        )
    if sandbox is Sandbox.BWRAP and (problem := _problem(sandbox, unprivileged_user(sandbox))):
        raise UsageError(f"bubblewrap does not work on this machine ({problem}): allow it user namespaces, or {remedy}")


@cache
def unprivileged_user(sandbox: Sandbox) -> int | None:
    """Return the user and group id of programs if this process is root and they can run its Python; None for its own."""
    return NOBODY if os.geteuid() == 0 and not _problem(sandbox, NOBODY) else None


def as_user(user: int | None) -> dict[str, Any]:
    """Return the subprocess arguments that run a command as this user; none for None."""
    return {} if user is None else {"user": user, "group": user, "extra_groups": []}


def _problem(sandbox: Sandbox, user: int | None) -> str:
    """Return the error with which Python starts in the sandbox as this user; empty if it starts."""
    command = sandboxed(sandbox, [sys.executable, "-I", "-c", ""])
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, cwd="/", **as_user(user)
        )
    except OSError as error:
        return str(error.strerror)
    return "" if done.returncode == 0 else (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]


@cache
def _bubblewrap() -> tuple[str, ...]:
    """Return the bubblewrap command for a file system that contains only Python."""
    found = [folder for folder in SYSTEM_FOLDERS if Path(folder).exists()]
    prefixes = dict.fromkeys(str(Path(prefix).resolve()) for prefix in (sys.base_prefix, sys.prefix))
    inside = [prefix for prefix in prefixes if not prefix.startswith(("/usr/", "/lib/")) and prefix != "/usr"]
    binds = [word for path in (*found, *inside) for word in ("--ro-bind", path, path)]
    return (
        *("bwrap", "--unshare-all", "--die-with-parent", "--new-session", "--clearenv", "--cap-drop", "ALL"),
        *binds,
        *("--proc", "/proc", "--dev", "/dev"),
        *(word for folder in ("/dev/shm", "/tmp") for word in ("--size", str(SCRATCH_BYTES), "--tmpfs", folder)),
        *(word for folder in ("/proc", "/dev", "/") for word in ("--remount-ro", folder)),  # root could write sysctls
        *("--chdir", "/tmp"),
        "--",
    )

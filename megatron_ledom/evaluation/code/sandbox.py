"""Where programs that a model wrote run: inside bubblewrap, or, if the user insists, without a sandbox."""

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
"""What Python and its libraries need of the system; read only inside."""
SCRATCH_BYTES = 2**24
"""Size of each of the two folders that a program may write to, /tmp and /dev/shm; they are memory, and gone with the program."""
NOBODY = 65534
"""User and group that root runs programs as: root is bound by no limit of processes, and may read everything."""


class Sandbox(StrEnum):
    """bwrap: own user, process, network, mount, IPC and host name spaces; no file of the user is there, nothing but an empty /tmp
    and /dev/shm can be written, and all that the program has started ends with it. none: limits and an empty environment only."""

    BWRAP = "bwrap"
    NONE = "none"


def sandboxed(sandbox: Sandbox, command: list[str]) -> list[str]:
    """Return the command line that runs `command` in the sandbox, with its inherited file descriptors."""
    return command if sandbox is Sandbox.NONE else [*_bubblewrap(), *command]


def check_sandbox(sandbox: Sandbox) -> None:
    """Refuse a sandbox that does not work on this machine, before anything else is done. Raises UsageError."""
    remedy = (
        "install it (Debian: apt install bubblewrap), or pass --sandbox none if this machine, best a container without network or"
        " secrets, may run such programs as it is"
    )
    if sandbox is Sandbox.BWRAP and shutil.which("bwrap") is None:
        raise UsageError(f"programs that a model wrote run inside bubblewrap, which is not installed: {remedy}")
    if os.geteuid() == 0 and unprivileged_user(sandbox) is None:
        log.warning(
            "this process is root, and its Python (%s) cannot be used by an unprivileged user: programs run as root with --sandbox"
            " %s, and the limit of processes has no effect; evaluate as an ordinary user",
            sys.executable,
            sandbox,
        )
    if sandbox is Sandbox.BWRAP and (told := _problem(sandbox, unprivileged_user(sandbox))):
        raise UsageError(f"bubblewrap does not work on this machine ({told}): allow it user namespaces, or {remedy}")


@cache
def unprivileged_user(sandbox: Sandbox) -> int | None:
    """Return the user and group id that programs run as if this process is root; None for its own, as where Python is root's alone."""
    return NOBODY if os.geteuid() == 0 and not _problem(sandbox, NOBODY) else None


def as_user(user: int | None) -> dict[str, Any]:
    """Return what subprocess needs to run a command as this user; nothing for None."""
    return {} if user is None else {"user": user, "group": user, "extra_groups": []}


def _problem(sandbox: Sandbox, user: int | None) -> str:
    """Return why Python does not start in the sandbox as this user; empty if it does."""
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
    """The options: a view of the file system with Python alone in it."""
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

"""Where programs that a model wrote run: inside bubblewrap, or, if the user insists, without a sandbox."""

import shutil
import subprocess
import sys
from enum import StrEnum
from functools import cache
from pathlib import Path

from megatron_ledom.errors import UsageError

SYSTEM_FOLDERS = ("/usr", "/lib", "/lib32", "/lib64", "/bin", "/sbin", "/etc/ld.so.cache", "/etc/alternatives")
"""What Python and its libraries need of the system; read only inside."""
SCRATCH_BYTES = 2**24
"""Size of the only folder that a program may write to; it is memory, and gone with the program."""


class Sandbox(StrEnum):
    """bwrap: own user, process, network, mount, IPC and host name spaces; no file of the user is there, nothing but an empty /tmp
    can be written, and all that the program has started ends with it. none: resource limits and an empty environment only."""

    BWRAP = "bwrap"
    NONE = "none"


def sandboxed(sandbox: Sandbox, command: list[str]) -> list[str]:
    """Return the command line that runs `command` in the sandbox, with its inherited file descriptors."""
    return command if sandbox is Sandbox.NONE else [*_bubblewrap(), *command]


def check_sandbox(sandbox: Sandbox) -> None:
    """Refuse a sandbox that does not work on this machine, before anything else is done. Raises UsageError."""
    if sandbox is Sandbox.NONE:
        return
    remedy = (
        "install it (Debian: apt install bubblewrap), or pass --sandbox none if this machine, best a container without network or"
        " secrets, may run such programs as it is"
    )
    if shutil.which("bwrap") is None:
        raise UsageError(f"programs that a model wrote run inside bubblewrap, which is not installed: {remedy}")
    done = subprocess.run(
        [*_bubblewrap(), sys.executable, "-I", "-c", ""], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if done.returncode:
        told = done.stderr.strip().splitlines()[-1:] or [f"status {done.returncode}"]
        raise UsageError(f"bubblewrap does not work on this machine ({told[0]}): allow it user namespaces, or {remedy}")


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
        *(
            "--proc",
            "/proc",
            "--dev",
            "/dev",
            "--size",
            str(SCRATCH_BYTES),
            "--tmpfs",
            "/tmp",
            "--chdir",
            "/tmp",
            "--remount-ro",
            "/",
        ),
        "--",
    )

"""Find out on one node, without torch, what would stop or spoil a run there: errors in the kernel's log, and folders.

What can be wrong is a problem; what could not be checked is a warning. No check that failed is silent. The log's part is not yet run on hardware.
"""

import errno
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from megatron_ledom.storage.files import sync

DMESG_SECONDS = 5.0
KILL_SECONDS = 1.0
HARDWARE_XIDS = {
    46: "the GPU stopped processing",
    48: "uncorrectable ECC error",
    54: "its auxiliary power is not connected",
    62: "its microcontroller halted",
    64: "remapping a damaged row of memory failed",
    74: "NVLink error",
    79: "the GPU has fallen off the bus",
    95: "uncontained memory error",
    110: "security error",
    119: "its system processor does not answer",
    120: "error of its system processor",
    136: "the training of an NVLink failed",
    140: "unrecovered ECC error",
    143: "the GPU could not be initialized",
    155: "NVLink error",
    156: "one of its resources is retired at the next reset",
    158: "fatal timeout",
}
"""Xid errors after which NVIDIA's catalogue asks for a reset, a restart of the machine, its NVLink workflow or a look at the cables:
https://docs.nvidia.com/deploy/xid-errors/analyzing-xid-catalog.html, read as of 2025-10-29. 109, a context switch that takes too long, is
skipped, although the catalogue asks for a reset: NVIDIA's device plugin for Kubernetes counts it as a program's, like 13, 31, 43, 45 and 68."""
NVLINK_XIDS = range(144, 151)
"""Errors of NVLink 5, of the hardware only if their line says "Fatal"; "Nonfatal" ones are corrected, or kill a program."""
XID = re.compile(r"^(\S+) .*?NVRM: Xid \(PCI:([0-9a-fA-F:.]+)[^)]*\): (\d+)(.*)")
"""A line of the driver, as in kernel_rc.c of https://github.com/NVIDIA/open-gpu-kernel-modules: with MIG, " GPU-I:01 GPU-CI:00" follows the bus."""
XID_HOURS = 24
PROBE_BYTES = 2**20


@dataclass(slots=True)
class Facts:
    """Known facts of a node: problems, what could not be checked, and folders that do not exist there."""

    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)

    def add(self, other: "Facts") -> None:
        """Add the facts of another check."""
        self.problems += other.problems
        self.warnings += other.warnings
        self.absent += other.absent


@dataclass(frozen=True, slots=True)
class Answer:
    """Output and exit code of a program; `failure` is empty if it could be started and ended in time."""

    out: str = ""
    err: str = ""
    code: int = 0
    failure: str = ""


def run_for(seconds: float, command: Sequence[str]) -> Answer:
    """Run a program for at most `seconds`. One that waits for a device cannot be killed, and is left alone then."""
    name = command[0]
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace"
        )
    except OSError as error:
        return Answer(failure=f"{name} cannot be started: {error.strerror}")
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        with suppress(subprocess.TimeoutExpired):
            process.wait(KILL_SECONDS)
        return Answer(failure=f"{name} did not answer in {seconds:g} s")
    return Answer(out, err, process.returncode)


def facts_of_kernel_log(now: datetime) -> Facts:
    """Return the hardware's Xid errors in this node's kernel log, or a warning that this user cannot read it."""
    answer = run_for(DMESG_SECONDS, ["dmesg", "--time-format", "iso"])
    facts = Facts(problems_of_kernel_log(answer.out, now))
    if answer.failure or answer.code:
        said = answer.failure or answer.err.strip().partition("\n")[0] or f"dmesg ended with {answer.code}"
        facts.warnings.append(f"Xid errors were not checked, because the kernel's log cannot be read ({said})")
    return facts


def problems_of_kernel_log(text: str, now: datetime) -> list[str]:
    """Return the hardware's Xid errors of the last day. text: the kernel's log with a time in ISO format in each line."""
    found = {}
    for line in text.splitlines():
        match = XID.match(line)
        meaning = _meaning(int(match[3]), match[4]) if match else ""
        if match and meaning and _is_of_last_day(match[1], now):
            found[match[2], match[3]] = f"GPU {match[2]} had Xid {match[3]} at {match[1]}: {meaning}"
    return list(found.values())


def _meaning(xid: int, rest: str) -> str:
    """Return the words for an error of the hardware; nothing for another one. rest: its line after the number."""
    if xid in NVLINK_XIDS:
        return "fatal NVLink error" if re.search(r"\bFatal\b", rest) else ""
    return HARDWARE_XIDS.get(xid, "")


def _is_of_last_day(text: str, now: datetime) -> bool:
    """Return True if a time is of the last day, or cannot be read."""
    try:
        when = datetime.fromisoformat(text.replace(",", "."))
    except ValueError:
        return True
    return now - when.astimezone(UTC) < timedelta(hours=XID_HOURS)


def facts_of_folders(folders: Sequence[str], free_gib: float) -> Facts:
    """Write a megabyte into each folder, or the nearest one above it that exists, and compare the free space with `free_gib`.

    The node's temporary folder is one of them: TMPDIR or /tmp, not the one that Python falls back to if that is full.
    """
    facts = Facts()
    temporary = os.environ.get("TMPDIR") or "/tmp"
    for folder in dict.fromkeys(os.path.abspath(name) for name in (*folders, temporary)):
        try:
            place = _nearest(Path(folder))
            free = shutil.disk_usage(place).free / 2**30
            with tempfile.NamedTemporaryFile(dir=place, prefix=".ledom-check-nodes-") as probe:
                probe.write(bytes(PROBE_BYTES))
                probe.flush()
                sync(probe.name)
        except OSError as error:
            name = errno.errorcode.get(error.errno or 0, "")
            facts.problems.append(f"{folder} cannot be written: {error.strerror} ({name})")
            continue
        if str(place) != folder:
            facts.absent.append(folder)
        if free < free_gib:
            facts.problems.append(f"{folder} has {free:.2f} GiB free, below {free_gib:g} GiB")
    if os.path.abspath(temporary) in facts.absent:
        facts.warnings.append(f"its temporary folder {temporary} does not exist")
    return facts


def _nearest(place: Path) -> Path:
    """Return a folder, or the nearest one above it that exists. Raises OSError, also for a link whose target does not exist."""
    while True:
        try:
            os.stat(place)
        except FileNotFoundError:
            if os.path.islink(place):
                raise OSError(errno.ENOENT, f"{place} is a link to {os.readlink(place)}, which does not exist") from None
            place = place.parent
            continue
        return place

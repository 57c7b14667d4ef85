"""Find out on one node, without torch, what would stop or spoil a run there: GPUs and their errors, and folders.

The parts about GPUs read what nvidia-smi and the kernel's log print. Not yet run on hardware.
"""

import errno
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from megatron_ledom.storage.files import sync

SMI_SECONDS = 20
QUERY = ("index", "name", "ecc.errors.uncorrected.volatile.total")
REMAPPED = ("gpu_bus_id", "remapped_rows.pending", "remapped_rows.failure")
UNKNOWN = re.compile(r"\[?(N/A|Not Supported|Unknown Error|GPU requires reset)\]?", re.IGNORECASE)
BROKEN = ("unknown error", "requires reset", "is lost")
"""Words of nvidia-smi in place of a value of a GPU that does not work any more."""
FATAL_XIDS = {
    48: "uncorrectable ECC error",
    64: "a damaged row of memory cannot be recorded",
    74: "NVLink error",
    79: "the GPU has fallen off the bus",
    95: "uncontained ECC error",
    119: "its system processor does not answer",
    120: "error of its system processor",
}
"""Xid errors of the hardware. Others, such as 13 and 31, are usually those of a program."""
XID = re.compile(r"^(\S+) .*NVRM: Xid \(PCI:([0-9a-fA-F:.]+)\): (\d+)")
XID_HOURS = 24
PROBE_BYTES = 2**20


def problems_of_gpus(wanted: int) -> list[str]:
    """Return the problems of this node's GPUs. wanted: the number that the job uses here."""
    if wanted == 0:
        return []
    if shutil.which("nvidia-smi") is None:
        return [f"{wanted} GPUs are wanted, but there is no nvidia-smi"]
    answer, problem = _nvidia_smi(f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader,nounits")
    if problem:
        return [problem]
    rows = [[cell.strip() for cell in line.split(",")] for line in answer.splitlines() if line.strip()]
    found = [f"{wanted} GPUs are wanted, but nvidia-smi lists {len(rows)}"] if len(rows) < wanted else []
    for row in rows:
        found += _problems_of_a_gpu(row)
    rows_of_memory, problem = _nvidia_smi(f"--query-remapped-rows={','.join(REMAPPED)}", "--format=csv,noheader")
    if not problem:  # a driver or GPU without this query
        found += problems_of_rows(rows_of_memory)
    return found


def _problems_of_a_gpu(row: Sequence[str]) -> list[str]:
    if any(word in cell.lower() for cell in row for word in BROKEN):
        return [f"GPU {row[0]} does not work: nvidia-smi says {', '.join(row[1:])}"]
    if len(row) != len(QUERY):
        return [f"nvidia-smi printed {', '.join(row)!r}, expected {', '.join(QUERY)}"]
    index, _, errors = row
    if UNKNOWN.fullmatch(errors):
        return []  # a GPU without ECC
    return [f"GPU {index} has {errors} uncorrected ECC errors since the driver was loaded"] if errors != "0" else []


def problems_of_rows(text: str) -> list[str]:
    """Return the problems in the answer of `nvidia-smi --query-remapped-rows`: a row to be replaced at the next reset, or a failure."""
    found = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) == len(REMAPPED):
            words = [("pending", cells[1]), ("failed", cells[2])]
            found += [f"GPU {cells[0]}: replacing a row of memory is {what}" for what, cell in words if cell in ("1", "Yes")]
    return found


def _nvidia_smi(*arguments: str) -> tuple[str, str]:
    """Return the output of nvidia-smi and an empty text, or the problem."""
    try:
        done = subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=SMI_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return "", f"nvidia-smi did not answer in {SMI_SECONDS} s"
    except OSError as error:
        return "", f"nvidia-smi cannot be started: {error.strerror}"
    if done.returncode:
        said = (done.stderr or done.stdout).strip().partition("\n")[0]
        return "", f"nvidia-smi ended with {done.returncode}: {said}"
    return done.stdout, ""


def problems_of_kernel_log(text: str, now: datetime) -> list[str]:
    """Return the hardware's Xid errors of the last day. text: the kernel's log with a time in ISO format in each line."""
    found = {}
    for line in text.splitlines():
        match = XID.match(line)
        if match is None or int(match[3]) not in FATAL_XIDS:
            continue
        try:
            when = datetime.fromisoformat(match[1].replace(",", "."))
        except ValueError:
            continue
        if now - when.astimezone(UTC) < timedelta(hours=XID_HOURS):
            found[match[2], match[3]] = f"GPU {match[2]} had Xid {match[3]} at {match[1]}: {FATAL_XIDS[int(match[3])]}"
    return list(found.values())


def read_kernel_log() -> str:
    """Return the kernel's log, or nothing if this user may not read it."""
    try:
        done = subprocess.run(["dmesg", "--time-format", "iso"], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout


def problems_of_folders(folders: Sequence[str], free_gib: float) -> list[str]:
    """Write a megabyte into each folder, or the nearest one above it that exists, and compare the free space with `free_gib`."""
    found = []
    for folder in dict.fromkeys(os.path.abspath(name) for name in (*folders, tempfile.gettempdir())):
        place = Path(folder)
        while not place.exists() and place != place.parent:
            place = place.parent
        try:
            free = shutil.disk_usage(place).free / 2**30
            with tempfile.NamedTemporaryFile(dir=place, prefix=".ledom-check-nodes-") as probe:
                probe.write(bytes(PROBE_BYTES))
                probe.flush()
                sync(probe.name)
        except OSError as error:
            name = errno.errorcode.get(error.errno or 0, "")
            found.append(f"{folder} cannot be written: {error.strerror} ({name})")
            continue
        if free < free_gib:
            found.append(f"{folder} has {free:.2f} GiB free, below {free_gib:g} GiB")
    return found

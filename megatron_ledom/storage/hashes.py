"""Hashes of files: size and SHA-256 of every file of a checkpoint are kept in its manifest, and checked before its content is believed.

sha256 because the standard library has it, shards use it, and processors have instructions for it: it is computed by the
process that writes, while training goes on, and checked by all ranks together, each its share of the files.
"""

import hashlib
import os
from pathlib import Path
from typing import Any

from megatron_ledom.errors import DataError

FileSums = dict[str, dict[str, Any]]
"""Name in the checkpoint's folder -> {"bytes": size, "sha256": hex digits}."""


def sha256_of(path: str | Path) -> str:
    """Return the SHA-256 of a file, in hex. Raise OSError."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksum(path: str) -> dict[str, Any]:
    """Size in bytes and sha256 of one file."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return {"bytes": file.tell(), "sha256": digest.hexdigest()}


def size_problems(folder: str, files: FileSums) -> list[str]:
    """A sentence for each file that is missing or of another size; reads nothing."""
    faults = []
    for name, expected in files.items():
        path = os.path.join(folder, name)
        try:
            found = os.stat(path).st_size
        except OSError as error:
            faults.append(f"{path} is missing ({error.strerror})")
            continue
        if found != expected["bytes"]:
            faults.append(f"{path} has {found:,} bytes, the manifest says {expected['bytes']:,}")
    return faults


def content_problems(folder: str, files: FileSums, share: int = 0, num_shares: int = 1) -> list[str]:
    """A sentence for each file whose sha256 is not the manifest's; reads every `num_shares`-th file, from `share` on."""
    faults = []
    for name in sorted(files)[share::num_shares]:
        path = os.path.join(folder, name)
        try:
            found = sha256_of(path)
        except OSError as error:
            faults.append(f"{path} cannot be read ({error.strerror})")
            continue
        if found != files[name]["sha256"]:
            faults.append(f"{path} has sha256 {found}, the manifest says {files[name]['sha256']}")
    return faults


def refuse_damaged(checkpoint: str, faults: list[str]) -> None:
    """Raise DataError with all faults, if there are any."""
    if faults:
        raise DataError(
            f"{checkpoint} is damaged: {'; '.join(faults)}; use an earlier one: let the file `latest` beside it name that one"
        )

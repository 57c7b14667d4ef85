"""Hashes of files. A manifest contains the size and SHA-256 of every file of a checkpoint; both are checked before a load.

SHA-256 is in the standard library, shards use it, and processors have instructions for it. The writing process computes it while
training continues; on loading, each rank checks a part of the files.
"""

import hashlib
import os
from pathlib import Path
from typing import Any

from megatron_ledom.errors import DataError

FileSums = dict[str, dict[str, Any]]
"""File name in the checkpoint's folder -> {"bytes": size, "sha256": hex digits}."""


def sha256_of(path: str | Path) -> str:
    """Return the SHA-256 of a file, in hex. Raise OSError."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksum(path: str) -> dict[str, Any]:
    """Return the size in bytes and the sha256 of a file."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return {"bytes": file.tell(), "sha256": digest.hexdigest()}


def size_problems(folder: str, files: FileSums) -> list[str]:
    """Return a sentence for each file that is missing or has another size; reads no content."""
    problems = []
    for name, expected in files.items():
        path = os.path.join(folder, name)
        try:
            found = os.stat(path).st_size
        except OSError as error:
            problems.append(f"{path} is missing ({error.strerror})")
            continue
        if found != expected["bytes"]:
            problems.append(f"{path} has {found:,} bytes, but {expected['bytes']:,} in the manifest")
    return problems


def content_problems(folder: str, files: FileSums, part: int = 0, num_parts: int = 1) -> list[str]:
    """Return a sentence for each file whose sha256 differs from the manifest's. Reads part `part` of `num_parts` of the files."""
    problems = []
    for name in sorted(files)[part::num_parts]:
        path = os.path.join(folder, name)
        try:
            found = sha256_of(path)
        except OSError as error:
            problems.append(f"{path} cannot be read ({error.strerror})")
            continue
        if found != files[name]["sha256"]:
            problems.append(f"{path} has sha256 {found}, but {files[name]['sha256']} in the manifest")
    return problems


def refuse_damaged(checkpoint: str, problems: list[str]) -> None:
    """Raise DataError with all problems, if there are any."""
    if problems:
        raise DataError(
            f"{checkpoint} is damaged: {'; '.join(problems)}; use an earlier checkpoint: write its name into the file `latest` in the same folder"
        )

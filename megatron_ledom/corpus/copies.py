"""Copies of the files of a corpus: TO/SOURCE/PATH, and a record of each with the version and the hash that were verified.

A copy counts only if its record is of the listed version and its bytes have the recorded hash: another commit can have a file of equal
size, and a disk can lose bits.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_ledom.corpus.listing import ListedFile
from megatron_ledom.errors import DataError
from megatron_ledom.storage.files import withdraw, write_file

RECORDS = ".verified"
"""TO/.verified/SOURCE has the records. No source has this name: names begin with a letter or digit."""
SHA256_DIGITS, GIT_DIGITS = 64, 40
BLOCK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class CopyRecord:
    """The record of a verified copy."""

    path: str
    version: str
    """Hash of the content by the hub or the object store; for a file of the disk, when it was changed."""
    sha256: str


class Hashes:
    """The SHA-256 of bytes, and their hash as git makes it: the hub lists large files by one and small files by the other."""

    def __init__(self, num_bytes: int) -> None:
        self._sha256 = hashlib.sha256()
        self._git = hashlib.sha1(b"blob %d\0" % num_bytes, usedforsecurity=False)

    def update(self, block: bytes) -> None:
        """Add bytes."""
        self._sha256.update(block)
        self._git.update(block)

    @property
    def sha256(self) -> str:
        """The SHA-256 in hex."""
        return self._sha256.hexdigest()

    def comparable(self, blob_id: str | None) -> str | None:
        """Return the hash of the kind of `blob_id`, or None if that is of another kind, such as the ETag of an upload in parts."""
        expected = blob_id or ""
        if not set(expected) <= set("0123456789abcdef"):
            return None
        return {SHA256_DIGITS: self.sha256, GIT_DIGITS: self._git.hexdigest()}.get(len(expected))


def copy_path(folder: str | Path, name: str, path: str) -> Path:
    """Return the path of a copy. Raise DataError for a path that would leave the folder of its source, or share it with another."""
    if any(part in ("", ".", "..") for part in path.split("/")):
        raise DataError(
            f"sources.{name}: the file {path!r} of the listing has an absolute part, an empty one or '..', so its copy would be outside"
            f" {Path(folder, name)} or in the place of another; read the source without copies, or leave the file out of `files`"
        )
    return Path(folder, name, *path.split("/"))


def version_of(file: ListedFile, modified: Callable[[], str]) -> str:
    """Return the version of a listed file. modified: returns when a file of the disk was changed."""
    return file.blob_id if file.blob_id is not None else modified()


def write_record(folder: str | Path, name: str, record: CopyRecord) -> None:
    """Write the record of a copy, after the copy."""
    path = _record_path(folder, name, record.path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, json.dumps(asdict(record)) + "\n")


def withdraw_record(folder: str | Path, name: str, path: str) -> None:
    """Remove the record of a copy that will be replaced."""
    record = _record_path(folder, name, path)
    if record.exists():
        withdraw(record)


def problem_of_copy(folder: str | Path, name: str, file: ListedFile, version: str | None) -> str | None:
    """Return what is wrong with a copy, after reading all of it; None if it is the listed file. version: None for any."""
    target = copy_path(folder, name, file.path)
    if not target.is_file():
        return f"is missing, the listing has {file.num_bytes:,} bytes"
    if (found := target.stat().st_size) != file.num_bytes:
        return f"has {found:,} bytes, the listing has {file.num_bytes:,}"
    record = _read_record(_record_path(folder, name, file.path))
    if record is None:
        return "has no record of its verification"
    if version is not None and record.get("version") != version:
        return f"is a copy of version {record.get('version')}, the listing has {version}"
    hashes = Hashes(file.num_bytes)
    with target.open("rb") as stream:
        while block := stream.read(BLOCK_BYTES):
            hashes.update(block)
    if hashes.sha256 != record.get("sha256"):
        return f"has the SHA-256 {hashes.sha256}, the verified copy had {record.get('sha256')}"
    if (mine := hashes.comparable(file.blob_id)) is not None and mine != file.blob_id:
        return f"has the hash {mine}, the listing has {file.blob_id}"
    return None


def _record_path(folder: str | Path, name: str, path: str) -> Path:
    return Path(folder, RECORDS, name, f"{hashlib.sha256(path.encode()).hexdigest()}.json")


def _read_record(path: Path) -> Mapping[str, Any] | None:
    try:
        stored = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return stored if isinstance(stored, dict) else None

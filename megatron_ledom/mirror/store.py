"""The files at the address of a mirror: an object store, another file system of fsspec, or a plain folder.

Files of a plain folder appear whole and are forced to the disk. An object store shows an object only when it is whole.
No message contains credentials.
"""

import hashlib
import logging
import os
import shutil
import threading
from collections.abc import Callable
from typing import TypeVar

from megatron_ledom.config.schema import RunConfig
from megatron_ledom.data.readers.remote import check_no_secrets, described, is_missing, is_remote, repeated, without_secrets
from megatron_ledom.errors import ConfigError, DataError, LedomError, UsageError, cannot_write
from megatron_ledom.storage.files import new_file, sync, withdraw, write_whole

KEY = "checkpoint.mirror"
CHUNK_BYTES = 16 << 20
Result = TypeVar("Result")


class StoppedReading(Exception):
    """A read was given up, because another one has failed or the process ends."""


def check_address(config: RunConfig) -> None:
    """Raise ConfigError for a mirror whose address has credentials, or that is inside the run folder."""
    address = config.checkpoint.mirror
    if address is None:
        return
    try:
        check_no_secrets(address)
    except UsageError:
        raise ConfigError(
            f"{KEY}={without_secrets(address)} contains credentials, and the run folder, checkpoints and logs record the address;"
            " give it without them, and the credentials in ~/.config/fsspec or an environment variable (AWS_* for s3://)"
        ) from None
    if not is_remote(address):
        run_dir, folder = os.path.realpath(config.run_dir), os.path.realpath(address)
        if os.path.commonpath([run_dir, folder]) in (run_dir, folder):
            raise ConfigError(
                f"{KEY}={address} and run_dir={config.run_dir} are one folder, or one is inside the other; name a folder on another"
                " disk, or an object store, such as s3://bucket/run"
            )


class MirrorStore:
    """Reads and writes files by their names below the address. Raises the errors of the file system, unless a method says otherwise."""

    def __init__(self, address: str) -> None:
        """Raise UsageError if the package of the protocol is missing."""
        import fsspec

        for name in ("botocore", "aiobotocore", "s3fs", "fsspec"):
            logging.getLogger(name).setLevel(logging.WARNING)
        self.address = without_secrets(address.rstrip("/"))
        try:
            self._files, self._root = fsspec.core.url_to_fs(address.rstrip("/"))
        except (ImportError, ValueError) as error:
            raise UsageError(
                f"{KEY}={self.address}: {described(error)}; for s3:// install s3fs (pip install 'megatron-ledom[s3]')"
            ) from error
        self._is_local = "file" in (
            self._files.protocol if isinstance(self._files.protocol, tuple) else (self._files.protocol,)
        )

    def path(self, name: str) -> str:
        """Return the path of a file in its file system."""
        return f"{self._root}/{name}"

    def names(self, folder: str) -> list[str]:
        """Return the names of the files and folders of a folder; none if it does not exist."""
        self._files.invalidate_cache()
        try:
            return sorted({found.rstrip("/").rpartition("/")[2] for found in self._files.ls(self.path(folder), detail=False)})
        except FileNotFoundError:
            return []

    def exists(self, name: str) -> bool:
        """Return True if there is such a file."""
        self._files.invalidate_cache()
        return bool(self._files.exists(self.path(name)))

    def read(self, name: str) -> bytes | None:
        """Return the content of a small file; None if it does not exist."""
        self._files.invalidate_cache()
        try:
            content: bytes = self._files.cat_file(self.path(name))
        except FileNotFoundError:
            return None
        return content

    def write(self, name: str, content: bytes) -> None:
        """Write a small file, whole or not at all."""
        path = self.path(name)
        if self._is_local:
            make_folder(os.path.dirname(path))
            write_whole(path, content)
        else:
            self._files.pipe_file(path, content)

    def put(self, source: str, name: str) -> None:
        """Copy a file of this machine to the mirror."""
        path = self.path(name)
        if not self._is_local:
            self._files.put_file(source, path)
            return
        make_folder(os.path.dirname(path))
        with open(source, "rb") as file, new_file(path) as copy:
            shutil.copyfileobj(file, copy, CHUNK_BYTES)

    def get(self, name: str, target: str, is_stopping: threading.Event) -> str:
        """Copy a file of the mirror to this machine. Returns the sha256 of the bytes that were written.

        Raises StoppedReading once `is_stopping` is set.
        """
        digest = hashlib.sha256()
        self._files.invalidate_cache()
        options = {} if self._is_local else {"block_size": CHUNK_BYTES, "cache_type": "none"}
        with self._files.open(self.path(name), "rb", **options) as file, new_file(target) as copy:
            while chunk := file.read(CHUNK_BYTES):
                if is_stopping.is_set():
                    raise StoppedReading
                digest.update(chunk)
                try:
                    copy.write(chunk)
                except OSError as error:  # of this machine's disk: no other copy and no other try helps
                    raise UsageError(str(cannot_write(error, target))) from error
        return digest.hexdigest()

    def remove(self, name: str) -> None:
        """Remove a file, if it exists."""
        if self._is_local:
            if os.path.exists(self.path(name)):
                withdraw(self.path(name))
            return
        self._files.invalidate_cache()
        try:
            self._files.rm_file(self.path(name))
        except FileNotFoundError:
            return

    def remove_folder(self, folder: str, first: str) -> None:
        """Remove a folder, if it exists, and before everything else its file `first`."""
        self.remove(f"{folder}/{first}")
        self._files.invalidate_cache()
        try:
            self._files.rm(self.path(folder), recursive=True)
        except FileNotFoundError:
            return

    def patient(self, work: Callable[[], Result]) -> Result:
        """Return the result of `work`, called again for three minutes if the mirror does not answer.

        Raises TransientError after that, DataError for a missing file, UsageError for anything else.
        """

        def explain(error: BaseException) -> LedomError | None:
            """Return the error for the user."""
            if isinstance(error, LedomError):
                return None
            if is_missing(error):
                return DataError(f"the mirror {self.address} lacks a file: {described(error)}")
            return UsageError(f"{KEY}={self.address} cannot be read: {described(error)}; check the address and the credentials")

        return repeated(work, self.address, explain=explain)


def make_folder(path: str) -> None:
    """Make a folder and those above it, and force their names to the disk."""
    if not os.path.isdir(path):
        make_folder(os.path.dirname(path))
        os.makedirs(path, exist_ok=True)
        sync(os.path.dirname(path))


def address_of(config: RunConfig) -> str:
    """Return the address of the run's mirror, with a folder of this machine as an absolute path."""
    address = str(config.checkpoint.mirror)
    return address if is_remote(address) else os.path.abspath(address)

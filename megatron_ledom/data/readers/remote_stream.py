"""Read remote files: each failed request is repeated at the byte where it broke, and a file that has changed is refused."""

import functools
import io
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

from megatron_ledom.data.readers import hub, web_files
from megatron_ledom.data.readers.byte_ranges import InputPath
from megatron_ledom.data.readers.remote import (
    MOST_REFUSALS,
    BrokenOffError,
    UnusableAnswerError,
    check_same,
    described,
    is_http,
    is_refusal,
    protocol_of,
    remote_file_system,
    repeated,
    status_of,
    without_secrets,
)
from megatron_ledom.errors import DataError, LedomError

REMOTE_READ_BYTES = 8 << 20  # one request to an object store
CLIENTS = {
    "adlfs",
    "aiohttp",
    "azure",
    "botocore",
    "fsspec",
    "gcsfs",
    "google",
    "httpx",
    "httpx2",
    "huggingface_hub",
    "paramiko",
    "s3fs",
}
"""Packages whose errors are failures of a store."""


class RemoteFile(io.RawIOBase):
    """One remote file, opened again at the byte where reading failed. A file that has changed raises DataError."""

    def __init__(self, source: InputPath, read_bytes: int, end: int, open_file: Callable[[InputPath], Any]) -> None:
        """Read `read_bytes` at a time, up to the byte `end`; a longer read and one after `end` are single requests."""
        self.source = source
        self._open = open_file
        self._read_bytes, self._end = read_bytes, end
        self._position = 0
        self._block, self._block_start = b"", 0
        self._kept = b""
        """Bytes at the position that came before the connection broke."""
        self._stream: Any = None

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return the position."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Set and return the position."""
        self._kept = b""
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.source.num_bytes}[whence]
        return self._position

    def read(self, size: int | None = -1, /) -> bytes:
        """Return the next `size` bytes, fewer only at the end of the file."""
        rest = max(0, self.source.num_bytes - self._position)
        wanted = rest if size is None or size < 0 else min(size, rest)
        gathered = bytearray()
        while len(gathered) < wanted:
            inside = self._position - self._block_start
            if not 0 <= inside < len(self._block):
                ahead = max(wanted - len(gathered), min(self._read_bytes, self._end - self._position))
                attempt = functools.partial(self._attempt, ahead)
                self._block = repeated(attempt, self.source.path, refusals=MOST_REFUSALS, explain=self.explained)
                self._block_start, inside = self._position, 0
            block = self._block[inside : inside + wanted - len(gathered)]
            self._position += len(block)
            gathered += block
        return bytes(gathered)

    def _attempt(self, size: int) -> bytes:
        try:
            if self._stream is None:
                self._stream = self._open(self.source)
            self._stream.seek(self._position + len(self._kept))
            block = self._kept + bytes(self._stream.read(size - len(self._kept)))
            if not block:
                raise UnusableAnswerError(f"the server sent nothing at byte {self._position:,} of {self.source.num_bytes:,}")
            self._kept = b""
            return block
        except BrokenOffError as error:
            self._kept += error.content
            self._drop()
            raise
        except BaseException:
            self._drop()
            raise

    def explained(self, error: BaseException) -> LedomError | None:
        """Return the error for the user for one that lasts; None if it is not of a store."""
        if isinstance(error, LedomError):
            return error
        if (replaced := _replaced(self.source)) is not None:  # a server may only say that this version is gone
            return replaced
        path, why = without_secrets(self.source.path), described(error)
        if is_refusal(error):
            return DataError(
                f"{path} cannot be read: the server refuses the credentials ({why}); renew them, then run the same command again:"
                " finished work is kept"
            )
        if isinstance(error, FileNotFoundError):
            return DataError(f"{path} is no longer there ({why}); bring it back, or omit it")
        return DataError(f"{path} cannot be read ({why}); check the address, or omit the file") if _is_of_io(error) else None

    def _drop(self) -> None:
        stream, self._stream = self._stream, None
        if stream is not None:
            with suppress(Exception):
                stream.close()

    def close(self) -> None:
        """Close the connection."""
        self._drop()
        super().close()


def _replaced(source: InputPath) -> LedomError | None:
    """Return the error for a file that has changed; None if it has not, or if its store does not answer."""
    try:
        check_now(source)
    except LedomError as error:
        return error
    except Exception:
        return None
    return None


def check_now(source: InputPath) -> None:
    """Ask the store, not the listing that the client keeps, and raise DataError if the file has changed."""
    system = remote_file_system(source.path)
    system.invalidate_cache()
    check_same(source, system.info(source.path))


def _is_of_io(error: BaseException) -> bool:
    modules = {base.__module__.split(".")[0] for base in type(error).__mro__}
    return isinstance(error, OSError) or status_of(error) is not None or bool(modules & CLIENTS)


def open_checked(source: InputPath) -> Any:
    """Open a remote file with its library, after a check of its size and version. Each read is one request."""
    if protocol_of(source.path) == "hf":
        return hub.open_file(source)
    if is_http(source):
        return web_files.open_file(source)
    system = remote_file_system(source.path)
    check_same(source, system.info(source.path))
    return system.open(source.path, "rb", cache_type="none")


def opened_remote(source: InputPath, read_bytes: int, end: int) -> Iterator[RemoteFile]:
    """Yield a remote file, once, and check at the end that it has not changed. See `RemoteFile`."""
    with RemoteFile(source, min(read_bytes, REMOTE_READ_BYTES), end, open_checked) as remote:
        yield remote
    if protocol_of(source.path) != "hf":  # the hub's answers are checked one by one, and a commit does not change
        repeated(lambda: check_now(source), source.path, refusals=MOST_REFUSALS, explain=remote.explained)

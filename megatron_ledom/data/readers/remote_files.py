"""Find the files of addresses and globs in object stores, on web servers and in the Hugging Face hub."""

import glob
import logging
from collections.abc import Callable, Mapping
from typing import Any

from megatron_ledom.data.readers.byte_ranges import InputPath
from megatron_ledom.data.readers.hub import Commits, check_readable
from megatron_ledom.data.readers.remote import (
    WAITS_SECONDS,
    check_no_secrets,
    described,
    is_missing,
    protocol_of,
    remote_file_system,
    repeated,
    version_of,
    without_secrets,
)
from megatron_ledom.errors import LedomError, UsageError

logger = logging.getLogger(__name__)
CLIENT_TRIES = 1
"""Further tries of a listing of the hub, after the six that `huggingface_hub` makes itself."""
Entry = Mapping[str, Any]
"""The size and version of a file, as fsspec returns them."""
Found = tuple[dict[str, Entry], bool]
"""(entries by their names in the store, True if they are the files of a folder)."""


class RemoteListing:
    """The remote files of one command. Each store is asked anew, and each revision of the hub is looked up once."""

    def __init__(self) -> None:
        self._asked: set[str] = set()
        self._commits = Commits()
        self._checked: set[str] = set()
        self._is_warned = False

    def pinned(self, pattern: str) -> str:
        """Return the address or glob to list: with a commit, if it is in the hub. Raises UsageError if it has credentials."""
        check_no_secrets(pattern)
        protocol = protocol_of(pattern)
        if protocol not in self._asked:
            self._asked.add(protocol)
            remote_file_system(pattern).invalidate_cache()  # another command in this process may have listed it before
        return self._commits.pinned(pattern) if protocol == "hf" else pattern

    def entries(self, pattern: str) -> Found:
        """Return the files of a `pinned` address or glob; none if there are none."""
        system = remote_file_system(pattern)

        def _attempt() -> Found:
            if glob.has_magic(pattern):
                return system.glob(pattern, detail=True), False
            if system.isdir(pattern):
                return system.find(pattern, detail=True), True
            return {str(system._strip_protocol(pattern)): system.info(pattern)}, False

        try:
            waits = WAITS_SECONDS[:CLIENT_TRIES] if protocol_of(pattern) == "hf" else None
            return repeated(lambda: _unless_missing(_attempt), pattern, waits=waits, explain=_explainer(pattern))
        except _MissingError:
            return {}, False

    def source(self, name: str, entry: Entry, pattern: str) -> InputPath:
        """Return the input file of an entry, with what the store calls its version. Raises UsageError if its size is unknown."""
        system = remote_file_system(pattern)
        path = str(system.unstrip_protocol(name))
        check_no_secrets(path)  # a page of links may have signed ones
        if entry.get("size") is None or not version_of(entry):
            entry = {**entry, **repeated(lambda: system.info(path), path, explain=_explainer(path))}
        if entry.get("size") is None:
            raise UsageError(f"input {without_secrets(path)} has no size, and work is divided by file size; download it first")
        source = InputPath(path, int(entry["size"]), version_of(entry))
        if not source.version and not self._is_warned:
            self._is_warned = True
            logger.warning(
                "%s: its server names neither a hash nor a date, so only a change of its size would be noticed; there may be more"
                " such files",
                without_secrets(path),
            )
        return source

    def check_access(self, source: InputPath) -> None:
        """Read a byte of the first file that has one of each repository of the hub, before any work begins."""
        repo = source.path.split("@")[0]
        if protocol_of(source.path) == "hf" and source.num_bytes and repo not in self._checked:
            self._checked.add(repo)
            check_readable(source)


def _explainer(pattern: str) -> Callable[[BaseException], LedomError]:
    """Return the function that changes an error into one for the user: each store raises errors of its own."""
    return lambda error: (
        error
        if isinstance(error, LedomError)
        else UsageError(
            f"input {without_secrets(pattern)} cannot be listed ({described(error)}); check the address and the credentials"
        )
    )


class _MissingError(LedomError):
    """No file matches."""


def _unless_missing(attempt: Callable[[], Found]) -> Found:
    try:
        return attempt()
    except FileNotFoundError as error:
        if is_missing(error):
            raise _MissingError("") from None
        raise

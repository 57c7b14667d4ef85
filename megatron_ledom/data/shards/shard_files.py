"""Check during a job that the files of a shard are still those that were checked at its start.

`stat` shows a change of size, time or inode, in a few microseconds per sample. The content is hashed only after such a
change. A file that was copied again with the same content is accepted.
"""

import logging
import os
from dataclasses import dataclass

from megatron_ledom.data.shards.shard import TARGETS, ShardManifest
from megatron_ledom.errors import DataError, TransientError
from megatron_ledom.storage.hashes import sha256_of

log = logging.getLogger(__name__)


FileState = tuple[int, int, int]
"""Size, time of modification and inode, which identify a file without reading it."""


def _state_of(path: str) -> FileState:
    found = os.stat(path)
    return found.st_size, found.st_mtime_ns, found.st_ino


@dataclass(frozen=True, slots=True)
class ShardFiles:
    """The files of one shard as they were when its manifest was checked."""

    prefix: str
    hashes: dict[str, str]
    """sha256 in the manifest, by path."""
    states: dict[str, FileState]
    """Last accepted state, by path."""

    @classmethod
    def of(cls, prefix: str, manifest: ShardManifest) -> "ShardFiles":
        """Record the states of the files of a shard."""
        hashes = {f"{prefix}.bin": manifest.bin_sha256, f"{prefix}.idx": manifest.idx_sha256}
        if manifest.pairs:
            hashes[f"{prefix}{TARGETS}"] = manifest.targets_sha256
        return cls(prefix, hashes, {path: _state_of(path) for path in hashes})

    def check(self) -> None:
        """Raise DataError if the content of a file has changed since the start.

        A deleted file passes: if it is open it stays readable, and opening it again fails by itself.
        """
        for path, known in self.states.items():
            try:
                found = _state_of(path)
            except OSError:
                continue
            if found != known:
                self._check_content(path, known, found)
                log.warning("%s was written again during the run, with the same content; the run continues", path)
                self.states[path] = found

    def _check_content(self, path: str, known: FileState, found: FileState) -> None:
        was_sound = f"the shard {self.prefix} was intact when the run started and cannot be opened now"
        try:
            is_same = found[0] == known[0] and sha256_of(path) == self.hashes[path]
        except OSError as error:
            raise TransientError(f"{was_sound} ({error}); find out what changes it, then start again") from error
        if not is_same:
            raise DataError(
                f"{was_sound}: it was replaced during the run ({path} had {known[0]:,} bytes, now it has"
                f" {found[0]:,} and not the sha256 of its manifest); restore the old shard and resume from the last"
                " checkpoint, or start another run with the new shard"
            )

"""Copy one checkpoint, with the files of the run folder that a resume needs, to the mirror; delete outdated copies there."""

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from megatron_ledom.checkpoint.branches import launches_of
from megatron_ledom.checkpoint.folder import outdated, outdated_others
from megatron_ledom.checkpoint.manifest import MANIFEST, load_manifest
from megatron_ledom.config.schema import CheckpointConfig
from megatron_ledom.errors import DataError
from megatron_ledom.mirror.contents import (
    CHECKPOINTS,
    COPIED,
    COPIED_FOLDERS,
    RUN_FILES,
    RUN_FOLDER,
    Claim,
    abandoned_copies,
    folder_of,
    number,
    read_latest,
    sums_text,
    unfinished_checkpoints,
    whole_checkpoints,
    write_latest,
)
from megatron_ledom.mirror.store import MirrorStore
from megatron_ledom.storage.hashes import FileSums, checksum

FILES_AT_ONCE = 4


def mirror_retention(settings: CheckpointConfig) -> CheckpointConfig:
    """Return settings whose `keep_last` and `keep_interval` are those of the mirror."""
    return replace(settings, keep_last=settings.mirror_keep_last, keep_interval=settings.mirror_keep_interval)


class DamagedCheckpoint(DataError):
    """A checkpoint of the run folder that cannot be copied as it is. A damaged file of the mirror is another error, and tried again."""


class Copier:
    """Copies the checkpoints of one run folder. After an error, the same copy resumes with the files that are left."""

    def __init__(self, store: MirrorStore, claim: Claim, settings: CheckpointConfig) -> None:
        self.store, self.claim, self.settings = store, claim, mirror_retention(settings)
        self._has_opened = False
        self._abandoned: set[int] = set()
        """Checkpoints on the mirror of a branch that the run has abandoned, and that are not replaced yet."""
        self._done: set[tuple[str, str, str]] = set()
        """Copied files of the checkpoint that is not whole yet: (checkpoint, file, sha256)."""

    def open(self, local_latest: int | None, *, has_taken: bool = False) -> None:
        """Take the mirror for this launch, unless an earlier process of it `has_taken` it. Later checkpoints than the run's own do not
        count any more."""
        if self._has_opened:
            return
        self.claim.check(self.store, may_adopt=False)
        if has_taken:
            self.claim.check_owner(self.store)
        else:
            self.claim.take(self.store)
        mirrored = read_latest(self.store)
        if local_latest is not None and mirrored is not None and mirrored > local_latest:
            write_latest(self.store, f"iter_{local_latest:07d}")
        self._abandoned = set(abandoned_copies(self.store, whole_checkpoints(self.store), launches_of(self.claim.run_dir)))
        self._has_opened = True

    def copy(self, name: str) -> int:
        """Make the copy of a checkpoint whole. Returns its bytes, 0 if it was whole already. Raises DamagedCheckpoint."""
        local, there = os.path.join(self.claim.run_dir, "checkpoints", name), folder_of(name)
        try:
            content, manifest = Path(local, MANIFEST).read_bytes(), load_manifest(local)
        except DataError as error:
            raise DamagedCheckpoint(str(error)) from error
        if not manifest.files:
            raise DamagedCheckpoint(f"{local} was written by a version without checksums, so it is not copied to the mirror")
        is_there = self.store.read(f"{there}/{MANIFEST}") == content
        if not is_there:
            self.claim.check_owner(self.store)  # before anything of another launch is replaced
            self._copy_files(local, name, manifest.files)
            self.claim.check_owner(self.store)
            self.store.write(f"{there}/{MANIFEST}", content)
        latest = read_latest(self.store)
        if latest is None or latest < manifest.iteration:
            self.claim.check_owner(self.store)
            write_latest(self.store, name)
        self._done.clear()
        self._abandoned.discard(manifest.iteration)
        return 0 if is_there else sum(sums["bytes"] for sums in manifest.files.values())

    def _copy_files(self, local: str, name: str, files: FileSums) -> None:
        """Copy everything but the manifest."""
        there = folder_of(name)
        self.store.remove(f"{there}/{MANIFEST}")
        with ThreadPoolExecutor(FILES_AT_ONCE) as threads:
            list(threads.map(lambda file: self._put(local, name, file, files), files))
        self._put_run_files(there)
        for file in set(self.store.names(there)) - {*files, RUN_FOLDER, RUN_FILES}:
            self.store.remove(f"{there}/{file}")  # of an abandoned checkpoint with more ranks

    def _put(self, local: str, name: str, file: str, files: FileSums) -> None:
        """Copy a file of a checkpoint whose content is that of the manifest."""
        path, mark = os.path.join(local, file), (name, file, files[file]["sha256"])
        if mark in self._done:
            return
        if checksum(path) != files[file]:
            raise DamagedCheckpoint(
                f"{path} does not have the sha256 of its manifest: the checkpoint is damaged and is not copied to the mirror"
            )
        self.store.put(path, f"{folder_of(name)}/{file}")
        self._done.add(mark)

    def _put_run_files(self, there: str) -> None:
        sums: FileSums = {}
        for file in self._run_files():
            content = Path(self.claim.run_dir, file).read_bytes()
            sums[file] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            self.store.write(f"{there}/{RUN_FOLDER}/{file}", content)
        self.store.write(f"{there}/{RUN_FILES}", sums_text(sums))

    def _run_files(self) -> Iterator[str]:
        run_dir = Path(self.claim.run_dir)
        yield from (name for name in COPIED if (run_dir / name).is_file())
        for folder in COPIED_FOLDERS:
            files = [path for path in sorted((run_dir / folder).rglob("*")) if path.is_file()]
            yield from (path.relative_to(run_dir).as_posix() for path in files)

    def delete_outdated(self, replayed: list[int], waiting: list[int]) -> list[str]:
        """Delete the copies that `checkpoint.mirror_keep_last` does not keep, and remains of earlier ones. Returns their names.

        Copies of an abandoned branch do not count.
        waiting: iterations that are still to be copied, whose files may be there already.
        """
        self.claim.check_owner(self.store)
        latest, whole = read_latest(self.store), whole_checkpoints(self.store)
        if latest is None:
            return []
        own = [iteration for iteration in whole if iteration not in self._abandoned]
        past = outdated_others(self._abandoned & whole.keys(), own, latest, self.settings)
        names = [whole[iteration] for iteration in past + outdated(own, latest, self.settings, replayed)]
        unfinished = [name for name in unfinished_checkpoints(self.store, whole) if number(name) < latest]
        names += [name for name in unfinished if number(name) not in waiting]
        for name in names:
            self.store.remove_folder(f"{CHECKPOINTS}/{name}", first=MANIFEST)
        return names

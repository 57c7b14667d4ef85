"""Copy the files of a corpus at their pinned revision, each whole and verified or not at all. The same command resumes.

Files that are there are read and compared with their hashes, so that a damaged copy is replaced.
"""

import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from tqdm import tqdm

from megatron_ledom.corpus.addresses import INSTALLED, root_of
from megatron_ledom.corpus.build import chosen_names, pinned_revision, stored_listing
from megatron_ledom.corpus.copies import (
    CopyRecord,
    Hashes,
    copy_path,
    problem_of_copy,
    version_of,
    withdraw_record,
    write_record,
)
from megatron_ledom.corpus.listing import CHANGED_AT, ListedFile
from megatron_ledom.corpus.recipe import load_recipe
from megatron_ledom.data.readers.byte_ranges import InputPath
from megatron_ledom.data.readers.remote import is_remote
from megatron_ledom.data.readers.streams import raw_blocks
from megatron_ledom.errors import DataError, UsageError, cannot_write
from megatron_ledom.storage.files import new_file
from megatron_ledom.storage.locks import output_folder_lock

logger = logging.getLogger(__name__)


@dataclass(kw_only=True, slots=True)
class FetchSettings:
    """Options of `ledom corpus fetch`."""

    recipe: str
    to: str
    overrides: Sequence[str] = ()
    source: Sequence[str] = ()
    listing: str | None = None
    threads: int = 4


def fetch(settings: FetchSettings) -> int:
    """Copy the chosen files to TO/SOURCE/PATH and return the number of bytes copied now."""
    recipe = load_recipe(settings.recipe, settings.overrides)
    listing, where = stored_listing(settings.recipe, settings.listing)
    if listing is None:
        raise UsageError(f"{where} does not exist, so nothing says which files to copy; run `ledom corpus pin RECIPE` first")
    work: list[_Work] = []
    for name in chosen_names(recipe, settings.source):
        source = recipe.sources[name]
        if source.address == INSTALLED:
            continue
        listed = listing.of(name, source, where)
        files = listed.chosen(source)
        if files is None:
            raise UsageError(f"{where} does not know the files of {name}; run `ledom corpus pin RECIPE --source {name}`")
        root = root_of(source.address, pinned_revision(name, source, listed))
        work += [_Work(settings.to, name, root + file.path, file) for file in files]
        for file in files:
            copy_path(settings.to, name, file.path)  # refuse before any copy
    with output_folder_lock(settings.to, "--to"), ThreadPoolExecutor(settings.threads) as threads:
        missing = [one for one, is_there in zip(work, threads.map(_Work.is_there, work), strict=True) if not is_there]
        total = sum(one.file.num_bytes for one in missing)
        logger.info(
            "%s: %d of %d files are there, %s bytes to copy", settings.to, len(work) - len(missing), len(work), f"{total:,}"
        )
        with tqdm(total=total, unit="B", unit_scale=True, desc="fetch", disable=None) as bar:
            for file in threads.map(_Work.copy, missing):
                bar.update(file.num_bytes)
    return total


@dataclass(frozen=True, slots=True)
class _Work:
    """A file to copy. source: its path with address and revision."""

    folder: str
    name: str
    source: str
    file: ListedFile

    def version(self) -> str:
        return version_of(self.file, lambda: str(os.stat(self.source).st_mtime_ns))

    def _change_time(self) -> str:
        """Return the time of the last change of a file of the disk. Raises DataError for a file that was changed after it was listed."""
        found = str(os.stat(self.source).st_mtime_ns)
        if self.file.blob_id is not None and self.file.blob_id != f"{CHANGED_AT}{found}":
            raise DataError(f"{self.source} was changed after it was listed; list it again with `ledom corpus pin RECIPE`")
        return found

    def is_there(self) -> bool:
        """Return True for a finished copy of this version, after a comparison of its bytes with their hash."""
        return problem_of_copy(self.folder, self.name, self.file, self.version()) is None

    def copy(self) -> ListedFile:
        """Copy the file, compare its hash with the listing, and write its record."""
        file, version, target = self.file, self.version(), copy_path(self.folder, self.name, self.file.path)
        source = InputPath(self.source, file.num_bytes, (file.blob_id or "") if is_remote(self.source) else self._change_time())
        hashes = Hashes(file.num_bytes)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            withdraw_record(self.folder, self.name, file.path)
            with new_file(target) as stream:
                for block in raw_blocks(source, 0, file.num_bytes):
                    stream.write(block)
                    hashes.update(block)
                _check_hash(self.source, file, hashes)
            write_record(self.folder, self.name, CopyRecord(file.path, version, hashes.sha256))
        except OSError as error:
            raise cannot_write(error, str(target)) from error
        return file


def _check_hash(path: str, file: ListedFile, found: Hashes) -> None:
    """Raise DataError if the copied bytes have another hash than the listing. Other kinds of hashes cannot be compared."""
    mine = found.comparable(file.blob_id)
    if mine is not None and mine != file.blob_id:
        raise DataError(
            f"{path}: the copied bytes have the hash {mine}, the listing has {file.blob_id}; run the same command again"
        )

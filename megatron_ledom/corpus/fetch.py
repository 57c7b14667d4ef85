"""Copy the files of a corpus at their pinned revision, each whole and verified or not at all. The same command resumes."""

import hashlib
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from megatron_ledom.corpus.addresses import INSTALLED, root_of
from megatron_ledom.corpus.build import chosen_names, pinned_revision, stored_listing
from megatron_ledom.corpus.listing import ListedFile
from megatron_ledom.corpus.recipe import load_recipe
from megatron_ledom.data.readers.byte_ranges import InputPath
from megatron_ledom.data.readers.remote import is_remote
from megatron_ledom.data.readers.streams import raw_blocks
from megatron_ledom.errors import DataError, UsageError, cannot_write
from megatron_ledom.storage.files import new_file
from megatron_ledom.storage.locks import output_folder_lock

logger = logging.getLogger(__name__)
SHA256_DIGITS, GIT_DIGITS = 64, 40


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
    work: list[tuple[str, ListedFile, Path]] = []
    for name in chosen_names(recipe, settings.source):
        source = recipe.sources[name]
        if source.address == INSTALLED:
            continue
        listed = listing.of(name, source, where)
        files = listed.chosen(source)
        if files is None:
            raise UsageError(f"{where} does not know the files of {name}; run `ledom corpus pin RECIPE --source {name}`")
        root = root_of(source.address, pinned_revision(name, source, listed))
        work += [(root + file.path, file, Path(settings.to, name, file.path)) for file in files]
    with output_folder_lock(settings.to, "--to"):
        missing = [one for one in work if not _is_there(one[1], one[2])]
        total = sum(file.num_bytes for _, file, _ in missing)
        logger.info(
            "%s: %d of %d files are there, %s bytes to copy", settings.to, len(work) - len(missing), len(work), f"{total:,}"
        )
        with (
            ThreadPoolExecutor(settings.threads) as threads,
            tqdm(total=total, unit="B", unit_scale=True, desc="fetch", disable=None) as bar,
        ):
            for file in threads.map(lambda one: _copy(*one), missing):
                bar.update(file.num_bytes)
    return total


def _is_there(file: ListedFile, target: Path) -> bool:
    """Return True for a finished copy: a file gets its name only after its hash was compared."""
    return target.is_file() and target.stat().st_size == file.num_bytes


def _copy(path: str, file: ListedFile, target: Path) -> ListedFile:
    target.parent.mkdir(parents=True, exist_ok=True)
    version = (file.blob_id or "") if is_remote(path) else str(os.stat(path).st_mtime_ns)
    source = InputPath(path, file.num_bytes, version)
    sha256, git = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % file.num_bytes, usedforsecurity=False)
    try:
        with new_file(target) as stream:
            for block in raw_blocks(source, 0, file.num_bytes):
                stream.write(block)
                sha256.update(block)
                git.update(block)
            _check_hash(path, file, {SHA256_DIGITS: sha256.hexdigest(), GIT_DIGITS: git.hexdigest()})
    except OSError as error:
        raise cannot_write(error, str(target)) from error
    return file


def _check_hash(path: str, file: ListedFile, found: dict[int, str]) -> None:
    """Raise DataError if the copied bytes have another hash than the listing. Other kinds of hashes cannot be compared."""
    expected = file.blob_id or ""
    mine = found.get(len(expected))
    if mine is not None and set(expected) <= set("0123456789abcdef") and mine != expected:
        raise DataError(
            f"{path}: the copied bytes have the hash {mine}, the listing has {expected}; run the same command again"
        )

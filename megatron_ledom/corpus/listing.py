"""Listings: the files of every source with sizes and hashes, taken from a hub, an object store or the disk, and stored.

A stored listing beside its recipe (RECIPE.lock.json) pins the corpus: `build` refuses files that differ from it, and `plan` needs no
network.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megatron_ledom import __version__
from megatron_ledom.corpus.addresses import INSTALLED, is_commit, is_hub, root_of
from megatron_ledom.corpus.installed_text import installed_lines
from megatron_ledom.corpus.recipe import Recipe, Source
from megatron_ledom.data.readers.byte_ranges import InputPath
from megatron_ledom.data.readers.input_files import find_inputs
from megatron_ledom.data.readers.remote import is_remote
from megatron_ledom.errors import DataError, MismatchError, UsageError
from megatron_ledom.storage.files import write_file
from megatron_ledom.storage.locks import output_file_lock

FORMAT_VERSION = 1
LOCK_ENDING = ".lock.json"
CHANGED_AT = "mtime_ns="
"""Beginning of the `blob_id` of a file on a disk; the rest is the time of its last change in nanoseconds."""


@dataclass(frozen=True, slots=True)
class ListedFile:
    """A file of a source."""

    path: str
    """Relative to the address of the source."""
    num_bytes: int
    blob_id: str | None = None
    """Hash of the content by the hub or the object store; on a disk `mtime_ns=` and the time of the last change."""


@dataclass(frozen=True, slots=True)
class SourceListing:
    """The files of a source that its patterns name."""

    address: str
    revision: str | None
    """Commit of a hub repository; None elsewhere, and if it is unknown."""
    patterns: list[str]
    files: list[ListedFile] | None
    """Sorted by path; None if they are unknown."""
    asked: str | None = None
    """`revision` of the recipe, a branch or tag, that was looked up."""
    most_bytes: int | None = None
    """Limit of the text of installed packages, whose files it shortens; None for other sources."""

    def is_at(self, revision: str | None) -> bool:
        """Return True if a recipe that asks for this revision means the listed commit."""
        return self.asked == revision or (is_commit(revision) and self.revision in (None, revision))

    def chosen(self, source: Source) -> list[ListedFile] | None:
        """Return the files to read, sorted by path: all, or those that `sample` and `most_bytes` choose by a hash of their names."""
        if self.files is None:
            return None
        if source.address == INSTALLED or (source.sample is None and source.most_bytes is None):
            return self.files
        order = sorted(self.files, key=lambda file: hashlib.sha256(file.path.encode()).hexdigest())
        if source.sample is not None:
            order = order[: max(1, round(source.sample * len(order)))]
        if source.most_bytes is not None:
            total = 0
            for number, file in enumerate(order):
                total += file.num_bytes
                if number and total > source.most_bytes:
                    order = order[:number]
                    break
        return sorted(order, key=lambda file: file.path)


@dataclass(frozen=True, slots=True)
class Listing:
    """The listings of all sources of a recipe."""

    sources: dict[str, SourceListing]
    made_at: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    def of(self, name: str, source: Source, where: str) -> SourceListing:
        """Return the listing of a source. Raise MismatchError if it was made of another address, revision or patterns."""
        found = self.sources.get(name)
        advice = "list the sources again: `ledom corpus pin RECIPE`"
        if found is None:
            raise MismatchError(f"{where} has no source {name}, it has {', '.join(self.sources) or 'none'}; {advice}")
        for key, then, now in (
            ("address", found.address, source.address),
            ("files", found.patterns, source.files),
            ("most_bytes", found.most_bytes, _shortening(source)),
        ):
            if then != now:
                raise MismatchError(f"sources.{name}.{key} was {then!r} when {where} was made and is {now!r}; {advice}")
        if is_hub(source.address) and not found.is_at(source.revision):
            of = repr(found.revision) + (f", looked up for {found.asked!r}" if found.asked != found.revision else "")
            raise MismatchError(f"sources.{name}.revision is {source.revision!r}, {where} lists the files of {of}; {advice}")
        return found


def _shortening(source: Source) -> int | None:
    """Return the `most_bytes` that changed the listed files themselves, not the choice among them."""
    return source.most_bytes if source.address == INSTALLED else None


def lock_path(recipe_path: str) -> Path:
    """Return the path of the stored listing beside a recipe."""
    return Path(recipe_path).with_suffix(LOCK_ENDING)


def list_sources(recipe: Recipe, names: Sequence[str], revisions: Mapping[str, str | None]) -> Listing:
    """Return the files of the sources as they are now. revisions: commit of each hub source."""
    return Listing({name: list_source(name, recipe.sources[name], revisions.get(name)) for name in names})


def list_source(name: str, source: Source, revision: str | None) -> SourceListing:
    """Return the files of a source as they are now. Raise UsageError with its name if a pattern has no match."""
    if source.address == INSTALLED:
        files = [ListedFile(file, sum(map(len, lines))) for file, lines in installed_files(source).items()]
        return SourceListing(source.address, None, source.files, files, most_bytes=_shortening(source))
    root = root_of(source.address, revision)
    try:
        found, _ = find_inputs([root + pattern for pattern in source.files])
    except UsageError as error:
        raise UsageError(f"sources.{name}: {error}") from error
    if is_hub(source.address) and found:  # the listing has looked up the commit of a branch
        revision = found[0].path.removeprefix(f"{source.address}@").split("/")[0]
        root = root_of(source.address, revision)
    files = [ListedFile(_relative(entry.path, root), entry.num_bytes, _version(entry)) for entry in found]
    asked = source.revision if is_hub(source.address) else None
    return SourceListing(source.address, revision, source.files, sorted(files, key=lambda file: file.path), asked)


def _version(entry: InputPath) -> str | None:
    """Return what tells a changed file from the listed one: a hash, or on a disk the time of its last change.

    A disk has no hashes, and reading whole files for them would take each task of an array hours.
    """
    return (entry.version or None) if is_remote(entry.path) else f"{CHANGED_AT}{os.stat(entry.path).st_mtime_ns}"


def installed_files(source: Source) -> dict[str, list[bytes]]:
    """Return the lines of each file of a source that is the text of the installed packages."""
    return {
        file: installed_lines(is_prose=file == "prose.jsonl", most_bytes=source.most_bytes)
        for file in sorted(set(source.files))
    }


def _relative(path: str, root: str) -> str:
    """Return a path below the root of its source. A path of the disk can begin in another way, as in ./corpus."""
    if path.startswith(root):
        return path.removeprefix(root)
    return str(Path(path).relative_to(Path(root)))


def check_present(name: str, source: Source, listed: SourceListing, now: SourceListing, where: str) -> None:
    """Raise DataError if a chosen file of a stored listing is missing now or differs. Files that are new are not read."""
    present = {file.path: file for file in now.files or []}
    advice = "bring it back, or list the sources again with `ledom corpus pin RECIPE`"
    for file in listed.chosen(source) or []:
        found = present.get(file.path)
        if found is None:
            raise DataError(
                f"sources.{name}: {file.path} ({file.num_bytes:,} bytes in {where}) is not in {source.address} any more; {advice}"
            )
        if found.num_bytes != file.num_bytes:
            raise DataError(
                f"sources.{name}: {file.path} has {found.num_bytes:,} bytes, {where} has {file.num_bytes:,}; {advice}"
            )
        if found.blob_id and file.blob_id and found.blob_id != file.blob_id:
            if file.blob_id.startswith(CHANGED_AT):
                raise DataError(
                    f"sources.{name}: {file.path} was changed after {where} was made, at the same size ({found.blob_id}, listed"
                    f" {file.blob_id}); {advice}, which is right too if its time alone changed"
                )
            raise DataError(f"sources.{name}: {file.path} has the hash {found.blob_id}, {where} has {file.blob_id}; {advice}")


def write_listing(listing: Listing, path: str | Path, option: str) -> None:
    """Write a listing: a line for each file."""
    with output_file_lock(path, option):
        write_file(path, listing_text(listing))


def listing_text(listing: Listing) -> str:
    """Return a listing as JSON with a line for each file."""
    parts = []
    for name, source in listing.sources.items():
        head: dict[str, Any] = {"address": source.address, "revision": source.revision, "patterns": source.patterns}
        head |= {key: value for key in ("asked", "most_bytes") if (value := getattr(source, key)) is not None}
        text = f"{json.dumps(name)}: {json.dumps(head)[:-1]}, " + '"files": '
        if source.files is None:
            parts.append(f"{text}null}}")
            continue
        lines = [json.dumps([file.path, file.num_bytes, file.blob_id], ensure_ascii=False) for file in source.files]
        parts.append(text + "[\n" + ",\n".join(lines) + "\n]}")
    whole = {"format_version": FORMAT_VERSION, "made_at": listing.made_at, "package_version": __version__}
    return f'{json.dumps(whole)[:-1]}, "sources": {{\n' + ",\n".join(parts) + "\n}}\n"


def read_listing(path: str | Path) -> Listing:
    """Return a stored listing. Raise UsageError if the file is missing, DataError if it is damaged."""
    try:
        stored: dict[str, Any] = json.loads(Path(path).read_bytes())
        if stored["format_version"] != FORMAT_VERSION:
            raise DataError(
                f"{path} has format version {stored['format_version']}, this package reads {FORMAT_VERSION}; make it again with"
                " `ledom corpus plan RECIPE --write-listing FILE`"
            )
        return Listing({str(name): _source(values) for name, values in stored["sources"].items()}, str(stored["made_at"]))
    except FileNotFoundError as error:
        raise UsageError(
            f"the listing {path} does not exist; make it with `ledom corpus plan RECIPE --write-listing {path}`"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{path} is not a listing of this package, or it is damaged ({type(error).__name__}: {error}); make it again with"
            " `ledom corpus plan RECIPE --write-listing FILE`"
        ) from error


def _source(values: dict[str, Any]) -> SourceListing:
    rows = values["files"]
    files = None if rows is None else [ListedFile(str(path), int(size), blob) for path, size, blob in rows]
    return SourceListing(
        str(values["address"]),
        values["revision"],
        list(values["patterns"]),
        files,
        values.get("asked"),
        values.get("most_bytes"),
    )

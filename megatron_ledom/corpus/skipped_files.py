"""Files of a source that a corpus does not have, and why: not chosen by `sample` or `most_bytes`, or of a kind that is not read."""

from collections.abc import Sequence
from pathlib import Path

from megatron_ledom.corpus.addresses import INSTALLED, root_of
from megatron_ledom.corpus.listing import SourceListing, list_source, lock_path, read_listing
from megatron_ledom.corpus.recipe import Recipe
from megatron_ledom.data.readers.input_files import find_inputs
from megatron_ledom.data.readers.remote import is_remote
from megatron_ledom.data.shards.shard import ShardManifest

MOST_NAMES = 10
"""Names of files that are given for one reason; the listing beside the recipe has all."""
Skipped = tuple[str, int | None, list[str]]
"""Reason, number of files (None: unknown), names of the first ones."""


def files_skipped(recipe: Recipe, name: str, recipe_path: str, manifests: Sequence[ShardManifest]) -> list[Skipped]:
    """Return the files of a source that were skipped, by reason."""
    return [*_not_chosen(recipe, name, recipe_path), *_skipped(recipe, name, manifests)]


def _not_chosen(recipe: Recipe, name: str, recipe_path: str) -> list[Skipped]:
    source = recipe.sources[name]
    set_keys = [f"{key}={value}" for key in ("sample", "most_bytes") if (value := getattr(source, key)) is not None]
    if not set_keys:
        return []
    reason = f"not chosen by {', '.join(set_keys)}"
    if source.address == INSTALLED:
        return [(f"text beyond {', '.join(set_keys)}", None, [])]
    listed = _listing(recipe, name, recipe_path)
    if listed is None or listed.files is None:
        return [(f"{reason}; not counted, because the recipe is not pinned", None, [])]
    chosen = {file.path for file in listed.chosen(source) or []}
    others = [file.path.removeprefix("./") for file in listed.files if file.path not in chosen]
    return [(reason, len(others), others[:MOST_NAMES])] if others else []


def _listing(recipe: Recipe, name: str, recipe_path: str) -> SourceListing | None:
    """Return the listing beside the recipe, else that of the disk now; None for a place that would have to be asked."""
    source, path = recipe.sources[name], lock_path(recipe_path)
    if path.exists() and name in (listing := read_listing(path)).sources:
        return listing.of(name, source, str(path))
    if is_remote(source.address) or not Path(source.address).is_dir():
        return None
    return list_source(name, source, None)


def _skipped(recipe: Recipe, name: str, manifests: Sequence[ShardManifest]) -> list[Skipped]:
    """Return the inputs that are not read: by the manifests (each task names all), and by a listing of the disk now.

    A build from a listing gives preprocessing the files to read only, so that its manifests name none of the others.
    """
    source = recipe.sources[name]
    numbers: dict[tuple[str, str], int] = {}
    for manifest in manifests:
        for entry in manifest.skipped_inputs:
            numbers[str(entry["reason"]), str(entry["path"])] = int(entry.get("num_files", 1))
    if not numbers and source.address != INSTALLED and not is_remote(source.address) and Path(source.address).is_dir():
        root = root_of(source.address, None)
        for skipped in find_inputs([root + pattern for pattern in source.files])[1]:
            numbers[skipped.reason, skipped.path] = skipped.num_files
    found: list[Skipped] = []
    for reason in sorted({reason for reason, _ in numbers}):
        paths = sorted(path for other, path in numbers if other == reason)
        found.append((reason, sum(numbers[reason, path] for path in paths), paths[:MOST_NAMES]))
    return found

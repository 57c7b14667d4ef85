"""Pin a corpus: look up the commits of hub repositories, list the files of every source, and store both beside the recipe."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_ledom.corpus.addresses import is_commit, is_hub
from megatron_ledom.corpus.build import chosen_names
from megatron_ledom.corpus.listing import Listing, list_sources, lock_path, read_listing, write_listing
from megatron_ledom.corpus.recipe import Recipe, load_recipe
from megatron_ledom.errors import LedomError

logger = logging.getLogger(__name__)


@dataclass(kw_only=True, slots=True)
class PinSettings:
    """Options of `ledom corpus pin`."""

    recipe: str
    overrides: Sequence[str] = ()
    source: Sequence[str] = ()
    """Sources to pin again; the others keep what is stored. Default: all."""


def pin(settings: PinSettings) -> Path:
    """Write RECIPE.lock.json and return its path."""
    recipe = load_recipe(settings.recipe, settings.overrides)
    names, path = chosen_names(recipe, settings.source), lock_path(settings.recipe)
    kept = read_listing(path).sources if settings.source and path.exists() else {}
    listing = list_sources(recipe, names, {name: commit_of(recipe, name) for name in names})
    together = {**kept, **listing.sources}
    write_listing(Listing({name: together[name] for name in recipe.sources if name in together}), path, "RECIPE")
    for name, found in listing.sources.items():
        files = found.files or []
        size = sum(file.num_bytes for file in files)
        logger.info(
            "%s: %s files, %s bytes%s",
            name,
            f"{len(files):,}",
            f"{size:,}",
            f", commit {found.revision}" * bool(found.revision),
        )
    logger.info("%s: keep it beside the recipe; plan and build read exactly these files", path)
    return path


def commit_of(recipe: Recipe, name: str) -> str | None:
    """Return the commit of a hub source: the one of the recipe, or the present one of its branch. None for other sources."""
    source = recipe.sources[name]
    if not is_hub(source.address) or is_commit(source.revision):
        return source.revision
    from megatron_ledom.data.readers.hub import Commits

    try:
        pinned = Commits().pinned(f"{source.address}@{source.revision}" if source.revision else source.address)
    except LedomError as error:
        raise type(error)(f"sources.{name}: {error}") from error
    return pinned.removeprefix(f"{source.address}@")

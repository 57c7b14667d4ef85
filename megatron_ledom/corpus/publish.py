"""Publish a corpus: its shards, card, recipe and listing, into a new folder or a dataset of the hub. It asks before it writes."""

import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_ledom.corpus.addresses import HUB, REPOSITORY, repository_of
from megatron_ledom.corpus.blend import built_shards
from megatron_ledom.corpus.card import CARD_NAME, card_text, read_reports
from megatron_ledom.corpus.listing import lock_path
from megatron_ledom.corpus.recipe import Recipe, load_recipe
from megatron_ledom.data.readers.remote import may_succeed_later
from megatron_ledom.data.shards.shard import SUFFIXES
from megatron_ledom.errors import TransientError, UsageError
from megatron_ledom.storage.folders import new_folder

logger = logging.getLogger(__name__)
CONTAMINATION = ".contamination"


@dataclass(kw_only=True, slots=True)
class PublishSettings:
    """Options of `ledom corpus publish`."""

    recipe: str
    to: str
    """A new folder, or hf://datasets/OWNER/NAME."""
    overrides: Sequence[str] = ()
    report: Sequence[str] = ()
    yes: bool = False
    """Write without asking."""
    public: bool = False
    """Make a new repository of the hub public. Default: private."""


def publish(settings: PublishSettings) -> list[str]:
    """Publish after a yes, and return the names of the files. Raise UsageError without one."""
    recipe = load_recipe(settings.recipe, settings.overrides)
    if settings.to.startswith("hf://") and REPOSITORY.fullmatch(settings.to) is None:
        raise UsageError(f"--to {settings.to} is not a dataset of the hub; expected hf://datasets/OWNER/NAME, or a folder")
    if not settings.to.startswith("hf://") and os.path.lexists(settings.to):
        raise UsageError(f"--to {settings.to} exists already; name a new folder")
    shards = built_shards(recipe)
    files = {
        Path(prefix + suffix).name: Path(prefix + suffix)
        for manifests in shards.values()
        for prefix in manifests
        for suffix in (*SUFFIXES, CONTAMINATION)
        if suffix in SUFFIXES or Path(prefix + suffix).exists()
    }
    files["recipe.yaml"] = Path(settings.recipe)
    if lock_path(settings.recipe).exists():
        files["recipe.lock.json"] = lock_path(settings.recipe)
    card = card_text(recipe, settings.recipe, shards, read_reports(recipe, settings.report))
    _ask(recipe, settings, files)
    if settings.to.startswith(HUB):
        _to_hub(settings, files, card)
    else:
        _to_folder(settings.to, files, card)
    logger.info("%s has %d files", settings.to, len(files) + 1)
    return [CARD_NAME, *files]


def _ask(recipe: Recipe, settings: PublishSettings, files: dict[str, Path]) -> None:
    """Show what would be written, with the terms of every source, and raise UsageError unless the answer is yes."""
    size = sum(path.stat().st_size for path in files.values())
    access = "" if not settings.to.startswith("hf://") else ", public" if settings.public else ", private if it is new"
    lines = [
        f"{recipe.name}: {len(files) + 1} files, {size:,} bytes, to {settings.to}{access}",
        "Whoever gets these ids can decode them to text, so the terms of every source apply:",
        *(f"  {name}: {source.licence}. {source.terms}" for name, source in recipe.sources.items()),
    ]
    print("\n".join(lines), flush=True)
    if settings.yes:
        return
    if not sys.stdin.isatty():
        raise UsageError("nothing was written: there is no terminal to ask on; read the terms above, then give --yes")
    if input("Write it? [y/N] ").strip().lower() not in ("y", "yes"):
        raise UsageError("nothing was written, as you answered")


def _to_folder(folder: str, files: dict[str, Path], card: str) -> None:
    with new_folder(folder, option="--to") as part:
        for name, path in files.items():
            shutil.copyfile(path, Path(part, name))
        Path(part, CARD_NAME).write_text(card, encoding="utf-8")


def _to_hub(settings: PublishSettings, files: dict[str, Path], card: str) -> None:
    """Make the repository if it is new and upload everything in one commit, so that no revision has a part of the corpus."""
    from huggingface_hub import CommitOperationAdd, HfApi

    api, name = HfApi(), repository_of(settings.to)
    with tempfile.TemporaryDirectory() as scratch:
        readme = Path(scratch, CARD_NAME)
        readme.write_text(card, encoding="utf-8")
        operations = [
            CommitOperationAdd(path_in_repo=inside, path_or_fileobj=str(path))
            for inside, path in {CARD_NAME: readme, **files}.items()
        ]
        try:
            api.create_repo(name, repo_type="dataset", private=not settings.public, exist_ok=True)
            done = api.create_commit(name, operations, commit_message=f"Add {len(operations)} files", repo_type="dataset")
        except Exception as error:  # of the client: no network, no right to write, no such owner
            reason = " ".join(str(error).split())[:300]
            kind = TransientError if may_succeed_later(error) else UsageError
            raise kind(
                f"the hub did not take {settings.to} ({type(error).__name__}: {reason}); check the name, the network, and that the"
                " token of `hf auth login` may write there"
            ) from error
    logger.info("%s is at commit %s", settings.to, done.oid)

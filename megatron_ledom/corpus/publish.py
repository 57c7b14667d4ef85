"""Publish a corpus: its shards, card, recipe and listing, into a new folder or a dataset of the hub. It asks before it writes."""

import hashlib
import logging
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_ledom.corpus.addresses import HUB, REPOSITORY, is_hub, repository_of
from megatron_ledom.corpus.blend import built_shards
from megatron_ledom.corpus.build import pinned_revision
from megatron_ledom.corpus.card import CARD_NAME, card_text, read_reports, recipe_text
from megatron_ledom.corpus.licences import LICENCE_FILE, licence_text
from megatron_ledom.corpus.listing import lock_path, read_listing
from megatron_ledom.corpus.recipe import Recipe, load_recipe
from megatron_ledom.data.readers.remote import may_succeed_later
from megatron_ledom.data.shards.shard import SUFFIXES, ShardManifest
from megatron_ledom.errors import DataError, LedomError, MismatchError, TransientError, UsageError
from megatron_ledom.storage.folders import new_folder
from megatron_ledom.storage.locks import output_folder_lock

logger = logging.getLogger(__name__)
CONTAMINATION = ".contamination"
COPY_BYTES = 1 << 20
KEPT_ON_THE_HUB = ".gitattributes"
"""File that the hub makes in every repository."""


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
    """Make a new repository of the hub public, or write to one that is. Default: private."""
    replace: bool = False
    """Replace all files of a repository of the hub that has some."""


@dataclass(frozen=True, slots=True)
class PublishedFile:
    """A file to publish: a path, or a text that is made now. sha256: the hash that the bytes must have; None if it is not recorded."""

    path: Path | None = None
    text: str = ""
    sha256: str | None = None

    @property
    def num_bytes(self) -> int:
        """Size of the file."""
        return self.path.stat().st_size if self.path is not None else len(self.text.encode())

    def check(self, found: str) -> None:
        """Raise DataError if the bytes have another hash."""
        if self.sha256 is not None and found != self.sha256:
            raise DataError(
                f"{self.path} has the SHA-256 {found}, its manifest has {self.sha256}: the shard is damaged, and nothing was published;"
                " make it again with `ledom corpus build RECIPE --source NAME --overwrite`"
            )


@dataclass(frozen=True, slots=True)
class HubRepository:
    """A repository of the hub that exists."""

    is_public: bool
    commit: str | None
    files: list[str]


def publish(settings: PublishSettings) -> list[str]:
    """Publish after a yes, and return the names of the files. Raise UsageError without one.

    Nothing else writes the output in the meantime, and every shard is compared with the hashes of its manifest.
    """
    recipe = load_recipe(settings.recipe, settings.overrides)
    if settings.to.startswith("hf://") and REPOSITORY.fullmatch(settings.to) is None:
        raise UsageError(f"--to {settings.to} is not a dataset of the hub; expected hf://datasets/OWNER/NAME, or a folder")
    if not settings.to.startswith("hf://") and os.path.lexists(settings.to):
        raise UsageError(f"--to {settings.to} exists already; name a new folder")
    if not Path(recipe.output).is_dir():
        built_shards(recipe)  # says what is missing, and makes no folder
    with output_folder_lock(recipe.output, "output"):
        files = _files(settings, recipe)
        found = _look_up(settings) if settings.to.startswith(HUB) else None
        _ask(recipe, settings, files, found)
        if settings.to.startswith(HUB):
            _to_hub(settings, files, found)
        else:
            _to_folder(settings.to, files)
    logger.info("%s has %d files", settings.to, len(files))
    return list(files)


def _files(settings: PublishSettings, recipe: Recipe) -> dict[str, PublishedFile]:
    """Return the files by name: the card, licences, shards, the recipe as it was built, and its listing."""
    shards = built_shards(recipe)
    _check_listing(settings, recipe, shards)
    card = card_text(recipe, settings.recipe, shards, read_reports(recipe, settings.report))
    files = {CARD_NAME: PublishedFile(text=card), LICENCE_FILE: PublishedFile(text=licence_text(recipe))}
    for manifests in shards.values():
        for prefix, manifest in manifests.items():
            hashes = {".bin": manifest.bin_sha256, ".idx": manifest.idx_sha256}
            for suffix in (*SUFFIXES, CONTAMINATION):
                path = Path(prefix + suffix)
                if suffix in SUFFIXES or path.exists():
                    files[path.name] = PublishedFile(path, sha256=hashes.get(suffix))
    files["recipe.yaml"] = PublishedFile(text=recipe_text(recipe))
    if lock_path(settings.recipe).exists():
        files["recipe.lock.json"] = PublishedFile(lock_path(settings.recipe))
    return files


def _check_listing(settings: PublishSettings, recipe: Recipe, shards: Mapping[str, Mapping[str, ShardManifest]]) -> None:
    """Raise MismatchError if the listing beside the recipe has another commit than the shards of a source were built from."""
    path = lock_path(settings.recipe)
    if not path.exists():
        return
    listing = read_listing(path)
    for name, source in recipe.sources.items():
        if not is_hub(source.address):
            continue
        now = pinned_revision(name, source, listing.of(name, source, str(path)))
        for prefix, manifest in shards[name].items():
            if (then := manifest.source.get("revision")) != now:
                raise MismatchError(
                    f"{prefix} was built from commit {then} of {source.address}, {path} has {now}; build it again with --overwrite, or"
                    " bring the listing back that it was built with"
                )


def _look_up(settings: PublishSettings) -> HubRepository | None:
    """Return the repository as it is now, None if it is new. Raise UsageError if it must not be written to without an option."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        info = HfApi().repo_info(repository_of(settings.to), repo_type="dataset")
    except RepositoryNotFoundError:
        return None
    except Exception as error:  # of the client: no network, an expired token
        raise _refused(settings, error) from error
    files = [one.rfilename for one in info.siblings or [] if one.rfilename != KEPT_ON_THE_HUB]
    found = HubRepository(not info.private, info.sha, sorted(files))
    if found.is_public and not settings.public:
        raise UsageError(
            f"--to {settings.to} exists and is public, so everyone could read the text of the sources; make it private on the hub, name"
            " another repository, or give --public"
        )
    if found.files and not settings.replace:
        raise UsageError(
            f"--to {settings.to} has {len(found.files):,} files already ({', '.join(found.files[:3])}, ...); name a new repository, or"
            " give --replace to remove them in the same commit"
        )
    return found


def _ask(recipe: Recipe, settings: PublishSettings, files: Mapping[str, PublishedFile], found: HubRepository | None) -> None:
    """Show what would be written, with the terms of every source, and raise UsageError unless the answer is yes."""
    size = sum(file.num_bytes for file in files.values())
    access, lost = "", []
    if settings.to.startswith(HUB):
        is_public = settings.public if found is None else found.is_public
        access = f", {'public' if is_public else 'private'}, {'a new repository' if found is None else 'which exists'}"
        lost = sorted(set(found.files if found is not None else ()) - set(files))
    lines = [
        f"{recipe.name}: {len(files)} files, {size:,} bytes, to {settings.to}{access}",
        *([f"{len(lost):,} files there are removed: {', '.join(lost[:20])}" + ", ..." * (len(lost) > 20)] if lost else []),
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


def _to_folder(folder: str, files: Mapping[str, PublishedFile]) -> None:
    with new_folder(folder, option="--to") as part:
        for name, file in files.items():
            if file.path is None:
                Path(part, name).write_text(file.text, encoding="utf-8")
                continue
            digest = hashlib.sha256()
            with file.path.open("rb") as source, Path(part, name).open("wb") as target:
                while block := source.read(COPY_BYTES):
                    target.write(block)
                    digest.update(block)
            file.check(digest.hexdigest())


def _to_hub(settings: PublishSettings, files: Mapping[str, PublishedFile], found: HubRepository | None) -> None:
    """Make the repository if it is new and upload everything in one commit, so that no revision has a part of the corpus."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api, name = HfApi(), repository_of(settings.to)
    with tempfile.TemporaryDirectory() as scratch:
        operations: list[CommitOperationAdd | CommitOperationDelete] = []
        for inside, file in files.items():
            path = file.path or Path(scratch, inside)
            if file.path is None:
                path.write_text(file.text, encoding="utf-8")
            added = CommitOperationAdd(path_in_repo=inside, path_or_fileobj=str(path))
            file.check(added.upload_info.sha256.hex())  # by this hash the hub takes the file
            operations.append(added)
        message = f"Add {len(operations)} files"
        if found is not None:
            operations += [CommitOperationDelete(path_in_repo=old) for old in found.files if old not in files]
        try:
            if found is None:
                api.create_repo(name, repo_type="dataset", private=not settings.public, exist_ok=False)
            done = api.create_commit(
                name,
                operations,
                commit_message=message,
                repo_type="dataset",
                parent_commit=found.commit if found is not None else None,  # refused if someone else commits in the meantime
            )
        except Exception as error:  # of the client: no network, no right to write, no such owner
            raise _refused(settings, error) from error
    logger.info("%s is at commit %s", settings.to, done.oid)


def _refused(settings: PublishSettings, error: Exception) -> LedomError:
    reason = " ".join(str(error).split())[:300]
    kind = TransientError if may_succeed_later(error) else UsageError
    return kind(
        f"the hub did not take {settings.to} ({type(error).__name__}: {reason}); check the name, the network, and that the"
        " token of `hf auth login` may write there"
    )

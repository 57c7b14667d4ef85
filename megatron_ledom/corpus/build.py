"""Build the shards of a corpus: `ledom preprocess-data` for each source, with the settings of the recipe.

A killed build resumes, because preprocessing does: the same command keeps finished shards and finished parts of the others. Two
processes never write the same source, and a build of all sources excludes every other build of the same output folder.
"""

import contextlib
import json
import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ledom.contamination.search import Decontamination
from megatron_ledom.contamination.settings import SearchSettings
from megatron_ledom.corpus.addresses import INSTALLED, is_commit, is_hub, root_of
from megatron_ledom.corpus.copies import copy_path, problem_of_copy
from megatron_ledom.corpus.listing import (
    Listing,
    SourceListing,
    check_present,
    installed_files,
    list_source,
    lock_path,
    read_listing,
)
from megatron_ledom.corpus.messages import with_keys
from megatron_ledom.corpus.recipe import Recipe, Source, load_recipe
from megatron_ledom.data.preprocess.pipeline import preprocess
from megatron_ledom.data.preprocess.task import PreprocessSettings
from megatron_ledom.data.readers.remote import is_remote
from megatron_ledom.data.readers.streams import MAX_RECORD_BYTES
from megatron_ledom.data.shards.prefixes import task_prefix
from megatron_ledom.data.shards.shard import ShardManifest, check_shard
from megatron_ledom.errors import ConfigError, DataError, LedomError, TransientError, UsageError, VerificationError, may_pass
from megatron_ledom.evaluation.known_items import files_of_items, known_decontamination
from megatron_ledom.platform.slurm import array_task_id
from megatron_ledom.storage.files import write_file
from megatron_ledom.storage.locks import LOCK_SUFFIX, Lock, output_folder_lock
from megatron_ledom.tokenizers.corpus_tokenizer import load_tokenizer

logger = logging.getLogger(__name__)
TEXT_ENDING = ".text"
"""OUTPUT/NAME.text has the text of a source that is collected from the installed packages."""

INDEX_FOLDER = ".evaluation_items"
"""OUTPUT/.evaluation_items has the index of the items of `filters.decontaminate`."""


@dataclass(kw_only=True, slots=True)
class BuildSettings:
    """Options of `ledom corpus build`."""

    recipe: str
    overrides: Sequence[str] = ()
    source: Sequence[str] = ()
    """Names of the sources to build; default: all."""
    listing: str | None = None
    """Stored listing; default: RECIPE.lock.json if it exists."""
    copies: str | None = None
    """Folder in which `ledom corpus fetch` put copies; they are read instead of the sources."""
    workers: int | None = None
    task_id: int | None = None
    """Task of the one source to build; default: that of the SLURM array, else all tasks in turn."""
    hash_only: bool = False
    """Only the first pass of `deduplicate` for a source of several tasks."""
    overwrite: bool = False


def build(settings: BuildSettings) -> dict[str, list[ShardManifest]]:
    """Build the shards and return their manifests by source. Raise VerificationError if a source failed; the others are built."""
    recipe = load_recipe(settings.recipe, settings.overrides)
    names = chosen_names(recipe, settings.source)
    listing, where = stored_listing(settings.recipe, settings.listing)
    tasks = {name: _tasks(name, recipe.sources[name], settings, len(names)) for name in names}
    _check_output(recipe)
    for name in names:
        files_of_items(recipe.sources[name].filters.decontaminate or ())  # a missing one is an error before any work
    load_tokenizer(recipe.tokenizer, recipe.eod_token)  # one error about the tokenizer, not one for each source
    made: dict[str, list[ShardManifest]] = {}
    failed: dict[str, LedomError] = {}
    is_part = len(names) == 1 and (bool(settings.source) or len(tasks[names[0]]) < recipe.sources[names[0]].tasks)
    with _output_lock(recipe.output, is_shared=is_part):
        for name in names:
            job = SourceBuild(recipe, name, settings, listing, where)
            try:
                with _named(name):
                    made[name] = job.run(tasks[name])
            except LedomError as error:
                if len(names) == 1:
                    raise
                logger.error("%s", error)
                failed[name] = error
    if failed:
        first = next(iter(failed.values()))
        kind = TransientError if all(isinstance(error, TransientError) for error in failed.values()) else VerificationError
        others = f"; {', '.join(made)} are built" if made else ""
        raise kind(
            f"{len(failed)} of {len(names)} sources failed ({', '.join(failed)}){others}. The first: {first}. Repair them, then run"
            " the same command again: it keeps what is finished"
        )
    return made


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    """Raise errors as LedomErrors that name the source and the keys of the recipe."""
    try:
        yield
    except LedomError as error:
        error.args = (with_keys(name, str(error)), *error.args[1:])
        raise
    except OSError as error:
        is_missing = isinstance(error, FileNotFoundError | NotADirectoryError | FileExistsError | IsADirectoryError)
        kind = TransientError if may_pass(error) and not is_missing else DataError
        place = f"{error.filename}: " if error.filename is not None else ""
        raise kind(
            f"sources.{name}: {place}{error.strerror or error}; check that it exists and that you may use it, then run the same"
            " command again"
        ) from error


def chosen_names(recipe: Recipe, wanted: Sequence[str]) -> list[str]:
    """Return the names of the wanted sources, by default all. Raise UsageError for a name that is not in the recipe."""
    for name in wanted:
        if name not in recipe.sources:
            raise UsageError(f"--source {name} is not in the recipe; it has {', '.join(recipe.sources)}")
    return [name for name in recipe.sources if name in wanted or not wanted]


def stored_listing(recipe_path: str, given: str | None) -> tuple[Listing | None, str]:
    """Return the listing to use and its path: the given one, else that beside the recipe; None if there is none."""
    if given is not None:
        return read_listing(given), given
    beside = lock_path(recipe_path)
    return (read_listing(beside), str(beside)) if beside.exists() else (None, str(beside))


def pinned_revision(name: str, source: Source, listed: SourceListing | None) -> str | None:
    """Return the commit to read a hub source at; None for other sources. Raise ConfigError if none is known."""
    if not is_hub(source.address):
        return None
    revision = source.revision if is_commit(source.revision) else listed.revision if listed is not None else None
    if not is_commit(revision):
        raise ConfigError(
            f"sources.{name}.revision is {source.revision or 'null'}, not a commit of 40 hexadecimal digits; a repository can"
            " change, so a build reads a fixed commit only: run `ledom corpus pin RECIPE`, which looks the commits up and"
            " stores them beside the recipe"
        )
    return revision


def _tasks(name: str, source: Source, settings: BuildSettings, num_sources: int) -> list[int]:
    """Return the numbers of the tasks of a source to run: all, the given one, or that of the SLURM array."""
    number = settings.task_id
    option = f"--task-id {number}"
    if number is None and (number := array_task_id(os.environ)) is not None:
        option = f"SLURM_ARRAY_TASK_ID={number}"
    if number is None:
        return list(range(source.tasks))
    if num_sources > 1:
        raise UsageError(f"{option} is a task of one source; name it with --source NAME")
    if not 0 <= number < source.tasks:
        raise UsageError(f"{option} is not a task of {name}: sources.{name}.tasks={source.tasks}; use 0 to {source.tasks - 1}")
    return [number]


def _check_output(recipe: Recipe) -> None:
    """Raise UsageError if the output has shards of another recipe: `make` would replace its card and blend."""
    for path in sorted(Path(recipe.output).glob("*.json")):
        try:
            source = json.loads(path.read_bytes()).get("source")
        except (OSError, ValueError, AttributeError):
            continue  # not the manifest of a shard
        other = source.get("recipe") if isinstance(source, dict) else None
        if other not in (None, recipe.name):
            raise UsageError(
                f"output {recipe.output} has {path.name} of the recipe {other}, this one is {recipe.name}; name another output, or"
                " remove those shards"
            )


@contextlib.contextmanager
def _output_lock(output: str, *, is_shared: bool) -> Iterator[None]:
    """Lock the output folder: exclusively for a build of all sources, shared for builds of single ones."""
    if not is_shared:
        with output_folder_lock(output, "output"):
            yield
        return
    lock = Lock(os.path.join(os.path.realpath(output), LOCK_SUFFIX))
    try:
        os.makedirs(output, exist_ok=True)
        is_free = lock.take(is_shared=True)
    except OSError as error:
        raise UsageError(
            f"output {output} cannot be made or locked ({error.strerror}); name a folder that you may write to"
        ) from error
    if not is_free:
        raise UsageError(
            f"output {output} is being written by {lock.holder()}, which builds all sources; wait until it ends, stop it, or name"
            " another output"
        )
    try:
        yield
    finally:
        lock.release(keep_file=True)  # another task may hold it


class SourceBuild:
    """The build of one source."""

    def __init__(self, recipe: Recipe, name: str, settings: BuildSettings, listing: Listing | None, where: str) -> None:
        self.recipe, self.name, self.settings, self.where = recipe, name, settings, where
        self.source = recipe.sources[name]
        self._listing = listing

    def run(self, tasks: Sequence[int]) -> list[ShardManifest]:
        """Build the tasks and return their manifests."""
        revision = pinned_revision(self.name, self.source, self._listed())
        inputs = self.inputs(tasks)
        filters = self.recipe.filters_of(self.source)
        if self.settings.hash_only and not filters.deduplicate:
            raise UsageError(f"--hash-only needs sources.{self.name}.filters.deduplicate=true")
        needs_hashes = bool(filters.deduplicate) and self.source.tasks > 1 and len(tasks) == self.source.tasks
        if needs_hashes or self.settings.hash_only:
            for number in tasks:
                preprocess(self._preprocess_settings(inputs, revision, number, hash_only=True))
        if self.settings.hash_only:
            return []
        made = [preprocess(self._preprocess_settings(inputs, revision, number)) for number in tasks]
        self._check_stored()
        return [manifest for manifest in made if manifest is not None]

    def _check_stored(self) -> None:
        """Raise VerificationError if all shards of the source are there and none has a document. A single shard can be empty."""
        prefixes = prefixes_of(self.recipe, self.name)
        if not all(Path(f"{prefix}.json").exists() for prefix in prefixes):
            return  # the task that ends last sees all of them
        manifests = [check_shard(prefix) for prefix in prefixes]
        if any(manifest.num_documents for manifest in manifests):
            return
        skipped: Counter[str] = Counter()
        for manifest in manifests:
            skipped.update(manifest.skipped)
        reasons = ", ".join(f"{number:,} {reason}" for reason, number in sorted(skipped.items())) or "none"
        raise VerificationError(
            f"sources.{self.name} has no document in any of its {len(prefixes)} shards (skipped: {reasons}); check"
            f" sources.{self.name}.text_key={self.source.text_key!r} and its filters, then build it with --overwrite"
        )

    def _listed(self) -> SourceListing | None:
        return self._listing.of(self.name, self.source, self.where) if self._listing is not None else None

    def inputs(self, tasks: Sequence[int] | None = None) -> list[str]:
        """Return the path of every file to read, after a comparison with the stored listing.

        tasks: those that will run, default all. Of copies each task reads its share to compare the hashes, and all tasks read all.
        """
        source, name, listed = self.source, self.name, self._listed()
        revision = pinned_revision(name, source, listed)
        if source.address == INSTALLED:  # fetch copies none of it
            return self._collected()
        if self.settings.copies is not None:
            return self._copies(listed, range(source.tasks) if tasks is None else tasks)
        root = root_of(source.address, revision)
        if is_hub(source.address) and source.sample is None and source.most_bytes is None:
            return [root + pattern for pattern in source.files]  # one request for each folder, not for each file
        now = list_source(name, source, revision)
        if listed is not None and listed.files is not None:
            check_present(name, source, listed, now, self.where)
        files = (listed if listed is not None and listed.files is not None else now).chosen(source) or []
        return [_exact(root + file.path) for file in files]

    def _copies(self, listed: SourceListing | None, tasks: Sequence[int]) -> list[str]:
        folder, name = self.settings.copies or "", self.name
        if listed is None or (files := listed.chosen(self.source)) is None:
            raise UsageError(
                f"--copies needs the listing that they were fetched by, {self.where}; run `ledom corpus pin RECIPE`"
            )
        for number, file in enumerate(files):
            target = copy_path(folder, name, file.path)
            if number % self.source.tasks in tasks:
                problem = problem_of_copy(folder, name, file, file.blob_id)
            else:  # another task reads it
                is_whole = target.is_file() and target.stat().st_size == file.num_bytes
                problem = None if is_whole else f"is missing or does not have {file.num_bytes:,} bytes"
            if problem is not None:
                raise UsageError(f"{target} {problem} ({self.where}); run `ledom corpus fetch` again")
        return [str(copy_path(folder, name, file.path)) for file in files]

    def _collected(self) -> list[str]:
        """Write the text of the installed packages, unless the same is there, and return the paths."""
        folder = Path(self.recipe.output, self.name + TEXT_ENDING)
        paths = []
        with output_folder_lock(folder, "output"):
            for file, lines in installed_files(self.source).items():
                path, content = folder / file, b"".join(lines)
                if not path.is_file() or path.read_bytes() != content:
                    write_file(path, content)
                paths.append(str(path))
        return paths

    def _preprocess_settings(
        self, inputs: list[str], revision: str | None, task_id: int, *, hash_only: bool = False
    ) -> PreprocessSettings:
        source, recipe, settings = self.source, self.recipe, self.settings
        filters = recipe.filters_of(source)
        return PreprocessSettings(
            input=inputs,
            tokenizer=recipe.tokenizer,
            output_prefix=output_prefix(recipe, self.name),
            direction=recipe.direction,
            text_key=source.text_key,
            text_template=source.text_template,
            workers=settings.workers,
            eod_token=recipe.eod_token,
            bos_token=recipe.bos_token,
            dtype=recipe.dtype,
            on_error=filters.on_error or "fail",
            max_record_bytes=filters.max_record_bytes or MAX_RECORD_BYTES,
            min_tokens=filters.min_tokens or 1,
            max_tokens=filters.max_tokens,
            filter=filters.filter,
            deduplicate=bool(filters.deduplicate) and not hash_only,
            hash_only=hash_only,
            decontamination=None if hash_only else self._decontamination(),
            shuffle_seed=recipe.shuffle_seed,
            source=description(recipe, self.name, revision),
            task_id=task_id,
            num_tasks=source.tasks,
            overwrite=settings.overwrite,
        )

    def _decontamination(self) -> Decontamination | None:
        """Return the search for the items of the recipe. All sources and tasks with equal settings share an index in the output."""
        filters = self.recipe.filters_of(self.source)
        if not filters.decontaminate:
            return None
        given: Mapping[str, Any] = {
            key: value for key in ("action", "match", "ngram", "threshold") if (value := getattr(filters, key)) is not None
        }
        index_folder = str(Path(self.recipe.output, INDEX_FOLDER))
        return known_decontamination(SearchSettings(**given), filters.decontaminate, index_folder)


def output_prefix(recipe: Recipe, name: str) -> str:
    """Return the prefix of the shards of a source."""
    return str(Path(recipe.output, name))


def prefixes_of(recipe: Recipe, name: str) -> list[str]:
    """Return the prefix of every shard of a source."""
    base, count = output_prefix(recipe, name), recipe.sources[name].tasks
    return [task_prefix(base, number, count) for number in range(count)] if count > 1 else [base]


def description(recipe: Recipe, name: str, revision: str | None) -> dict[str, Any]:
    """Return what the manifest of every shard of a source says of it."""
    source = recipe.sources[name]
    return {
        "recipe": recipe.name,
        "name": name,
        "address": source.address,
        "revision": revision,
        **{key: getattr(source, key) for key in ("licence", "terms", "domain", "origin", "language")},
        "settings": recipe.settings_of(source),
    }


def _exact(path: str) -> str:
    """Return the input that names exactly this file: in an object store `*`, `?` and `[` would be patterns."""
    if not is_remote(path):
        return path
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in path)

"""Plan a corpus from listings alone: what will be read, bytes, tokens, disk and core-hours. Reads no text and writes no shard."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_ledom.corpus.addresses import INSTALLED, is_commit, is_hub, root_of
from megatron_ledom.corpus.build import chosen_names, stored_listing
from megatron_ledom.corpus.listing import Listing, SourceListing, list_sources, write_listing
from megatron_ledom.corpus.recipe import ORIGINS, Recipe, Source, load_recipe
from megatron_ledom.data.readers.remote import is_remote
from megatron_ledom.data.shards.shard import choose_dtype
from megatron_ledom.tables import aligned_lines
from megatron_ledom.tokenizers.corpus_tokenizer import load_tokenizer

UNKNOWN = "unknown"
TEXT_PER_BYTE = {"zst": 2.9, "gz": 2.6, "bz2": 3.2, "xz": 3.5, "parquet": 1.8}
"""UTF-8 bytes of text per stored byte by the ending of a file; assumed, `sources.NAME.text_per_byte` replaces them."""
PLAIN_TEXT_PER_BYTE = 0.95
FAR = 2.0
"""Stated tokens beside estimated ones that a plan warns of: more than so many times as many, or as few."""
INDEX_BYTES = 20
"""Bytes of .idx per document."""


@dataclass(kw_only=True, slots=True)
class CorpusPlanSettings:
    """Options of `ledom corpus plan`."""

    recipe: str
    overrides: Sequence[str] = ()
    source: Sequence[str] = ()
    listing: str | None = None
    write_listing: str | None = None


@dataclass(frozen=True, slots=True)
class SourcePlan:
    """The plan of one source. None stands for what nobody knows before it is read."""

    name: str
    source: Source
    revision: str | None
    num_files: int | None
    num_bytes: int | None
    tokens: int | None
    """Tokens that the chosen files have, estimated from their bytes or stated by whoever published the source."""
    basis: str
    """Origin of `tokens`: `estimated`, `stated`, or empty."""
    wanted: int | None
    documents: int | None
    stated: int | None = None
    """Tokens that `expected` states for what will be read."""
    estimated: int | None = None
    """Tokens by the bytes of the listed files."""
    differences: tuple[str, ...] = ()
    """Differences between `expected` and the listing, as remarks."""
    files: tuple[str, ...] | None = None
    """Addresses of the chosen files, without a revision; None if they are unknown."""

    @property
    def epochs(self) -> float | None:
        """Passes over the source; None if its tokens are unknown."""
        return self.wanted / self.tokens if self.wanted and self.tokens else None


@dataclass(frozen=True, slots=True)
class CorpusPlan:
    """The plan of all sources."""

    recipe: Recipe
    sources: list[SourcePlan]
    where: str
    """Origin of the listing: a file, or `listed now`."""
    bytes_per_id: int = 2

    @property
    def disk_bytes(self) -> tuple[int, int]:
        """Return (bytes of all shards whose size is known, bytes of the largest one). A shard needs its size twice while it is made."""
        sizes = {one.name: self._source_bytes(one) for one in self.sources if one.tokens is not None}
        return sum(sizes.values()), max(
            (-(-size // self.recipe.sources[name].tasks) for name, size in sizes.items()), default=0
        )

    def _source_bytes(self, one: SourcePlan) -> int:
        return (one.tokens or 0) * self.bytes_per_id + (one.documents or 0) * INDEX_BYTES

    @property
    def core_hours(self) -> float:
        """Return the core-hours of the sources whose tokens are known."""
        tokens = sum(one.tokens or 0 for one in self.sources)
        return tokens / self.recipe.estimates.tokens_per_core_second / 3600


def plan_corpus(settings: CorpusPlanSettings) -> CorpusPlan:
    """Return the plan, from a stored listing if there is one, else from listing the sources now; store the listing if asked to."""
    recipe = load_recipe(settings.recipe, settings.overrides)
    names = chosen_names(recipe, settings.source)
    listing, where = stored_listing(settings.recipe, settings.listing)
    if listing is None:
        revisions = {name: recipe.sources[name].revision for name in names}
        listing, where = list_sources(recipe, names, revisions), "listed now"
    listed = {name: listing.of(name, recipe.sources[name], where) for name in names}
    if settings.write_listing is not None:
        write_listing(Listing(listed, listing.made_at), settings.write_listing, "--write-listing")
    where = where if where == "listed now" else f"{where}, made {listing.made_at}"
    return CorpusPlan(recipe, [plan_source(recipe, name, listed[name]) for name in names], where, bytes_per_id(recipe))


def plan_source(recipe: Recipe, name: str, listed: SourceListing) -> SourcePlan:
    """Return the plan of one source."""
    source = recipe.sources[name]
    files, expected = listed.chosen(source), source.expected
    num_files, num_bytes, estimated = expected.files, expected.bytes, None
    share, differences = _share_of_expected(source), _differences(name, source, listed)
    if files is not None:
        num_files, num_bytes = len(files), sum(file.num_bytes for file in files)
        everything = sum(file.num_bytes for file in listed.files or [])
        share = num_bytes / everything if everything else None
        text = sum(file.num_bytes * text_per_byte(source, file.path) for file in files)
        estimated = round(text / recipe.estimates.bytes_per_token)
    elif share != 1:
        num_files = num_bytes = None
    stated = round(expected.tokens * share) if expected.tokens is not None and share is not None else None
    tokens, basis = (stated, "stated") if stated is not None else (estimated, "estimated" if estimated is not None else "")
    if differences and estimated is not None:  # `expected` is about other files
        tokens, basis = estimated, "estimated"
    elif (ratio := _ratio(stated, estimated)) > FAR:
        differences = [f"sources.{name}: its bytes give {ratio:,.1f} times more or less tokens than expected.tokens states"]
    documents = round(expected.documents * share) if expected.documents is not None and share is not None else None
    wanted = recipe.wanted(source)
    return SourcePlan(
        name,
        source,
        listed.revision,
        num_files,
        num_bytes,
        tokens,
        basis,
        tokens if wanted is None else wanted,
        documents,
        stated,
        estimated,
        tuple(differences),
        None if files is None else tuple(_address(source, file.path) for file in files),
    )


def _differences(name: str, source: Source, listed: SourceListing) -> list[str]:
    """Return a remark for each number of `expected` that the listing has otherwise. Both are about the whole source."""
    if listed.files is None:
        return []
    expected, found = source.expected, {"files": len(listed.files), "bytes": sum(file.num_bytes for file in listed.files)}
    return [
        f"sources.{name}.expected.{key}={stated:,}, the listing has {number:,}"
        for key, number in found.items()
        if (stated := getattr(expected, key)) is not None and stated != number
    ]


def _ratio(one: int | None, other: int | None) -> float:
    """Return how many times the larger number is the smaller one, 1 if a number is unknown."""
    return 1.0 if one is None or other is None else max(one, other) / max(1, min(one, other))


def _address(source: Source, path: str) -> str:
    """Return the address of a file; on a disk it is the path with all links resolved."""
    whole = root_of(source.address, None) + path
    return whole if source.address == INSTALLED or is_remote(whole) else os.path.realpath(whole)


def _share_of_expected(source: Source) -> float | None:
    """Return the share of a source that will be read if its files are unknown; None if that cannot be said."""
    if source.most_bytes is not None:
        return min(1.0, source.most_bytes / source.expected.bytes) if source.expected.bytes else None
    return 1.0 if source.sample is None else source.sample


def text_per_byte(source: Source, path: str) -> float:
    """Return the UTF-8 bytes of text per stored byte of a file: that of the source, or an assumption by the ending."""
    if source.text_per_byte is not None:
        return source.text_per_byte
    return TEXT_PER_BYTE.get(path.rpartition(".")[2], PLAIN_TEXT_PER_BYTE)


def bytes_per_id(recipe: Recipe) -> int:
    """Return the bytes of a stored token, as shards are written: that of the recipe, else by `dtype` and the vocabulary."""
    if recipe.estimates.bytes_per_id is not None:
        return recipe.estimates.bytes_per_id
    size = recipe.tokenizer_vocab_size or 0
    if Path(recipe.tokenizer).exists():
        size = load_tokenizer(recipe.tokenizer, recipe.eod_token).vocab_size
    return choose_dtype(recipe.dtype, size).itemsize


def _size_is_known(recipe: Recipe) -> bool:
    """Return True if nothing had to be assumed for the bytes of a token."""
    known = recipe.estimates.bytes_per_id or recipe.tokenizer_vocab_size or recipe.dtype != "auto"
    return bool(known) or Path(recipe.tokenizer).exists()


def describe(plan: CorpusPlan) -> str:
    """Return the plan as text for the terminal."""
    heads = ["source", "domain", "files", "bytes", "tokens", "wanted", "share", "epochs", "origin", "licence"]
    total_wanted = sum(one.wanted or 0 for one in plan.sources)
    rows = [heads, *[_row(one, total_wanted) for one in plan.sources]]
    rows.append(
        [
            "all",
            "",
            _sum([one.num_files for one in plan.sources]),
            _sum([one.num_bytes for one in plan.sources]),
            _sum([one.tokens for one in plan.sources]),
            _sum([one.wanted for one in plan.sources]),
            "100.00%" if total_wanted else "",
            "",
            "",
            "",
        ]
    )
    run = f"tokens={plan.recipe.tokens:,}, " if plan.recipe.tokens is not None else ""
    lines = [f"{plan.recipe.name}: {len(plan.sources)} sources, {run}{plan.where}", *aligned_lines(rows, "llrrrrrrll"), ""]
    unknown = [one.name for one in plan.sources if one.tokens is None]
    at_least = f" for the others; {UNKNOWN} for {', '.join(unknown)}" if unknown else ""
    lines += _disk_lines(plan, at_least)
    lines.append(f"core-hours  {plan.core_hours:,.2f} to encode, without reading and start-up{at_least}")
    return "\n".join([*lines, *_remarks(plan)])


def _disk_lines(plan: CorpusPlan, at_least: str) -> list[str]:
    """Return the lines about the disk: the shards, and the space that is also needed while they are made."""
    disk, largest = plan.disk_bytes
    assumed = "" if _size_is_known(plan.recipe) else ", assumed for a vocabulary that is unknown here"
    lines = [
        f"disk        {_bytes(disk)} of shards{at_least}; {plan.bytes_per_id} bytes per token{assumed}",
        f"            while they are made {_bytes(largest)} more for the largest shard, if one task runs at a time, and up to"
        f" {_bytes(disk)} more if all tasks of all arrays run at once",
    ]
    if bare := [one.name for one in plan.sources if one.tokens is not None and one.documents is None]:
        lines.append(
            f"            without the .idx of {', '.join(bare)}: {INDEX_BYTES} bytes for each document, whose number is {UNKNOWN}"
        )
    return lines


def _row(one: SourcePlan, total_wanted: int) -> list[str]:
    mark = "~" if one.basis == "estimated" else ""
    return [
        one.name,
        one.source.domain,
        _number(one.num_files),
        _number(one.num_bytes),
        mark + _number(one.tokens),
        _number(one.wanted),
        f"{one.wanted / total_wanted:.2%}" if one.wanted and total_wanted else UNKNOWN,
        f"{one.epochs:.3f}" if one.epochs is not None else UNKNOWN,
        one.source.origin,
        one.source.licence,
    ]


def _number(value: int | None) -> str:
    return UNKNOWN if value is None else f"{value:,}"


def _sum(values: list[int | None]) -> str:
    """Return the sum; of known values only it is a lower bound."""
    known = [value for value in values if value is not None]
    if len(known) == len(values):
        return f"{sum(known):,}"
    return f">={sum(known):,}" if known else UNKNOWN


def _bytes(number: int) -> str:
    for unit, size in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6)):
        if number >= size:
            return f"{number / size:,.2f} {unit}"
    return f"{number:,} bytes"


def _warnings(plan: CorpusPlan) -> list[str]:
    """Return the remarks about what is wrong, or very likely so."""
    lines = [f"WARNING: {text}; correct `expected`, or the files" for one in plan.sources for text in one.differences]
    met: dict[str, str] = {}
    shared: dict[tuple[str, str], list[str]] = {}
    for one in plan.sources:
        patterns = [_address(one.source, pattern) for pattern in one.source.files]
        for address in patterns if one.files is None else one.files:
            if (other := met.setdefault(address, one.name)) != one.name:
                shared.setdefault((other, one.name), []).append(address)
    lines += [
        f"WARNING: {other} and {name} both read {addresses[0]}"
        + f" and {len(addresses) - 1:,} more" * (len(addresses) > 1)
        + ", so its text would be there twice; remove one of them or choose other files"
        for (other, name), addresses in shared.items()
    ]
    total = sum(one.wanted or 0 for one in plan.sources)
    is_whole = any(plan.recipe.wanted(one.source) is None for one in plan.sources)
    if plan.recipe.tokens is not None and is_whole and len(plan.sources) == len(plan.recipe.sources):
        lines.append(
            f"WARNING: tokens={plan.recipe.tokens:,}, the sources give {total:,}, some of them all that they have; `ledom corpus"
            " blend` refuses sums that differ: give each source tokens or a share"
        )
    return lines


def _remarks(plan: CorpusPlan) -> list[str]:
    """Return what the reader must know about the numbers: unknown ones, estimates, repeats, revisions and origins."""
    lines = _warnings(plan)
    if any(one.basis == "estimated" for one in plan.sources):
        estimate = plan.recipe.estimates
        lines.append(
            f"~: estimated from bytes, with {estimate.bytes_per_token:g} bytes of text per token and assumed compression;"
            " sources.NAME.text_per_byte and estimates.bytes_per_token replace the assumptions"
        )
    lines += [
        f"{one.name}: {one.stated:,} tokens are stated, its bytes give ~{one.estimated:,}"
        for one in plan.sources
        if one.stated is not None and one.estimated is not None
    ]
    if unlisted := [one.name for one in plan.sources if one.num_bytes is None]:
        lines.append(
            f"{UNKNOWN}: the files of {', '.join(unlisted)} are not in the listing, and nobody stated their size here;"
            " `ledom corpus pin RECIPE` on a machine with network lists them"
        )
    if short := [one.name for one in plan.sources if one.epochs is not None and one.epochs > 1]:
        lines.append(f"read more than once: {', '.join(short)}; lower their tokens or read more files (sample, most_bytes)")
    if loose := [one.name for one in plan.sources if is_hub(one.source.address) and not is_commit(one.revision)]:
        lines.append(f"not pinned: {', '.join(loose)}; a build needs `ledom corpus pin RECIPE` first")
    for origin, meaning in ORIGINS.items():
        if names := [one.name for one in plan.sources if one.source.origin == origin]:
            lines.append(f"{origin}: {meaning} ({', '.join(names)})")
    return ["", *lines] if lines else []

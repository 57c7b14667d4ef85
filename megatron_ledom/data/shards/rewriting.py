"""Make a new shard from stored ones, without the corpus: merge several, or convert them to another model order.

A merged shard has the same bytes as one task would have written from the same documents in that order; so has a converted one.
Converting accepts our shards and plain `.bin` and `.idx` of other Megatron tools. By default it changes the direction: only the
order of the ids of each document changes, and eod stays last. It also adds or removes a marker, and makes the units of `reversal_units`.
"""

import hashlib
import logging
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

from megatron_ledom.data.shards.decontamination import joined_decontamination
from megatron_ledom.data.shards.indexed_files import Block, IndexedFiles, shard_blocks
from megatron_ledom.data.shards.model_order import OrderSettings, unit_order
from megatron_ledom.data.shards.prefixes import check_not_an_input, check_same_inputs, check_tasks_complete, expand_prefixes
from megatron_ledom.data.shards.reordering import ShardReorderer, ShardReverser
from megatron_ledom.data.shards.shard import (
    NO_TOKENS,
    Counts,
    InputFile,
    ShardManifest,
    ShardWriter,
    check_may_write,
    check_shard,
    choose_dtype,
    printable,
)
from megatron_ledom.direction import Direction, Reading, Unit, check_helpers
from megatron_ledom.errors import DataError, MismatchError, UsageError
from megatron_ledom.storage.signals import sigterm_as_interrupt
from megatron_ledom.tokenizers.corpus_tokenizer import Tokenizer, load_tokenizer

logger = logging.getLogger(__name__)
Eod = Literal["auto", "keep", "append"]
SAMPLE_DOCUMENTS = 1000  # read to find out if documents end with eod


@dataclass(kw_only=True, slots=True)
class MergeSettings:
    """Options of `ledom merge-shards`."""

    input: list[str]
    """Prefixes, or patterns of them."""
    output_prefix: str
    overwrite: bool = False


def merge_shards(settings: MergeSettings) -> ShardManifest:
    """Write the merged shard and return its manifest. Any failure removes the unfinished shard."""
    started = time.monotonic()
    prefixes, manifests = _open_alike(settings.input, settings.output_prefix, settings.overwrite)
    first = manifests[0]
    total = sum(manifest.num_tokens for manifest in manifests)
    with (
        sigterm_as_interrupt(),
        ShardWriter(settings.output_prefix, first.provenance, first.dtype, overwrite=settings.overwrite) as writer,
        tqdm(total=total, unit="token", unit_scale=True, desc="merge", disable=None) as bar,
    ):
        for prefix, manifest in zip(prefixes, manifests, strict=True):
            is_closed = True
            for block in shard_blocks(prefix, manifest):
                is_closed = is_closed and _has_eods_at_ends(block, manifest.eod_id)
                writer.append(block.ids, block.lengths.astype(np.int32))
                bar.update(block.ids.size)
            if not is_closed:  # possible in an intact shard of an earlier version
                raise DataError(
                    f"{prefix}.bin has eod {manifest.eod_id} not only at the end of its documents; see which with"
                    f" ledom inspect-shard {prefix} --verify, and make the shard again with ledom preprocess-data --overwrite"
                )
        merged = writer.finalize(_joined_counts(prefixes, manifests))
    _log_result(settings.output_prefix, merged, len(prefixes), time.monotonic() - started)
    return merged


def _has_eods_at_ends(block: Block, eod_id: int) -> bool:
    ends = np.cumsum(block.lengths) - 1
    return np.count_nonzero(block.ids == eod_id) == len(ends) and bool((block.ids[ends] == eod_id).all())


@dataclass(kw_only=True, slots=True)
class ReverseSettings:
    """Options of `ledom reverse-shards`."""

    input: list[str]
    """Prefixes, or patterns of them."""
    output_prefix: str
    tokenizer: str | None = None
    """Required for inputs without a manifest; else compared with that of the manifest, whose path is the default."""
    eod_token: str | None = None
    from_direction: Direction | None = None
    """Direction of inputs without a manifest; default: forward."""
    to_direction: Direction | None = None
    """Direction of the result; default: the other one than that of the inputs."""
    order: OrderSettings = field(default_factory=OrderSettings)
    """Unit and marker of the result."""
    eod: Eod = "auto"
    """For inputs without a manifest: `keep` the eod at the end of each document, `append` one, or `auto`: look at the ids."""
    text_bytes: int = 0
    """Bytes of text of inputs without a manifest, if known, for bits per byte."""
    overwrite: bool = False


def reverse_shards(settings: ReverseSettings) -> ShardManifest:
    """Write the reversed shard and return its manifest. Any failure removes the unfinished shard."""
    check_helpers()
    prefixes = expand_prefixes(settings.input)
    with_manifest = [prefix for prefix in prefixes if Path(f"{prefix}.json").exists()]
    if with_manifest == prefixes:
        with sigterm_as_interrupt():
            return _reverse_ours(settings)
    if with_manifest:
        other = next(prefix for prefix in prefixes if prefix not in with_manifest)
        raise UsageError(
            f"{with_manifest[0]} has a manifest, {other} has none; reverse them with two commands, then merge them with"
            " ledom merge-shards"
        )
    with sigterm_as_interrupt():
        return _reverse_foreign(settings, prefixes)


def _reverse_ours(settings: ReverseSettings) -> ShardManifest:
    started = time.monotonic()
    prefixes, manifests = _open_alike(settings.input, settings.output_prefix, settings.overwrite)
    if manifests[0].bos_token:
        raise UsageError(
            f"documents of {prefixes[0]} begin with {manifests[0].bos_token!r}, which reversing would move to just before their eod;"
            " preprocess the text in the other direction instead"
        )
    before = manifests[0].provenance
    if settings.from_direction not in (None, before.direction):
        raise MismatchError(
            f"{prefixes[0]} is {before.direction} by its manifest, found --from-direction {settings.from_direction}; omit that option"
        )
    if settings.eod == "append" or settings.text_bytes:
        raise UsageError(f"{prefixes[0]} has a manifest, which decides; omit --eod append and --text-bytes")
    if settings.eod_token is not None and settings.tokenizer is None:
        raise UsageError(f"--eod-token {settings.eod_token!r} needs --tokenizer; give both, or neither")
    reverser = _converter_of_ours(settings, prefixes[0], manifests[0])

    def blocks() -> Iterator[tuple[str, Block]]:
        for prefix, manifest in zip(prefixes, manifests, strict=True):
            yield from ((prefix, block) for block in shard_blocks(prefix, manifest))

    with _writing(settings, reverser) as writer:
        _convert_all(writer, reverser, blocks(), sum(manifest.num_tokens for manifest in manifests))
        result = writer.finalize(replace(_joined_counts(prefixes, manifests), reading_tokens=settings.order.stored()))
    _log_result(settings.output_prefix, result, len(prefixes), time.monotonic() - started)
    return result


def _converter_of_ours(settings: ReverseSettings, prefix: str, manifest: ShardManifest) -> ShardReverser:
    """Return the converter for shards with a manifest. The tokenizer is loaded only if it is given or needed."""
    source, order = manifest.model_order, settings.order
    needs_words = source.unit in (Unit.WORD, Unit.ENTITY)
    tokenizer: Tokenizer | None = None
    if settings.tokenizer is not None or needs_words or not order.is_plain:
        path = settings.tokenizer or manifest.tokenizer_path
        if not Path(path).exists():
            raise UsageError(
                f"unit and marker need the tokenizer of {prefix}, which is not at {path!r}; name it by --tokenizer"
            )
        eod_token = (manifest.eod_token or None) if settings.eod_token is None else settings.eod_token
        tokenizer = load_tokenizer(path, eod_token)
        own = tokenizer.provenance(source.direction)
        own.check_same_tokenizer(manifest.provenance, f"tokenizer {path}", f"shard {prefix}")
    target = _target(settings, prefix, source, tokenizer)
    provenance = manifest.provenance.of_readings(target)
    if source.is_plain and target.is_plain:
        return ShardReverser(provenance, manifest.dtype, is_closed=True)
    orders = unit_order(source, tokenizer), unit_order(target, tokenizer, order.segments)
    return ShardReorderer(provenance, manifest.dtype, *orders, is_closed=True)


def _target(settings: ReverseSettings, prefix: str, source: Reading, tokenizer: Tokenizer | None) -> Reading:
    """Return the reading of the result. Raises UsageError if the options exclude each other, or nothing would change."""
    direction = settings.to_direction or source.direction.other
    settings.order.check(direction)
    target = Reading(direction=direction) if tokenizer is None else settings.order.reading(direction, tokenizer)
    if target == source and target.unit is not Unit.SEGMENT:
        raise UsageError(f"{prefix} is {source.describe()} already; choose another --to-direction, --unit or --marker")
    return target


def _reverse_foreign(settings: ReverseSettings, prefixes: list[str]) -> ShardManifest:
    started = time.monotonic()
    if settings.tokenizer is None:
        raise UsageError(f"{prefixes[0]} has no manifest; name the tokenizer of its ids by --tokenizer")
    check_tasks_complete(prefixes)
    check_not_an_input(settings.output_prefix, prefixes)
    check_may_write(settings.output_prefix, settings.overwrite)
    tokenizer = load_tokenizer(settings.tokenizer, settings.eod_token)
    source = Reading(direction=settings.from_direction or Direction.FORWARD)
    target = _target(settings, prefixes[0], source, tokenizer)
    orders = unit_order(source, tokenizer), unit_order(target, tokenizer, settings.order.segments)
    sources = [IndexedFiles(prefix) for prefix in prefixes]
    is_closed = _ends_with_eod(sources, tokenizer.eod_id) if settings.eod == "auto" else settings.eod == "keep"
    logger.info(
        "%s: no manifest; read as %s ids of %s, documents %s eod %r = %d%s",
        *(
            prefixes[0],
            source.direction,
            tokenizer.name,
            "end with" if is_closed else "without",
            tokenizer.eod_token,
            tokenizer.eod_id,
        ),
        " (like the first documents)" if settings.eod == "auto" else " (--eod)",
    )
    dtype = choose_dtype("auto", tokenizer.vocab_size)
    provenance = tokenizer.provenance(target.direction).of_readings(target)
    reverser = (
        ShardReverser(provenance, dtype, is_closed=is_closed)
        if target.is_plain and target.direction is not source.direction
        else ShardReorderer(provenance, dtype, *orders, is_closed=is_closed)
    )
    counts = Counts(
        text_bytes=settings.text_bytes,
        tokenizer_path=printable(str(Path(settings.tokenizer).resolve())),
        eod_token=tokenizer.eod_token,
        reading_tokens=settings.order.stored(),
    )
    with _writing(settings, reverser) as writer:
        total = sum(source.num_tokens for source in sources)
        _convert_all(writer, reverser, _foreign_blocks(sources, counts), total)
        if not writer.num_documents:
            raise DataError(f"{prefixes[0]} has no document with a token; check --input")
        counts.skipped = {NO_TOKENS: reverser.num_empty} if reverser.num_empty else {}
        result = writer.finalize(counts)
    _log_result(settings.output_prefix, result, len(prefixes), time.monotonic() - started)
    return result


def _foreign_blocks(sources: Sequence[IndexedFiles], counts: Counts) -> Iterator[tuple[str, Block]]:
    """Yield the blocks of all inputs, and add each finished .bin to `counts.input_files`."""
    for source in sources:
        digest = hashlib.sha256()
        yield from ((source.prefix, block) for block in source.blocks(digest))
        num_bytes = source.num_tokens * source.dtype.itemsize
        counts.input_files.append(InputFile(path=f"{source.prefix}.bin", num_bytes=num_bytes, sha256=digest.hexdigest()))


def _ends_with_eod(sources: Sequence[IndexedFiles], eod_id: int) -> bool:
    """Return True if the first documents end with eod. Raises DataError if only some of them do."""
    first: tuple[bool, str] | None = None
    for source in sources:
        for document, last_id in source.last_ids(SAMPLE_DOCUMENTS):
            here = (last_id == eod_id, f"document {document} of {source.prefix}.bin")
            first = first or here
            if here[0] != first[0]:
                closed, bare = (here[1], first[1]) if here[0] else (first[1], here[1])
                raise DataError(
                    f"{closed} ends with eod {eod_id}, {bare} does not; such a mix cannot be reversed: make the shard again"
                )
    return first is not None and first[0]


def _writing(settings: ReverseSettings, reverser: ShardReverser) -> ShardWriter:
    return ShardWriter(settings.output_prefix, reverser.provenance, reverser.dtype, overwrite=settings.overwrite)


def _convert_all(writer: ShardWriter, reverser: ShardReverser, blocks: Iterator[tuple[str, Block]], total: int) -> None:
    with tqdm(total=total, unit="token", unit_scale=True, desc="reverse", disable=None) as bar:
        for prefix, block in blocks:
            writer.append(*reverser.convert(prefix, block))
            bar.update(block.ids.size)


def _open_alike(patterns: Sequence[str], output_prefix: str, overwrite: bool) -> tuple[list[str], list[ShardManifest]]:
    """Return prefixes and manifests of shards that fit together. Raises a LedomError if one is missing or differs."""
    prefixes = expand_prefixes(patterns)
    check_tasks_complete(prefixes)
    check_not_an_input(output_prefix, prefixes)
    check_may_write(output_prefix, overwrite)
    manifests = [check_shard(prefix) for prefix in prefixes]
    for prefix, manifest in zip(prefixes, manifests, strict=True):
        if manifest.pairs:
            raise UsageError(
                f"{prefix} contains pairs with targets, which this command does not copy; make one shard of all files with"
                " ledom prepare-pairs, or list the shards separately in data.train_blend"
            )
        manifest.provenance.check_same(manifests[0].provenance, f"the shard {prefix}", f"the shard {prefixes[0]}")
        if manifest.bos_token != manifests[0].bos_token:
            raise MismatchError(
                f"documents of the shard {prefix} begin with {manifest.bos_token or 'no bos'}, those of {prefixes[0]} with"
                f" {manifests[0].bos_token or 'no bos'}; preprocess both with the same --bos-token"
            )
        if manifest.reading_tokens != manifests[0].reading_tokens:
            raise MismatchError(
                f"the shard {prefix} has {manifest.reading_tokens}, the shard {prefixes[0]} {manifests[0].reading_tokens}; make both"
                " with the same --segment-tokens and --segment-seed, or list both in data.train_blend instead"
            )
        if manifest.dtype != manifests[0].dtype:
            raise MismatchError(
                f"the shard {prefix} has {manifest.dtype} ids, the shard {prefixes[0]} {manifests[0].dtype} ids; preprocess"
                " both with the same --dtype, or list both in data.train_blend instead"
            )
    check_same_inputs(prefixes, manifests)
    return prefixes, manifests


def _joined_counts(prefixes: Sequence[str], manifests: Sequence[ShardManifest]) -> Counts:
    """Return the counts for the manifest of the merged shard: sums, and all input files in order."""
    skipped: Counter[str] = Counter()
    for manifest in manifests:
        skipped.update(manifest.skipped)
    seen = [item for manifest in manifests for item in manifest.skipped_inputs]  # every task of an array lists all of them
    distinct = {tuple(sorted(item.items())): item for item in seen}
    return Counts(
        text_bytes=sum(manifest.text_bytes for manifest in manifests),
        skipped=dict(sorted(skipped.items())),
        input_files=[file for manifest in manifests for file in manifest.input_files],
        tokenizer_path=manifests[0].tokenizer_path,
        eod_token=manifests[0].eod_token,
        bos_token=manifests[0].bos_token,
        text_template=" | ".join(dict.fromkeys(manifest.text_template for manifest in manifests if manifest.text_template)),
        skipped_inputs=[*distinct.values()],
        decontamination=joined_decontamination(prefixes, manifests),
        reading_tokens=manifests[0].reading_tokens,
        source=manifests[0].source if all(manifest.source == manifests[0].source for manifest in manifests) else {},
    )


def _log_result(prefix: str, manifest: ShardManifest, num_inputs: int, seconds: float) -> None:
    """Log one line about the written shard."""
    megabytes = manifest.num_tokens * np.dtype(manifest.dtype).itemsize / 1e6
    logger.info(
        "%s: from %d shards, %s order, %s documents, %s tokens; %.1f s, %.0f MB/s",
        *(prefix, num_inputs, manifest.model_order.describe()),
        *(f"{manifest.num_documents:,}", f"{manifest.num_tokens:,}", seconds, megabytes / max(seconds, 1e-9)),
    )

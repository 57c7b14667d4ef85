"""Make a new shard from stored ones, without the corpus: merge several, or reverse them to the other direction.

A merged shard has the same bytes as one task would have written from the same documents in that order. Reversing accepts our
shards and plain `.bin` and `.idx` of other Megatron tools. Only the order of the ids of each document changes; eod stays last.
"""

import hashlib
import logging
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from megatron_ledom.data.shards.decontamination import joined_decontamination
from megatron_ledom.data.shards.indexed_files import Block, IndexedFiles, shard_blocks
from megatron_ledom.data.shards.prefixes import check_not_an_input, check_same_inputs, check_tasks_complete, expand_prefixes
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
from megatron_ledom.direction import Direction, check_helpers, reverse_into
from megatron_ledom.errors import DataError, MismatchError, UsageError
from megatron_ledom.provenance import Provenance
from megatron_ledom.storage.signals import sigterm_as_interrupt
from megatron_ledom.tokenizers.corpus_tokenizer import load_tokenizer

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
    """Required for inputs without a manifest; else compared with that of the manifest."""
    eod_token: str | None = None
    from_direction: Direction | None = None
    """Direction of inputs without a manifest; default: forward."""
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


class ShardReverser:
    """Converter of blocks of stored documents to the other direction."""

    def __init__(self, provenance: Provenance, dtype: npt.DTypeLike, *, is_closed: bool) -> None:
        self.provenance = provenance
        """Provenance of the result."""
        self.dtype = np.dtype(dtype)
        self.is_closed = is_closed
        """True if the input documents end with an eod."""
        self.num_empty = 0
        """Number of documents skipped for having no ids except eod."""
        self._buffer = np.empty(0, self.dtype)

    def reverse(self, prefix: str, block: Block) -> tuple[npt.NDArray[Any], npt.NDArray[np.int32]]:
        """Return (ids, lengths) for `ShardWriter.append`, valid until the next call. Raises DataError for an invalid id or eod."""
        kept = block.lengths[block.lengths > int(self.is_closed)]
        lengths = kept if self.is_closed else kept + 1
        if lengths.size and int(lengths.max()) > np.iinfo(np.int32).max:
            document = block.first + int(block.lengths.argmax())
            raise DataError(
                f"{prefix}.bin: document {document} has {int(lengths.max()):,} ids, too many for the int32 lengths of an index"
            )
        total = int(lengths.sum())
        if total > len(self._buffer):
            self._buffer = np.empty(total, self.dtype)
        reversed_ids = self._buffer[:total]
        bad = reverse_into(
            block.ids,
            block.lengths,
            reversed_ids,
            is_closed=self.is_closed,
            eod_id=self.provenance.eod_id,
            vocab_size=self.provenance.vocab_size,
        )
        if bad >= 0:
            raise DataError(self._problem(prefix, block, bad))
        self.num_empty += len(block.lengths) - len(kept)
        return reversed_ids, lengths.astype(np.int32)

    def _problem(self, prefix: str, block: Block, bad: int) -> str:
        document, found = block.document_at(bad), int(block.ids[bad])
        begin = int(block.lengths[: document - block.first].sum())
        is_last = bad - begin == block.lengths[document - block.first] - 1
        eod, vocab_size = self.provenance.eod_id, self.provenance.vocab_size
        where = f"{prefix}.bin: document {document}"
        if found < 0 or found >= vocab_size:
            return (
                f"{where} has id {found}, outside the {vocab_size:,} ids of the tokenizer; the shard is damaged or was made with"
                " another tokenizer"
            )
        if found != eod:
            return f"{where} ends with id {found}, expected eod {eod} at the end of every document (--eod keep)"
        if is_last:
            return f"{where} ends with eod {eod}, expected documents without eod (--eod append)"
        return (
            f"{where} has eod {eod} at its id {bad - begin} of {int(block.lengths[document - block.first])}, but eod must be last;"
            " if another id ends documents here, name it by --eod-token"
        )


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
    if settings.tokenizer is not None:
        eod_token = (manifests[0].eod_token or None) if settings.eod_token is None else settings.eod_token
        tokenizer = load_tokenizer(settings.tokenizer, eod_token)
        tokenizer.provenance(before.direction).check_same(before, f"tokenizer {settings.tokenizer}", f"shard {prefixes[0]}")
    reverser = ShardReverser(replace(before, direction=before.direction.other), manifests[0].dtype, is_closed=True)

    def blocks() -> Iterator[tuple[str, Block]]:
        for prefix, manifest in zip(prefixes, manifests, strict=True):
            yield from ((prefix, block) for block in shard_blocks(prefix, manifest))

    with _writing(settings, reverser) as writer:
        _reverse_all(writer, reverser, blocks(), sum(manifest.num_tokens for manifest in manifests))
        result = writer.finalize(_joined_counts(prefixes, manifests))
    _log_result(settings.output_prefix, result, len(prefixes), time.monotonic() - started)
    return result


def _reverse_foreign(settings: ReverseSettings, prefixes: list[str]) -> ShardManifest:
    started = time.monotonic()
    if settings.tokenizer is None:
        raise UsageError(f"{prefixes[0]} has no manifest; name the tokenizer of its ids by --tokenizer")
    check_tasks_complete(prefixes)
    check_not_an_input(settings.output_prefix, prefixes)
    check_may_write(settings.output_prefix, settings.overwrite)
    tokenizer = load_tokenizer(settings.tokenizer, settings.eod_token)
    before = settings.from_direction or Direction.FORWARD
    sources = [IndexedFiles(prefix) for prefix in prefixes]
    is_closed = _ends_with_eod(sources, tokenizer.eod_id) if settings.eod == "auto" else settings.eod == "keep"
    logger.info(
        "%s: no manifest; read as %s ids of %s, documents %s eod %r = %d%s",
        *(prefixes[0], before, tokenizer.name, "end with" if is_closed else "without", tokenizer.eod_token, tokenizer.eod_id),
        " (like the first documents)" if settings.eod == "auto" else " (--eod)",
    )
    dtype = choose_dtype("auto", tokenizer.vocab_size)
    reverser = ShardReverser(tokenizer.provenance(before.other), dtype, is_closed=is_closed)
    counts = Counts(
        text_bytes=settings.text_bytes,
        tokenizer_path=printable(str(Path(settings.tokenizer).resolve())),
        eod_token=tokenizer.eod_token,
    )
    with _writing(settings, reverser) as writer:
        total = sum(source.num_tokens for source in sources)
        _reverse_all(writer, reverser, _foreign_blocks(sources, counts), total)
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


def _reverse_all(writer: ShardWriter, reverser: ShardReverser, blocks: Iterator[tuple[str, Block]], total: int) -> None:
    with tqdm(total=total, unit="token", unit_scale=True, desc="reverse", disable=None) as bar:
        for prefix, block in blocks:
            writer.append(*reverser.reverse(prefix, block))
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
        source=manifests[0].source if all(manifest.source == manifests[0].source for manifest in manifests) else {},
    )


def _log_result(prefix: str, manifest: ShardManifest, num_inputs: int, seconds: float) -> None:
    """Log one line about the written shard."""
    megabytes = manifest.num_tokens * np.dtype(manifest.dtype).itemsize / 1e6
    logger.info(
        "%s: from %d shards, %s order, %s documents, %s tokens; %.1f s, %.0f MB/s",
        *(prefix, num_inputs, manifest.direction),
        *(f"{manifest.num_documents:,}", f"{manifest.num_tokens:,}", seconds, megabytes / max(seconds, 1e-9)),
    )

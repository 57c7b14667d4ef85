"""Load the shards of a run: check their manifests against each other and against the run, before anything slow.

If held-out text is split off by a ratio, it consists of whole documents of the training shards.
"""

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from megatron_ledom.config.derived import blend_shares, named_blends, stated_directions, train_samples
from megatron_ledom.config.schema import BlendEntry, DataConfig, RunConfig
from megatron_ledom.data.blends.interleave import Interleave
from megatron_ledom.data.blends.plan import describe_sources, planned_sources, samples_available, with_directions
from megatron_ledom.data.shards.index_file import map_index
from megatron_ledom.data.shards.shard import ShardManifest, check_shard
from megatron_ledom.data.shards.shard_files import ShardFiles
from megatron_ledom.data.shards.targets import counted_bytes_per_token
from megatron_ledom.direction import BOTH, Direction, ModelDirection
from megatron_ledom.errors import ConfigError, MismatchError
from megatron_ledom.provenance import Provenance
from megatron_ledom.tokenizers.corpus_tokenizer import Tokenizer, load_tokenizer

log = logging.getLogger(__name__)
RUN_TOKENIZER = "tokenizer"
"""Folder in the run folder that contains the tokenizer for the export."""
MOST_NAMES = 5
"""Limit on the names in a log line."""
THREADS = 16
"""Number of threads that open shards. A distributed file system takes milliseconds per file."""


@dataclass(frozen=True, slots=True)
class DocumentRange:
    """Consecutive documents of a shard."""

    first: int
    last: int
    """Number of the last document, plus 1."""
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Source:
    """One shard of a blend, or the part of its documents from which the blend draws."""

    prefix: str
    weight: float
    """Fraction of the samples. The weights of all sources add up to 1."""
    manifest: ShardManifest
    documents: DocumentRange
    files: ShardFiles
    """State of the files when the manifest was checked."""

    def samples_available(self, seq_length: int) -> int:
        """Return the samples of one pass over the documents."""
        return samples_available(self.documents.num_tokens, seq_length)

    def bytes_per_token(self, data: DataConfig) -> float:
        """Return the UTF-8 bytes of text per id that the loss counts: the mean over the whole shard."""
        return counted_bytes_per_token(self.manifest, data.loss_tokens, eod_mask_loss=data.eod_mask_loss)


@dataclass(frozen=True, slots=True)
class Blend:
    """Sources, and the order in which samples are drawn from them."""

    sources: list[Source]
    interleave: Interleave
    num_samples: int
    """Samples that the run draws."""

    @classmethod
    def of(cls, sources: Sequence[Source], num_samples: int) -> "Blend":
        """Make a blend that draws `num_samples` by the weights of the sources."""
        return cls([*sources], Interleave([source.weight for source in sources]), num_samples)

    def bytes_per_token(self, data: DataConfig) -> float:
        """Return the UTF-8 bytes of text per id that the loss counts: the mean over the sources, weighted by their drawn samples."""
        counts = self.interleave.counts(self.num_samples).tolist()
        drawn = zip(self.sources, counts, strict=True)
        return float(sum(source.bytes_per_token(data) * count for source, count in drawn)) / self.num_samples


@dataclass(frozen=True, slots=True)
class Sources:
    """All shards of a run, with their direction and tokenizer."""

    train: Blend
    valid: dict[str, Blend]
    """Validation sets by name."""
    test: dict[str, Blend]
    """Sets that are evaluated once, at the end."""
    provenance: Provenance

    def train_shards(self) -> list[list[Any]]:
        """Return one list for each training shard. These lists and the seed determine all samples:

        [fraction of the samples, sha256 of .bin (and .targets), sha256 of .idx, first document, last document + 1, prefix].
        The prefix is only a name. Those of a two-way run have the direction before the prefix.
        """
        is_two_way = self.provenance.direction == BOTH
        return [
            [
                source.weight,
                source.manifest.content_sha256,
                source.manifest.idx_sha256,
                source.documents.first,
                source.documents.last,
                *([str(source.manifest.direction)] if is_two_way else []),
                source.prefix,
            ]
            for source in self.train.sources
        ]

    def all_blends(self) -> list[Blend]:
        """Return the training blend, then those of all held-out sets."""
        return [self.train, *self.valid.values(), *self.test.values()]

    def of_samples(self, config: RunConfig, num_samples: int) -> "Sources":
        """Return the sources for a run of `num_samples`, for resuming with another batch size. Raises ConfigError for repeats."""
        train = replace(self.train, num_samples=num_samples)
        _check_repeats(config, train)
        return replace(self, train=train)


def load_sources(config: RunConfig) -> Sources:
    """Read the manifests of all shards of the run. Raises a LedomError for the first mismatch."""
    data = config.data
    if not data.train_blend:
        raise ConfigError("data.train_blend is empty: give it shards as [[weight, prefix], ...], made by ledom preprocess-data")
    blends = [blend for _, blend in named_blends(data)]
    manifests, files = _open({prefix: None for blend in blends for _, prefix, *_ in blend})
    provenance = check_manifests(config, manifests)
    train, valid, test = _divide(config, manifests, files)
    sources = Sources(train, valid, test, provenance)
    _check_repeats(config, sources.train)
    return sources


def _open(prefixes: Iterable[str]) -> tuple[dict[str, ShardManifest], dict[str, ShardFiles]]:
    names = list(prefixes)
    with ThreadPoolExecutor(THREADS) as threads:
        manifests = dict(zip(names, threads.map(check_shard, names), strict=True))
        files = dict(zip(names, threads.map(ShardFiles.of, names, manifests.values()), strict=True))
    for prefix, manifest in manifests.items():
        if not manifest.num_documents:
            raise ConfigError(f"the shard {prefix} has no documents; remove it from the blend")
    return manifests, files


def check_manifests(config: RunConfig, manifests: Mapping[str, ShardManifest]) -> Provenance:
    """Return the common provenance of one or more shards: for a two-way run that of both directions.

    Raises a LedomError that names the first shard that does not fit.
    """
    _check_stated(config, manifests)
    prefix, first = next(iter(manifests.items()))
    firsts: dict[Direction, tuple[str, Provenance]] = {}
    for other, manifest in manifests.items():
        _check_direction(other, manifest, config.data.direction)
        manifest.provenance.check_same_tokenizer(first.provenance, f"the shard {other}", f"the shard {prefix}")
        same_way, known = firsts.setdefault(manifest.direction, (other, manifest.provenance))
        manifest.provenance.check_same(known, f"the shard {other}", f"the shard {same_way}")
    if config.data.direction == BOTH:
        _check_both_ways(config, manifests)
    provenance = first.provenance.of_readings(*(known.readings[0] for _, known in firsts.values()))
    check_pairs(config, manifests)
    stated = config.model.vocab_size
    if stated is not None and stated != provenance.vocab_size:
        raise MismatchError(
            f"model.vocab_size={stated}, but the shard {prefix} has a vocabulary of {provenance.vocab_size};"
            " omit model.vocab_size, or preprocess with the intended tokenizer"
        )
    return provenance


def _check_stated(config: RunConfig, manifests: Mapping[str, ShardManifest]) -> None:
    """Raise MismatchError for a blend that states another direction than that of its shard."""
    for key, blend in named_blends(config.data):
        for prefix, stated in stated_directions(blend).items():
            if prefix in manifests and (found := manifests[prefix].direction) is not stated:
                raise MismatchError(
                    f"{key} says that the shard {prefix} is {stated}, but its manifest says {found}; correct or omit the direction in {key}, or"
                    f" name a {stated} shard, which ledom reverse-shards makes of a {found} one"
                )


def _check_direction(prefix: str, manifest: ShardManifest, direction: ModelDirection) -> None:
    found = manifest.direction
    if direction not in (BOTH, found):
        raise MismatchError(
            f"the shard {prefix} is {found}, the run has data.direction={direction}: a {direction} model that gets {found} ids"
            f" learns nonsense without an error; preprocess with --direction {direction}, or set data.direction={found}, or both for"
            " a two-way model"
        )


def _check_both_ways(config: RunConfig, manifests: Mapping[str, ShardManifest]) -> None:
    """Raise MismatchError unless the training blend of a two-way run has both directions, with different markers."""
    prefixes = [prefix for _, prefix, *_ in config.data.train_blend]
    known = [prefix for prefix in prefixes if prefix in manifests]  # a dry run may have only some of the shards
    trained = {manifests[prefix].direction: (prefix, manifests[prefix].model_order) for prefix in known}
    if stock := next((prefix for prefix, manifest in manifests.items() if manifest.bos_token), None):
        raise MismatchError(
            f"data.direction=both, but the documents of {stock} begin with a BOS token, which a two-way model could not tell from a marker;"
            " make the shard again with --marker instead of --bos-token"
        )
    if len(trained) < 2 and len(known) < len(prefixes):
        return
    if len(trained) == 1:
        found = next(iter(trained))
        raise MismatchError(
            f"data.direction=both, but all shards of data.train_blend are {found}; add {found.other} ones, or set data.direction={found}"
        )
    markers = {reading.marker_id for _, reading in trained.values()}
    if len(markers) == 1:
        named = " and ".join(f"{prefix} ({direction})" for direction, (prefix, _) in trained.items())
        raise MismatchError(
            f"data.direction=both, but documents of {named} begin with the same marker ({markers.pop()}), so the model could not tell them"
            " apart; give the shards of one direction, or of both, a --marker with ledom reverse-shards"
        )


def check_pairs(config: RunConfig, manifests: Mapping[str, ShardManifest]) -> None:
    """Raise ConfigError if the samples of the run would not be the packs, or if pairs would attend to each other."""
    data = config.data
    for prefix, manifest in manifests.items():
        if not manifest.pairs:
            if data.loss_tokens != "all":
                raise ConfigError(
                    f"data.loss_tokens={data.loss_tokens} needs shards of pairs, but {prefix} contains text; make it with"
                    " ledom prepare-pairs, or set data.loss_tokens=all"
                )
            continue
        if manifest.pairs["seq_length"] != data.seq_length:
            raise ConfigError(
                f"the pairs of {prefix} are packed for data.seq_length={manifest.pairs['seq_length']}, the run has"
                f" {data.seq_length}; set data.seq_length to that of the packs, or pack them again with ledom prepare-pairs"
                f" --seq-length {data.seq_length}"
            )
        if not data.reset_attention_mask:
            raise ConfigError(
                f"{prefix} contains pairs, which would attend to other pairs in their sample; set data.reset_attention_mask=true"
            )


def _divide(
    config: RunConfig, manifests: dict[str, ShardManifest], files: dict[str, ShardFiles]
) -> tuple[Blend, dict[str, Blend], dict[str, Blend]]:
    """Return (training blend, validation sets, test sets)."""
    data, samples = config.data, train_samples(config)
    if data.split is None:
        valid = {prefix: [(1.0, prefix)] for _, prefix, *_ in data.valid_blend} | data.valid_sets
        return (
            Blend.of(_whole_sources(data.train_blend, manifests, files), samples),
            {name: _held_out(config, name, _whole_sources(blend, manifests, files)) for name, blend in valid.items()},
            {name: _held_out(config, name, _whole_sources(blend, manifests, files)) for name, blend in data.test_sets.items()},
        )
    whole = _whole_sources(data.train_blend, manifests, files)
    with ThreadPoolExecutor(THREADS) as threads:
        ratios = data.split
        ranges = list(threads.map(lambda source: split_shard(source.prefix, source.manifest, ratios), whole))
    parts = [[replace(source, documents=three[part]) for source, three in zip(whole, ranges, strict=True)] for part in range(3)]
    sets: list[dict[str, Blend]] = [
        {name: _held_out(config, name, part)} if ratio else {}
        for name, part, ratio in zip(("valid", "test"), parts[1:], ratios[1:], strict=True)
    ]
    return Blend.of(parts[0], samples), sets[0], sets[1]


def _whole_sources(
    blend: Sequence[BlendEntry], manifests: dict[str, ShardManifest], files: dict[str, ShardFiles]
) -> list[Source]:
    entries = zip(blend, blend_shares(blend), strict=True)
    return [
        Source(prefix, fraction, manifests[prefix], whole_shard(manifests[prefix]), files[prefix])
        for (_, prefix, *_), fraction in entries
    ]


def whole_shard(manifest: ShardManifest) -> DocumentRange:
    """Return the range of all documents of a shard."""
    return DocumentRange(0, manifest.num_documents, manifest.num_tokens)


def split_shard(prefix: str, manifest: ShardManifest, ratios: Sequence[float]) -> list[DocumentRange]:
    """Return the documents for training, validation and test, in this order in the shard.

    Divides by the number of documents, as megatron-core does. Reads a few numbers of `.idx` and nothing of `.bin`.
    """
    total, count = sum(ratios), manifest.num_documents
    borders = [round(sum(ratios[:number]) / total * count) for number in range(len(ratios))] + [count]
    tokens = [_tokens_before(prefix, manifest, border) for border in borders]
    parts = zip(borders[:-1], borders[1:], tokens[:-1], tokens[1:], strict=True)
    return [DocumentRange(first, last, end - begin) for first, last, begin, end in parts]


def _tokens_before(prefix: str, manifest: ShardManifest, document: int) -> int:
    if document == manifest.num_documents:
        return manifest.num_tokens
    pointers = map_index(f"{prefix}.idx", manifest.num_documents, manifest.num_documents).pointers
    return int(pointers[document]) // np.dtype(manifest.dtype).itemsize


def _held_out(config: RunConfig, name: str, sources: list[Source]) -> Blend:
    """Return the blend of a held-out set: whole global batches, no sample twice, only sources with a sample.

    Raises ConfigError for a set smaller than one batch.
    """
    seq_length, batch = config.data.seq_length, config.train.global_batch_size
    available = [source.samples_available(seq_length) for source in sources]
    sources, too_short = _with_samples(sources, available)
    if too_short:
        names = ", ".join(source.prefix for source in too_short[:MOST_NAMES]) + (", ..." if len(too_short) > MOST_NAMES else "")
        log.info("the held-out set %s skips %d shards that are too short for one sample: %s", name, len(too_short), names)
    for source in sources:
        if not source.manifest.text_bytes:
            raise ConfigError(
                f"the manifest of the validation shard {source.prefix} lacks the number of text bytes, which bits per byte need;"
                " make the shard from the text, or with ledom reverse-shards --text-bytes"
            )
    whole = Blend.of(sources, 0)
    most = whole.interleave.most_samples([count for count in available if count]) if sources else 0
    if most < batch:
        raise ConfigError(
            f"the held-out set {name} has {most:,} samples of {seq_length} tokens by its weights, fewer than"
            f" train.global_batch_size={batch}; give it more text, or lower the batch size"
        )
    return replace(whole, num_samples=min(most // batch, config.train.eval_iters) * batch)


def _with_samples(sources: list[Source], available: list[int]) -> tuple[list[Source], list[Source]]:
    """Return (sources with samples, their weights rescaled to add up to 1; the others). A split can leave a shard no document."""
    counted = list(zip(sources, available, strict=True))
    kept = [source for source, count in counted if count]
    if len(kept) == len(sources):
        return kept, []
    total = sum(source.weight for source in kept)
    return [replace(source, weight=source.weight / total) for source in kept], [
        source for source, count in counted if not count
    ]


def _check_repeats(config: RunConfig, blend: Blend) -> None:
    """Raise ConfigError for a source that would repeat although repeats are not allowed, and for one without a sample."""
    seq_length = config.data.seq_length
    for source, needed in zip(blend.sources, blend.interleave.counts(blend.num_samples).tolist(), strict=True):
        available = source.samples_available(seq_length)
        if needed and not available:
            raise ConfigError(
                f"{source.prefix} has {source.documents.num_tokens:,} tokens to train on, less than one sample of"
                f" data.seq_length={seq_length}; remove it from data.train_blend, or merge small shards with ledom merge-shards"
            )
        if needed > available and not config.data.allow_repeats:
            raise ConfigError(
                f"the run draws {needed:,} samples of {seq_length} tokens from {source.prefix}, which has {available:,}, so it"
                f" would be read {needed / available:.2f} times; lower train.train_iters or its weight in data.train_blend,"
                " add shards, or set data.allow_repeats=true"
            )


def describe_blend(config: RunConfig, sources: Sources) -> str:
    """Return the table of the training blend: tokens, weight, share, drawn tokens, epochs and samples of each source."""
    sizes = {source.prefix: source.documents.num_tokens for source in sources.train.sources}
    weights = [weight for weight, *_ in config.data.train_blend]
    tokens = sources.train.num_samples * config.data.seq_length
    planned = planned_sources(sizes, weights, tokens, config.data.seq_length)
    if config.data.direction != BOTH:
        return describe_sources(planned, tokens)
    directions = {source.prefix: source.manifest.direction for source in sources.train.sources}
    table = describe_sources(with_directions(planned, directions), tokens)
    shares = dict.fromkeys(sources.provenance.readings, 0.0)
    for source in sources.train.sources:
        shares[source.manifest.model_order] += source.weight
    parts = [f"{share:.2%} of the samples {reading.describe()}" for reading, share in shares.items()]
    return f"{table}\n{', '.join(parts)}"


def load_run_tokenizer(config: RunConfig, sources: Sources) -> Tokenizer | None:
    """Return the tokenizer of the data, or None if it is not on this machine. Raises MismatchError if the shards have another."""
    manifest = sources.train.sources[0].manifest
    path = config.data.tokenizer or manifest.tokenizer_path
    if config.data.tokenizer is None and not os.path.exists(path):
        log.warning(
            "data.tokenizer is not set, and the tokenizer of the shards (%s) is not on this machine: the run trains, but cannot be"
            " exported yet",
            path,
        )
        return None
    tokenizer = load_tokenizer(path, manifest.eod_token or None)
    own = tokenizer.provenance(sources.train.sources[0].manifest.direction)
    own.check_same_tokenizer(sources.provenance, f"the tokenizer {path}", "the data of this run")
    return tokenizer

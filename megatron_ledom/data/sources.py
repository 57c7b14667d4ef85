"""The shards a run reads: checked against each other and against the run before anything heavy."""

import logging
import os
from dataclasses import dataclass
from typing import Any

from megatron_ledom.config.derived import train_samples
from megatron_ledom.config.schema import BlendEntry, RunConfig
from megatron_ledom.data.blend_plan import samples_available
from megatron_ledom.data.shard import ShardManifest, check_shard
from megatron_ledom.data.tokenizer import Tokenizer, load_tokenizer
from megatron_ledom.direction import Direction
from megatron_ledom.errors import ConfigError, MismatchError
from megatron_ledom.provenance import Provenance

log = logging.getLogger(__name__)

RUN_TOKENIZER = "tokenizer"
"""Folder in the run folder that holds the tokenizer for the export."""


@dataclass(frozen=True, slots=True)
class Source:
    """One shard of a blend."""

    prefix: str
    weight: float
    """Share of the samples, all sources together 1."""
    manifest: ShardManifest

    def samples_available(self, seq_length: int) -> int:
        """Samples of one pass over the shard."""
        return samples_available(self.manifest.num_tokens, seq_length)


@dataclass(frozen=True, slots=True)
class Sources:
    """Every shard of a run, and what their ids mean."""

    train: list[Source]
    valid: list[Source]
    provenance: Provenance

    def train_shards(self) -> list[list[Any]]:
        """[share of the samples, sha256 of .bin] of each training shard: what decides, with the seed, which samples come."""
        return [[source.weight, source.manifest.bin_sha256] for source in self.train]


def load_sources(config: RunConfig) -> Sources:
    """Open the manifests of all shards of the run. Raises a LedomError that names the first thing that does not fit."""
    if not config.data.train_blend:
        raise ConfigError(
            "data.train_blend is empty: give it shards as [[weight, prefix], ...], made by tools/preprocess_data.py"
        )
    train, valid = _open(config.data.train_blend), _open(config.data.valid_blend)
    first = train[0]
    provenance = first.manifest.provenance
    _check_direction(first, config.data.direction)
    for source in [*train, *valid]:
        source.manifest.provenance.check_same(provenance, f"the shard {source.prefix}", f"the shard {first.prefix}")
    stated = config.model.vocab_size
    if stated is not None and stated != provenance.vocab_size:
        raise MismatchError(
            f"model.vocab_size={stated} but the shard {first.prefix} has ids of {provenance.vocab_size};"
            " leave model.vocab_size out, or preprocess with the tokenizer that the run is meant for"
        )
    _check_samples(config, train, valid)
    return Sources(train, valid, provenance)


def _open(blend: list[BlendEntry]) -> list[Source]:
    total = sum(weight for weight, _ in blend)
    sources = [Source(prefix, weight / total, check_shard(prefix)) for weight, prefix in blend]
    for source in sources:
        if not source.manifest.num_documents:
            raise ConfigError(f"the shard {source.prefix} has no documents; leave it out of the blend")
    return sources


def _check_direction(source: Source, direction: Direction) -> None:
    found = source.manifest.provenance.direction
    if found is not direction:
        raise MismatchError(
            f"the shard {source.prefix} is {found}, the run has data.direction={direction}: a {direction} model fed {found} ids"
            f" learns nonsense without an error; preprocess with --direction {direction}, or set data.direction={found}"
        )


def _check_samples(config: RunConfig, train: list[Source], valid: list[Source]) -> None:
    """Refuse a source that would repeat without leave, and a validation set smaller than one global batch."""
    seq_length, batch = config.data.seq_length, config.train.global_batch_size
    needed_in_all = train_samples(config)
    for source in train:
        needed, available = round(source.weight * needed_in_all), source.samples_available(seq_length)
        if needed > available and not config.data.allow_repeats:
            raise ConfigError(
                f"the run draws {needed:,} samples of {seq_length} tokens from {source.prefix}, which has {available:,}:"
                f" it would be read {needed / max(available, 1):.2f} times; lower train.train_iters or its weight in"
                " data.train_blend, add shards, or set data.allow_repeats=true"
            )
    for source in valid:
        if not source.manifest.text_bytes:
            raise ConfigError(
                f"the validation shard {source.prefix} does not say how many bytes of text it holds, which bits per byte are counted"
                " against; make it from the text, or with tools/reverse_shards.py --text-bytes"
            )
        if source.samples_available(seq_length) < batch:
            raise ConfigError(
                f"the validation shard {source.prefix} has {source.samples_available(seq_length):,} samples of {seq_length}"
                f" tokens, fewer than train.global_batch_size={batch}; give it more text, or lower the batch"
            )


def load_run_tokenizer(config: RunConfig, sources: Sources) -> Tokenizer | None:
    """The tokenizer of the run's data, None if it is not on this machine. Raises MismatchError if it is not the shards' one."""
    manifest = sources.train[0].manifest
    path = config.data.tokenizer or manifest.tokenizer_path
    if config.data.tokenizer is None and not os.path.exists(path):
        log.warning("no data.tokenizer, and the shards' own (%s) is not here: the run trains, but cannot be exported yet", path)
        return None
    tokenizer = load_tokenizer(path, manifest.eod_token or None)
    tokenizer.provenance(config.data.direction).check_same(sources.provenance, f"the tokenizer {path}", "the data of this run")
    return tokenizer

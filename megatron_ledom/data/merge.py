"""Several shards joined to one, the very bytes that one task would have written from the same documents in that order."""

import logging
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from megatron_ledom.data.indexed_files import shard_blocks
from megatron_ledom.data.prefixes import check_not_an_input, check_same_inputs, check_tasks_complete, expand_prefixes
from megatron_ledom.data.shard import Counts, ShardManifest, ShardWriter, check_may_write, check_shard
from megatron_ledom.data.stop_signal import sigterm_as_interrupt
from megatron_ledom.errors import MismatchError, UsageError

logger = logging.getLogger(__name__)


@dataclass(kw_only=True, slots=True)
class MergeSettings:
    """What tools/merge_shards.py was asked."""

    input: list[str]
    """Prefixes, or patterns of them."""
    output_prefix: str
    overwrite: bool = False


def merge_shards(settings: MergeSettings) -> ShardManifest:
    """Write the joined shard and return its manifest. On any failure nothing of it stays behind."""
    started = time.monotonic()
    prefixes, manifests = open_alike(settings.input, settings.output_prefix, settings.overwrite)
    first = manifests[0]
    total = sum(manifest.num_tokens for manifest in manifests)
    with (
        sigterm_as_interrupt(),
        ShardWriter(settings.output_prefix, first.provenance, first.dtype, overwrite=settings.overwrite) as writer,
        tqdm(total=total, unit="token", unit_scale=True, desc="merge", disable=None) as bar,
    ):
        for prefix, manifest in zip(prefixes, manifests, strict=True):
            for block in shard_blocks(prefix, manifest):
                writer.append(block.ids, block.lengths.astype(np.int32))
                bar.update(block.ids.size)
        merged = writer.finalize(joined_counts(manifests))
    log_result(settings.output_prefix, merged, len(prefixes), time.monotonic() - started)
    return merged


def open_alike(patterns: Sequence[str], output_prefix: str, overwrite: bool) -> tuple[list[str], list[ShardManifest]]:
    """Prefixes and manifests of shards that may be joined, cheaply checked; refused when something is missing or differs."""
    prefixes = expand_prefixes(patterns)
    check_tasks_complete(prefixes)
    check_not_an_input(output_prefix, prefixes)
    check_may_write(output_prefix, overwrite)
    manifests = [check_shard(prefix) for prefix in prefixes]
    for prefix, manifest in zip(prefixes, manifests, strict=True):
        if manifest.pairs:
            raise UsageError(
                f"{prefix} holds pairs with targets, which this tool does not carry over; make one shard of all files with"
                " tools/prepare_pairs.py, or name the shards in data.train_blend side by side"
            )
        manifest.provenance.check_same(manifests[0].provenance, f"the shard {prefix}", f"the shard {prefixes[0]}")
        if manifest.bos_token != manifests[0].bos_token:
            raise MismatchError(
                f"documents of the shard {prefix} begin with {manifest.bos_token or 'no bos'}, those of {prefixes[0]} with"
                f" {manifests[0].bos_token or 'no bos'}; preprocess both with the same --bos-token"
            )
        if manifest.dtype != manifests[0].dtype:
            raise MismatchError(
                f"the shard {prefix} holds {manifest.dtype} ids, the shard {prefixes[0]} {manifests[0].dtype} ids; preprocess"
                " both with the same --dtype, or name both in data.train_blend instead"
            )
    check_same_inputs(prefixes, manifests)
    return prefixes, manifests


def joined_counts(manifests: Sequence[ShardManifest]) -> Counts:
    """What the manifest of the joined shard says besides the ids: sums, and all input files in order."""
    skipped: Counter[str] = Counter()
    for manifest in manifests:
        skipped.update(manifest.skipped)
    return Counts(
        text_bytes=sum(manifest.text_bytes for manifest in manifests),
        skipped=dict(sorted(skipped.items())),
        input_files=[file for manifest in manifests for file in manifest.input_files],
        tokenizer_path=manifests[0].tokenizer_path,
        eod_token=manifests[0].eod_token,
        bos_token=manifests[0].bos_token,
        text_template=" | ".join(dict.fromkeys(manifest.text_template for manifest in manifests if manifest.text_template)),
        skipped_inputs=_distinct([item for manifest in manifests for item in manifest.skipped_inputs]),
    )


def _distinct(items: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The tasks of an array saw the same inputs: each is listed once."""
    return list({tuple(sorted(item.items())): item for item in items}.values())


def log_result(prefix: str, manifest: ShardManifest, num_inputs: int, seconds: float) -> None:
    """One line of what was written."""
    megabytes = manifest.num_tokens * np.dtype(manifest.dtype).itemsize / 1e6
    logger.info(
        "%s: from %d shards, %s order, %s documents, %s tokens; %.1f s, %.0f MB/s",
        *(prefix, num_inputs, manifest.direction),
        *(f"{manifest.num_documents:,}", f"{manifest.num_tokens:,}", seconds, megabytes / max(seconds, 1e-9)),
    )

"""Preprocess raw text to a shard: read, encode, change to model order, close with eod, write. The bytes do not depend on the workers.

`task` divides the inputs into parts. Each worker reads and encodes one part at a time into files of its own (`encode_parts`, with
`data.readers`). A part is finished or does not exist (`part_store`). This process joins finished parts in order while the workers
make the next ones (`join_parts`). After a kill the same command resumes from the finished parts. Nothing here imports torch.
"""

import contextlib
import gc
import hashlib
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from megatron_ledom.data.preprocess import deduplication
from megatron_ledom.data.preprocess.join_parts import make_shard
from megatron_ledom.data.preprocess.part_store import PartStore
from megatron_ledom.data.preprocess.task import PreprocessSettings, PreprocessTask
from megatron_ledom.data.readers.input_files import log_skipped_inputs
from megatron_ledom.data.readers.records import RecordReader
from megatron_ledom.data.shards.model_order import unit_order
from megatron_ledom.data.shards.shard import ShardManifest, check_may_write, check_shard, choose_dtype
from megatron_ledom.direction import check_helpers
from megatron_ledom.errors import DataError, LedomError, UsageError, cannot_write
from megatron_ledom.storage.signals import sigterm_as_interrupt
from megatron_ledom.tokenizers.corpus_tokenizer import Tokenizer, load_tokenizer

logger = logging.getLogger(__name__)
SAMPLE_RANGES = 8
SAMPLE_CHARACTERS = 12_000  # per sampled byte range
SAMPLE_TEXT_CHARACTERS = 5_000


def preprocess(settings: PreprocessSettings) -> ShardManifest | None:
    """Write the shard of this task and return its manifest; None with `hash_only`. A failure keeps the finished parts."""
    started = time.monotonic()
    check_helpers()
    task = PreprocessTask(settings)
    if settings.hash_only:
        deduplication.write_hashes(task)
        return None
    if settings.deduplicate:
        deduplication.check_hashes(task)
    log_skipped_inputs(task.skipped)
    task.check_siblings()
    with _garbage_collector_off():
        tokenizer = _load_tokenizer(settings)
    dtype = choose_dtype(settings.dtype, tokenizer.vocab_size)
    unit_order(
        settings.order.reading(settings.direction, tokenizer), tokenizer, settings.order.segments
    )  # checks, before any work
    request = task.request(tokenizer, dtype)
    digest = hashlib.sha256(orjson.dumps(request)).hexdigest()
    if (manifest := _finished_shard(task, digest)) is not None:
        return manifest
    _log_start(task, tokenizer, dtype)
    with sigterm_as_interrupt(), PartStore(task.prefix, request, start_over=settings.overwrite) as store:
        if (manifest := _finished_shard(task, digest, store)) is not None:
            return manifest  # another process finished it while we waited for the lock
        try:
            manifest = make_shard(task, store, tokenizer, dtype, digest, started)
        except (LedomError, KeyboardInterrupt):
            if finished := store.num_finished():
                logger.info("%d of %d parts are kept in %s: the same command resumes", finished, len(task.parts), store.folder)
            raise
        except OSError as error:
            raise cannot_write(error, str(error.filename or task.prefix)) from error
        store.remove()
    _log_summary(task.prefix, manifest)
    return manifest


def _load_tokenizer(settings: PreprocessSettings) -> Tokenizer:
    tokenizer = load_tokenizer(
        settings.tokenizer, settings.eod_token, eod_id=settings.eod_id, add_specials=settings.add_specials
    )
    if settings.add_specials:
        tokenizer.path = f"{settings.output_prefix}.tokenizer"
        check_may_write(settings.output_prefix, overwrite=True)
        tokenizer.save(tokenizer.path)
        logger.info("the tokenizer with the five specials is in %s; train with that one", tokenizer.path)
    return tokenizer


@contextlib.contextmanager
def _garbage_collector_off() -> Iterator[None]:
    """Disable garbage collection while the vocabulary is loaded, then exempt its objects from collection.

    Loading makes a million small objects that all stay, and scanning them took 0.2 s. In a worker a scan would also copy them.
    """
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        gc.enable()


def _finished_shard(task: PreprocessTask, digest: str, store: PartStore | None = None) -> ShardManifest | None:
    """Return the manifest if the same request has finished the shard, else None. Raises UsageError for files of another request.

    Called before anything is loaded, and again with the `store`, when its lock excludes other processes.
    """
    overwrite = task.settings.overwrite
    if not overwrite and Path(f"{task.prefix}.json").exists():
        manifest = check_shard(task.prefix)
        if manifest.request_sha256 == digest:
            logger.info("%s: the same request has finished it before; nothing to do", task.prefix)
            if store is not None:
                store.remove()
            elif Path(f"{task.prefix}.work").exists():  # left by a kill
                with PartStore(task.prefix, {}, start_over=True) as left:
                    left.remove()
            return manifest
        if moved := task.moved_commit(manifest):
            raise UsageError(
                f"{task.prefix} was made from another commit{moved}; choose another --output-prefix, or replace it with --overwrite"
            )
    is_ours = Path(f"{task.prefix}.work/plan.json").exists() and not Path(f"{task.prefix}.json").exists()
    check_may_write(task.prefix, overwrite or is_ours)
    return None


def _log_start(task: PreprocessTask, tokenizer: Tokenizer, dtype: np.dtype[Any]) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread per worker; and threads do not survive a fork
    encoder = tokenizer.use_fastest_encoder(_samples(task))
    reading = task.settings.order.reading(task.settings.direction, tokenizer)
    logger.info(
        "%s: %d files, %d parts, %s order, tokenizer %s (%d ids, eod %r = %d), %s, %d workers; encoder: %s",
        *(task.prefix, len({byte_range.source.path for part in task.parts for byte_range in part}), len(task.parts)),
        *(reading.describe(), tokenizer.name, tokenizer.vocab_size, tokenizer.eod_token, tokenizer.eod_id),
        *(dtype, min(task.workers, max(1, len(task.parts))), encoder),
    )


def _samples(task: PreprocessTask) -> list[str]:
    """Return texts from all parts of the input, for the check of the tokenizer's encoder. Bad records are reported later."""
    cheap = [
        byte_range for part in task.parts for byte_range in part if not byte_range.source.compression or not byte_range.start
    ]
    chosen = [
        cheap[index] for index in sorted({len(cheap) * k // SAMPLE_RANGES for k in range(SAMPLE_RANGES)} if cheap else ())
    ]
    read = replace(task.read, on_error="skip", batch_bytes=1 << 16, keep_records=False)
    samples: list[str] = []
    for byte_range in chosen:
        size = 0
        with contextlib.suppress(DataError):
            for text in (text for batch in RecordReader(byte_range, read).batches() for text in batch.texts):
                samples.append(text[:SAMPLE_TEXT_CHARACTERS])
                size += len(samples[-1])
                if size >= SAMPLE_CHARACTERS:
                    break
    return samples


def _log_summary(prefix: str, manifest: ShardManifest) -> None:
    skipped = ", ".join(f"{number:,} {reason}" for reason, number in manifest.skipped.items()) or "none"
    seconds = manifest.elapsed_seconds
    logger.info(
        "%s: %s documents, %s tokens, %s bytes of text, skipped: %s; %.1f s, %.2f MB/s, %s tokens/s",
        *(prefix, f"{manifest.num_documents:,}", f"{manifest.num_tokens:,}", f"{manifest.text_bytes:,}", skipped),
        *(seconds, manifest.text_bytes / 1e6 / seconds, f"{manifest.num_tokens / seconds:,.0f}"),
    )

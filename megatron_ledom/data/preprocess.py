"""From raw text to a shard: read, encode, turn to model order, close with eod, write; the same bytes whatever the workers.

One process reads and writes, worker processes parse, encode and pack. Nothing here imports torch.
"""

import contextlib
import logging
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from megatron_ledom.data.corpus import BATCH_BYTES, Batch, OnError, SourceFile, expand_inputs, share_of_task, texts_of
from megatron_ledom.data.packing import pack_documents
from megatron_ledom.data.shard import Counts, DtypeName, ShardManifest, ShardWriter, check_may_write, choose_dtype
from megatron_ledom.data.tokenizer import Tokenizer, load_tokenizer
from megatron_ledom.data.worker_pool import ordered_map
from megatron_ledom.direction import Direction
from megatron_ledom.errors import DataError, UsageError

logger = logging.getLogger(__name__)

NO_TOKENS = "no_tokens"
MAX_MESSAGES = 10  # bad records that are described one by one


@dataclass(kw_only=True, slots=True)
class PreprocessSettings:
    """What tools/preprocess_data.py was asked."""

    input: list[str]
    tokenizer: str
    output_prefix: str
    direction: Direction = Direction.REVERSE
    text_key: str = "text"
    workers: int | None = None
    """Processes; default: the cores this process may use."""
    eod_token: str | None = None
    dtype: DtypeName = "auto"
    on_error: OnError = "fail"
    task_id: int | None = None
    num_tasks: int | None = None
    """Default of both: the SLURM array's."""
    overwrite: bool = False
    batch_bytes: int = BATCH_BYTES
    """Text a worker gets at a time; it changes no result."""


@dataclass(slots=True)
class Packed:
    """What a worker makes of a batch."""

    ids: npt.NDArray[Any]
    """Model order, eods included [tokens]."""
    lengths: npt.NDArray[np.int32]
    text_bytes: int
    skipped: Counter[str]
    messages: list[str] = field(default_factory=list)


@dataclass(slots=True)
class BatchEncoder:
    """The work of a worker: a batch of records to ids as they are stored."""

    tokenizer: Tokenizer
    direction: Direction
    text_key: str
    on_error: OnError
    dtype: np.dtype[Any]

    def __call__(self, batch: Batch) -> Packed:
        """Texts without tokens are counted and left out, never stored: a lone eod would shift every later document."""
        skipped: Counter[str] = Counter()
        messages: list[str] = []
        texts = texts_of(batch, self.text_key, self.on_error, skipped, messages)
        text_ids, offsets = self.tokenizer.encode_batch(texts)
        ids, lengths = pack_documents(
            text_ids,
            offsets,
            direction=self.direction,
            eod_id=self.tokenizer.eod_id,
            vocab_size=self.tokenizer.vocab_size,
            dtype=self.dtype,
        )
        has_tokens = np.diff(offsets) > 0
        text_bytes = sum(len(text.encode()) for text, is_kept in zip(texts, has_tokens, strict=True) if is_kept)
        if len(lengths) < len(texts):
            skipped[NO_TOKENS] += len(texts) - len(lengths)
        return Packed(ids, lengths, text_bytes, skipped, messages[:MAX_MESSAGES])


def task_of(settings: PreprocessSettings, environment: Mapping[str, str]) -> tuple[int, int]:
    """(task id, number of tasks): what was asked, else the SLURM array's.

    With --num-tasks alone the id is SLURM_ARRAY_TASK_ID as it is, so that single elements of an array can be run again;
    with neither, ids count from SLURM_ARRAY_TASK_MIN.
    """
    slurm_id = environment.get("SLURM_ARRAY_TASK_ID")
    if settings.num_tasks is not None:
        if settings.task_id is None and slurm_id is None and settings.num_tasks > 1:
            raise UsageError(f"--num-tasks {settings.num_tasks} without --task-id, and this is no SLURM array; give --task-id")
        return settings.task_id if settings.task_id is not None else int(slurm_id or 0), settings.num_tasks
    if settings.task_id is not None:
        raise UsageError(f"--task-id {settings.task_id} without --num-tasks; give both")
    if slurm_id is None:
        return 0, 1
    first, step = int(environment.get("SLURM_ARRAY_TASK_MIN", "0")), int(environment.get("SLURM_ARRAY_TASK_STEP") or "1")
    count, (task_id, rest) = int(environment["SLURM_ARRAY_TASK_COUNT"]), divmod(int(slurm_id) - first, step)
    if rest or task_id >= count:
        raise UsageError(
            f"SLURM_ARRAY_TASK_ID {slurm_id} of {count} tasks from {first} on: the array has gaps; give --num-tasks,"
            " and ids in 0..num-tasks - 1"
        )
    return task_id, count


def available_cores() -> int:
    """Cores this process may use: its affinity, which a batch system sets, where the platform tells it."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def preprocess(settings: PreprocessSettings) -> ShardManifest:
    """Write this task's shard and return its manifest. On any failure nothing of it stays behind."""
    if settings.workers is not None and settings.workers < 1:
        raise UsageError(f"--workers {settings.workers} is not possible; use 1 or more")
    inputs = expand_inputs(settings.input)
    task_id, num_tasks = task_of(settings, os.environ)
    files = [inputs[index] for index in share_of_task([path.stat().st_size for path in inputs], task_id, num_tasks)]
    prefix = settings.output_prefix + (f"-{task_id:05d}-of-{num_tasks:05d}" if num_tasks > 1 else "")
    check_may_write(prefix, settings.overwrite)
    tokenizer = load_tokenizer(settings.tokenizer, settings.eod_token)
    dtype = choose_dtype(settings.dtype, tokenizer.vocab_size)
    encoder = BatchEncoder(tokenizer, settings.direction, settings.text_key, settings.on_error, dtype)
    logger.info(
        "%s: %d files, %s order, tokenizer %s (%d ids, eod %r = %d), %s",
        *(
            prefix,
            len(files),
            settings.direction,
            tokenizer.name,
            tokenizer.vocab_size,
            tokenizer.eod_token,
            tokenizer.eod_id,
            dtype,
        ),
    )
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread a worker; it changes no result
    provenance = tokenizer.provenance(settings.direction)
    with _sigterm_as_interrupt(), ShardWriter(prefix, provenance, dtype, overwrite=settings.overwrite) as writer:
        return _write(writer, files, encoder, settings)


@contextlib.contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """The end of a batch job cleans up as Ctrl-C does."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _write(writer: ShardWriter, files: list[Path], encoder: BatchEncoder, settings: PreprocessSettings) -> ShardManifest:
    started = time.monotonic()
    counts = Counts(tokenizer_path=str(Path(settings.tokenizer).resolve()), eod_token=encoder.tokenizer.eod_token)
    skipped: Counter[str] = Counter()
    num_messages = 0
    workers = settings.workers or available_cores()
    batches = _batches(files, settings, counts)
    for packed in ordered_map(encoder, batches, workers, lambda batch: batch.where):
        writer.append(packed.ids, packed.lengths)
        counts.text_bytes += packed.text_bytes
        skipped += packed.skipped
        for message in packed.messages[: MAX_MESSAGES - num_messages]:
            logger.warning("skipped %s", message)
        num_messages += len(packed.messages)
    counts.skipped = dict(sorted(skipped.items()))
    if not writer.num_documents:
        raise DataError(f"no document with a token in {len(files)} input files (skipped: {counts.skipped}); check --input")
    manifest = writer.finalize(counts)
    _log_summary(writer.prefix, manifest, time.monotonic() - started)
    return manifest


def _batches(files: list[Path], settings: PreprocessSettings, counts: Counts) -> Iterator[Batch]:
    """Batches of all files, with a bar of the bytes read; each finished file is entered into `counts`."""
    total = sum(path.stat().st_size for path in files)
    with tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1000, desc="preprocess", disable=None) as bar:
        before = 0
        for path in files:
            source = SourceFile(path)
            for batch in source.batches(settings.text_key, settings.batch_bytes):
                yield batch
                bar.update(before + batch.position - bar.n)
            counts.input_files.append(source.record())
            before += source.record().num_bytes


def _log_summary(prefix: str, manifest: ShardManifest, seconds: float) -> None:
    skipped = ", ".join(f"{number:,} {reason}" for reason, number in manifest.skipped.items()) or "none"
    logger.info(
        "%s: %s documents, %s tokens, %s bytes of text, skipped: %s; %.1f s, %.2f MB/s, %s tokens/s",
        *(prefix, f"{manifest.num_documents:,}", f"{manifest.num_tokens:,}", f"{manifest.text_bytes:,}", skipped),
        *(seconds, manifest.text_bytes / 1e6 / seconds, f"{manifest.num_tokens / seconds:,.0f}"),
    )

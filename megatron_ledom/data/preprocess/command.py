"""From raw text to a shard: read, encode, turn to model order, close with eod, write; the same bytes whatever the workers.

A task's stretch of the corpus is cut into parts. Workers encode one part each into a file of its own, which is finished or does
not exist; this process joins finished parts in order while the next ones are made. Killed at any moment and started again, it
goes on from the finished parts. Nothing here imports torch.
"""

import contextlib
import gc
import glob
import hashlib
import logging
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.sharedctypes import RawArray
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
from tqdm import tqdm

from megatron_ledom.data.preprocess import quality
from megatron_ledom.data.preprocess.encode_parts import PartEncoder, PartHasher
from megatron_ledom.data.preprocess.part_store import PartRecord, PartStore
from megatron_ledom.data.readers.corpus import (
    BATCH_BYTES,
    MAX_MESSAGES,
    OnError,
    ReadSettings,
    RecordReader,
    option_to_check,
    template_of,
)
from megatron_ledom.data.readers.folder_walk import as_records, printable
from megatron_ledom.data.readers.inputs import Part, find_inputs, log_left_out, parts_of, stretches_of_task
from megatron_ledom.data.readers.streams import MAX_RECORD_BYTES
from megatron_ledom.data.shards.prefixes import TASK, task_prefix
from megatron_ledom.data.shards.shard import (
    Counts,
    DtypeName,
    InputFile,
    ShardManifest,
    ShardWriter,
    check_may_write,
    check_shard,
    choose_dtype,
    existing_files,
    load_manifest,
)
from megatron_ledom.direction import Direction
from megatron_ledom.errors import DataError, LedomError, UsageError, cannot_write, visible
from megatron_ledom.platform.processes import ordered_map
from megatron_ledom.platform.slurm import array_task_id, read_array
from megatron_ledom.storage.jobs import Request
from megatron_ledom.storage.locks import output_file_lock
from megatron_ledom.storage.signals import sigterm_as_interrupt
from megatron_ledom.tokenizers.corpus_tokenizer import Tokenizer, load_tokenizer

logger = logging.getLogger(__name__)

SAMPLE_STRETCHES = 8
SAMPLE_CHARACTERS = 12_000  # of each sampled stretch
SAMPLE_TEXT_CHARACTERS = 5_000


@dataclass(kw_only=True, slots=True)
class PreprocessSettings:
    """What tools/preprocess_data.py was asked."""

    input: list[str]
    tokenizer: str
    output_prefix: str
    direction: Direction = Direction.REVERSE
    text_key: str = "text"
    text_template: str | None = None
    """`{key}` for the text of each key that is joined, in place of `text_key`; see `text_template`."""
    workers: int | None = None
    """Processes; default: the cores this process may use."""
    eod_token: str | None = None
    eod_id: int | None = None
    bos_token: str | None = None
    add_specials: bool = False
    """Give the tokenizer the five specials of the original first; its eod then is <EOD>."""
    dtype: DtypeName = "auto"
    on_error: OnError = "fail"
    max_record_bytes: int = MAX_RECORD_BYTES
    min_tokens: int = 1
    max_tokens: int | None = None
    """Documents with fewer or more tokens, without eod, are left out."""
    filter: str | None = None
    """`module:function` that is asked (text, record) whether to keep a document."""
    deduplicate: bool = False
    hash_only: bool = False
    """Only write the hashes that `deduplicate` of the tasks of an array needs."""
    shuffle_seed: int | None = None
    task_id: int | None = None
    num_tasks: int | None = None
    """Default of both: the SLURM array's."""
    overwrite: bool = False
    batch_bytes: int = BATCH_BYTES
    """Text a tokenizer gets at a time; it changes no result."""
    part_bytes: int | None = None
    """Input a worker gets at a time; it changes no result. None: by the size of the input."""


def task_of(settings: PreprocessSettings, environment: Mapping[str, str]) -> tuple[int, int]:
    """(task id, number of tasks): what was asked, else the SLURM array's.

    With --num-tasks alone the id is SLURM_ARRAY_TASK_ID as it is, so that single elements of an array can be run again;
    with neither, ids count from SLURM_ARRAY_TASK_MIN.
    """
    if settings.num_tasks is not None:
        if settings.task_id is not None:
            return settings.task_id, settings.num_tasks
        slurm_id = array_task_id(environment)
        if slurm_id is None and settings.num_tasks > 1:
            raise UsageError(f"--num-tasks {settings.num_tasks} without --task-id, and this is no SLURM array; give --task-id")
        return slurm_id or 0, settings.num_tasks
    if settings.task_id is not None:
        raise UsageError(f"--task-id {settings.task_id} without --num-tasks; give both")
    array = read_array(environment)
    if array is None:
        return 0, 1
    if array.count == 1:
        raise UsageError(
            f"this SLURM array has the one task {array.task_id}, which may be all of an array or one of it run again; give"
            " --num-tasks"
        )
    task_id, rest = divmod(array.task_id - array.first, array.step)
    has_gaps = rest or array.last != array.first + (array.count - 1) * array.step
    if has_gaps or not 0 <= task_id < array.count:
        raise UsageError(
            f"SLURM_ARRAY_TASK_ID {array.task_id} of {array.count} tasks from {array.first} on: the array has gaps; give"
            " --num-tasks, and ids in 0..num-tasks - 1"
        )
    return task_id, array.count


def available_cores() -> int:
    """Cores this process may use: its affinity, which a batch system sets, where the platform tells it."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Preprocessing:
    """One task: everything that follows from the settings before anything is written."""

    def __init__(self, settings: PreprocessSettings) -> None:
        _check_numbers(settings)
        self.settings = settings
        self.sources, self.left_out = find_inputs(settings.input)
        self.task_id, self.num_tasks = task_of(settings, os.environ)
        stretches = stretches_of_task(self.sources, self.task_id, self.num_tasks)
        self.parts = parts_of(stretches, settings.part_bytes)
        self.prefix = self.prefix_of(self.task_id)
        self.workers = settings.workers or available_cores()
        self.keep = quality.load_filter(settings.filter) if settings.filter else None
        self.read = ReadSettings(
            text_key=settings.text_key,
            template=template_of(settings.text_template, settings.text_key),
            on_error=settings.on_error,
            batch_bytes=settings.batch_bytes,
            max_record_bytes=settings.max_record_bytes,
            keep_records=self.keep is not None,
        )
        if settings.deduplicate and not settings.hash_only:
            quality.check_hashes([self.prefix_of(task) for task in range(self.task_id)], self.reading_request())

    def prefix_of(self, task_id: int) -> str:
        """Where a task's shard goes."""
        base = self.settings.output_prefix
        return task_prefix(base, task_id, self.num_tasks) if self.num_tasks > 1 else base

    def inputs_sha256(self) -> str:
        """Of what the tasks divide among them."""
        inputs = [(source.path, source.num_bytes, source.version) for source in self.sources]
        return hashlib.sha256(orjson.dumps([inputs, self.num_tasks])).hexdigest()

    def check_siblings(self) -> None:
        """Refuse to run beside tasks that divided other inputs: the borders between tasks would not be theirs."""
        base = self.settings.output_prefix
        others = {
            int(match["count"])
            for match in map(TASK.match, glob.glob(f"{glob.escape(base)}-*-of-*.json"))
            if match and match["base"] == base
        }
        if self.num_tasks > 1 and others - {self.num_tasks} and not self.settings.overwrite:
            raise UsageError(
                f"{base} has shards of {max(others - {self.num_tasks})} tasks, this would be one of {self.num_tasks}; to run tasks of"
                " that array again give its --num-tasks, else choose another --output-prefix"
            )
        for task_id in range(self.num_tasks if self.num_tasks > 1 else 0):
            prefix = self.prefix_of(task_id)
            if task_id == self.task_id or not Path(f"{prefix}.json").exists():
                continue
            if load_manifest(prefix).inputs_sha256 != self.inputs_sha256() and not self.settings.overwrite:
                raise UsageError(
                    f"{prefix} was made when the inputs were not the same as now, and tasks share the inputs' bytes: run all"
                    " tasks again with --overwrite, or choose another --output-prefix"
                )
            return  # one stands for all; tools/summarize_tasks.py compares them all

    def reading_request(self) -> Request:
        """What decides which documents there are, for all tasks alike."""
        settings = self.settings
        request: Request = {
            "input": [(source.path, source.num_bytes, source.version) for source in self.sources],
            "text_key": settings.text_key,
            "on_error": settings.on_error,
            "max_record_bytes": settings.max_record_bytes,
            "num_tasks": self.num_tasks,
        }
        return request if settings.text_template is None else {**request, "text_template": settings.text_template}

    def request(self, tokenizer: Tokenizer, dtype: np.dtype[Any]) -> Request:
        """What decides the content of the shard."""
        settings = self.settings
        chosen = ("bos_token", "min_tokens", "max_tokens", "filter", "deduplicate", "shuffle_seed", "part_bytes")
        request = {
            **self.reading_request(),
            **{name: getattr(settings, name) for name in chosen},
            "filter_source": quality.source_hash(self.keep) if self.keep else None,
            "task_id": self.task_id,
            "direction": str(settings.direction),
            "tokenizer": tokenizer.sha256,
            "eod_token": tokenizer.eod_token,
            "dtype": dtype.name,
        }
        if tokenizer.is_eod_made_text:  # earlier versions let it end documents in their middle: their work is not this one
            request["is_eod_made_text"] = True
        return dict(orjson.loads(orjson.dumps(request)))


def _check_numbers(settings: PreprocessSettings) -> None:
    for name in ("workers", "min_tokens", "max_tokens", "max_record_bytes", "batch_bytes", "part_bytes"):
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} {value} is not possible; use 1 or more")
    if settings.max_tokens is not None and settings.max_tokens < settings.min_tokens:
        raise UsageError(
            f"--max-tokens {settings.max_tokens} is below --min-tokens {settings.min_tokens}; nothing would be left"
        )
    if settings.bos_token == "":
        raise UsageError("--bos-token is empty; name a token of the tokenizer, or leave it out for none")
    if settings.eod_token is not None and settings.eod_id is not None:
        raise UsageError("--eod-token and --eod-id name the same thing; give one of them")


def preprocess(settings: PreprocessSettings) -> ShardManifest | None:
    """Write this task's shard and return its manifest; None after `hash_only`. What is unfinished stays for the next start."""
    started = time.monotonic()
    work = Preprocessing(settings)
    if settings.hash_only:
        _hash_task(work)
        return None
    log_left_out(work.left_out)
    work.check_siblings()
    with _garbage_collector_off():
        tokenizer = _load_tokenizer(settings)
    dtype = choose_dtype(settings.dtype, tokenizer.vocab_size)
    request = work.request(tokenizer, dtype)
    digest = hashlib.sha256(orjson.dumps(request)).hexdigest()
    if (manifest := _finished_shard(work, digest)) is not None:
        return manifest
    _log_start(work, tokenizer, dtype)
    with sigterm_as_interrupt(), PartStore(work.prefix, request, start_over=settings.overwrite) as store:
        if (manifest := _finished_shard(work, digest, store)) is not None:
            return manifest  # by another process, until it gave up the lock
        try:
            manifest = _make_shard(work, store, tokenizer, dtype, digest, started)
        except (LedomError, KeyboardInterrupt):
            if finished := store.num_finished():
                logger.info("%d of %d parts are kept in %s: the same command goes on", finished, len(work.parts), store.folder)
            raise
        except OSError as error:
            raise cannot_write(error, str(error.filename or work.prefix)) from error
        store.remove()
    _log_summary(work.prefix, manifest)
    return manifest


@contextlib.contextmanager
def _garbage_collector_off() -> Iterator[None]:
    """Loading a vocabulary makes a million small objects that all stay; looking among them for garbage took 0.2 s.

    They are then kept from being looked at again, also by the workers, to which looking would mean copying.
    """
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        gc.enable()


def _load_tokenizer(settings: PreprocessSettings) -> Tokenizer:
    tokenizer = load_tokenizer(
        settings.tokenizer, settings.eod_token, eod_id=settings.eod_id, add_specials=settings.add_specials
    )
    if settings.add_specials:
        tokenizer.path = f"{settings.output_prefix}.tokenizer"
        check_may_write(settings.output_prefix, overwrite=True)
        tokenizer.save(tokenizer.path)
        logger.info("the tokenizer with the five specials is in %s; train with that", tokenizer.path)
    return tokenizer


def _finished_shard(work: Preprocessing, digest: str, store: PartStore | None = None) -> ShardManifest | None:
    """The shard if this very request made it. Raises UsageError when another one's files are in the way.

    Called before anything is loaded, and again with the `store`, whose lock keeps other processes from finishing it meanwhile.
    """
    overwrite = work.settings.overwrite
    if not overwrite and Path(f"{work.prefix}.json").exists():
        manifest = check_shard(work.prefix)
        if manifest.request_sha256 == digest:
            logger.info("%s: finished before by the same request; nothing to do", work.prefix)
            if store is not None:
                store.remove()
            elif Path(f"{work.prefix}.work").exists():  # a kill may have left it
                with PartStore(work.prefix, {}, start_over=True) as left:
                    left.remove()
            return manifest
    is_ours = Path(f"{work.prefix}.work/plan.json").exists() and not Path(f"{work.prefix}.json").exists()
    check_may_write(work.prefix, overwrite or is_ours)
    return None


def _log_start(work: Preprocessing, tokenizer: Tokenizer, dtype: np.dtype[Any]) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread a worker; and threads do not survive a fork
    engine = tokenizer.use_fastest_engine(_samples(work))
    logger.info(
        "%s: %d files, %d parts, %s order, tokenizer %s (%d ids, eod %r = %d), %s, %d workers; engine: %s",
        *(work.prefix, len({stretch.source.path for part in work.parts for stretch in part}), len(work.parts)),
        *(work.settings.direction, tokenizer.name, tokenizer.vocab_size, tokenizer.eod_token, tokenizer.eod_id),
        *(dtype, min(work.workers, max(1, len(work.parts))), engine),
    )


def _samples(work: Preprocessing) -> list[str]:
    """Real texts from all over the task's stretch, for the check of the tokenizer's engine; bad records are met later."""
    cheap = [stretch for part in work.parts for stretch in part if not stretch.source.compression or not stretch.start]
    chosen = [
        cheap[index] for index in sorted({len(cheap) * k // SAMPLE_STRETCHES for k in range(SAMPLE_STRETCHES)} if cheap else ())
    ]
    read = replace(work.read, on_error="skip", batch_bytes=1 << 16, keep_records=False)
    samples: list[str] = []
    for stretch in chosen:
        size = 0
        with contextlib.suppress(DataError):
            for text in (text for batch in RecordReader(stretch, read).batches() for text in batch.texts):
                samples.append(text[:SAMPLE_TEXT_CHARACTERS])
                size += len(samples[-1])
                if size >= SAMPLE_CHARACTERS:
                    break
    return samples


def _make_shard(
    work: Preprocessing, store: PartStore, tokenizer: Tokenizer, dtype: np.dtype[Any], digest: str, started: float
) -> ShardManifest:
    """Encode what is not finished yet and join all parts, in order, while later ones are made; or shuffled, at the end."""
    encoder = PartEncoder(
        parts=work.parts,
        paths=[store.part_path(number) for number in range(len(work.parts))],
        read=work.read,
        tokenizer=tokenizer,
        direction=work.settings.direction,
        dtype=dtype,
        bos_id=tokenizer.token_id(work.settings.bos_token) if work.settings.bos_token else None,
        min_tokens=work.settings.min_tokens,
        max_tokens=work.settings.max_tokens,
        keep=work.keep,
        is_first=_first_occurrences(work) if work.settings.deduplicate else None,
        progress=_shared_counters(work),
    )
    seed, sums, provenance = work.settings.shuffle_seed, Sums(), tokenizer.provenance(work.settings.direction)
    with ShardWriter(work.prefix, provenance, dtype, overwrite=bool(existing_files(work.prefix))) as writer:
        for number, record in enumerate(_records(encoder, work, store)):
            sums.add(record)
            if seed is None:
                store.append_to(writer, number, record)
        if seed is not None:
            for packed, lengths in quality.shuffled_documents(encoder.paths, dtype, seed + work.task_id):
                writer.append(packed, lengths)
        _log_skipped(work, sums)
        if not writer.num_documents and work.num_tasks == 1:
            store.remove()
            reasons = dict(sorted(sums.skipped.items()))
            advice = option_to_check(work.read.template, work.read.text_key, reasons)
            raise DataError(f"no document with a token in {len(work.sources)} input files (skipped: {reasons}); {advice}")
        counts = Counts(
            text_bytes=sums.text_bytes,
            skipped=dict(sorted(sums.skipped.items())),
            input_files=sums.input_files,
            tokenizer_path=printable(str(Path(tokenizer.path).resolve())),
            eod_token=tokenizer.eod_token,
            bos_token=work.settings.bos_token or "",
            text_template=work.settings.text_template or "",
            skipped_inputs=as_records(work.left_out),
            elapsed_seconds=round(time.monotonic() - started + sums.earlier_seconds / work.workers, 3),
            request_sha256=digest,
            inputs_sha256=work.inputs_sha256(),
        )
        return writer.finalize(counts)


@dataclass(slots=True)
class Sums:
    """Over the parts so far."""

    earlier_seconds: float = 0.0
    """Worker time of parts that an earlier run made."""
    text_bytes: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    messages: list[str] = field(default_factory=list)
    input_files: list[InputFile] = field(default_factory=list)

    def add(self, record: PartRecord) -> None:
        """Enter the next part."""
        self.earlier_seconds += record.seconds
        self.text_bytes += record.text_bytes
        self.skipped += Counter(record.skipped)
        self.messages += record.messages[: MAX_MESSAGES - len(self.messages)]
        self.input_files += record.input_files


def _records(encoder: PartEncoder, work: Preprocessing, store: PartStore) -> Iterator[PartRecord]:
    """The records of all parts in order; what is not finished is made."""
    finished = {number: record for number in range(len(work.parts)) if (record := store.intact(number)) is not None}
    if finished:
        logger.info("%s: %d of %d parts were finished before", work.prefix, len(finished), len(work.parts))
    made = _run(encoder, [number for number in range(len(work.parts)) if number not in finished], work, "preprocess")
    for number in range(len(work.parts)):
        yield finished[number] if number in finished else replace(next(made), seconds=0.0)
    for _ in made:  # ends the workers and the bar
        pass


def _shared_counters(work: Preprocessing) -> Any:
    return RawArray("q", max(1, len(work.parts)))


def _run(function: Any, numbers: Sequence[int], work: Preprocessing, name: str) -> Iterator[Any]:
    """The function of some parts, with a bar of the bytes read."""
    sizes = [sum(stretch.num_bytes for stretch in part) for part in work.parts]
    total = sum(sizes)
    before = total - sum(sizes[number] for number in numbers)
    with tqdm(total=total, initial=before, unit="B", unit_scale=True, unit_divisor=1000, desc=name, disable=None) as bar:

        def show() -> None:
            bar.update(before + sum(function.progress) - bar.n)

        yield from ordered_map(function, numbers, work.workers, lambda number: _named(work.parts[number]), show)
        bar.update(total - bar.n)


def _named(part: Part) -> str:
    first = part[0]
    return f"{first.source.path}, bytes {first.start:,} to {first.end:,}" + (
        f" and {len(part) - 1} more" if len(part) > 1 else ""
    )


def _log_skipped(work: Preprocessing, sums: Sums) -> None:
    for message in sums.messages:
        logger.warning("skipped %s", visible(message))
    empty = [source.path for source in work.sources if not source.num_bytes]
    if empty:
        logger.warning("%d input files are empty, for example %s", len(empty), empty[0])


def _hash_task(work: Preprocessing) -> None:
    """The first pass of deduplication over an array."""
    check_may_write(work.prefix, overwrite=True)
    Path(work.prefix).parent.mkdir(parents=True, exist_ok=True)
    hasher = PartHasher(parts=work.parts, read=work.read, progress=_shared_counters(work))
    with output_file_lock(work.prefix, "--output-prefix"):
        hashes = list(_run(hasher, range(len(work.parts)), work, "hash"))
        quality.write_hashes(work.prefix, work.reading_request(), hashes)
    logger.info("%s: hashes of %s documents", work.prefix, f"{sum(map(len, hashes)):,}")


def _first_occurrences(work: Preprocessing) -> list[npt.NDArray[np.bool_]]:
    """Of each part, which documents are the first with their text in all tasks up to this one."""
    request = work.reading_request()
    hasher = PartHasher(parts=work.parts, read=work.read, progress=_shared_counters(work))
    own = list(_run(hasher, range(len(work.parts)), work, "hash"))
    earlier = (quality.read_hashes(work.prefix_of(task), request) for task in range(work.task_id))
    is_first = quality.first_occurrences(np.concatenate([np.empty((0, 2), np.uint64), *own]), earlier)
    return np.split(is_first, np.cumsum([len(part) for part in own])[:-1]) if own else []


def _log_summary(prefix: str, manifest: ShardManifest) -> None:
    skipped = ", ".join(f"{number:,} {reason}" for reason, number in manifest.skipped.items()) or "none"
    seconds = manifest.elapsed_seconds
    logger.info(
        "%s: %s documents, %s tokens, %s bytes of text, skipped: %s; %.1f s, %.2f MB/s, %s tokens/s",
        *(prefix, f"{manifest.num_documents:,}", f"{manifest.num_tokens:,}", f"{manifest.text_bytes:,}", skipped),
        *(seconds, manifest.text_bytes / 1e6 / seconds, f"{manifest.num_tokens / seconds:,.0f}"),
    )

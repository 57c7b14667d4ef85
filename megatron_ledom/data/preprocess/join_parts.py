"""Join the finished parts to a shard: in order while later ones are made, or shuffled at the end."""

import gc
import logging
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_ledom.contamination.report import ContaminationCounts, describe, report_of
from megatron_ledom.contamination.search import Searcher
from megatron_ledom.data.decontaminate.batches import CONTAMINATED
from megatron_ledom.data.preprocess import deduplication
from megatron_ledom.data.preprocess.encode_parts import PartEncoder
from megatron_ledom.data.preprocess.part_store import PartRecord, PartStore
from megatron_ledom.data.preprocess.task import PreprocessTask
from megatron_ledom.data.readers.records import MAX_MESSAGES, option_to_check
from megatron_ledom.data.shards.model_order import unit_order
from megatron_ledom.data.shards.shard import Counts, ShardManifest, ShardWriter, existing_files, printable
from megatron_ledom.errors import DataError, visible
from megatron_ledom.storage.files import withdraw, write_json
from megatron_ledom.tokenizers.corpus_tokenizer import Tokenizer

logger = logging.getLogger(__name__)
CONTAMINATION_SUFFIX = ".contamination"
"""Ending of the report on evaluation items, a JSON file."""
GATHERED_TOKENS = 1 << 22
"""Limit on the tokens of shuffled documents that are written at a time. A longer document is written alone."""
GATHERED_DOCUMENTS = 1 << 16


def make_shard(
    task: PreprocessTask, store: PartStore, tokenizer: Tokenizer, dtype: np.dtype[Any], digest: str, started: float
) -> ShardManifest:
    """Encode the unfinished parts and join all parts to the shard. Returns its manifest."""
    searcher = None if task.settings.decontamination is None else Searcher(task.settings.decontamination)
    if searcher is not None:
        searcher.check_items()
    reading = task.settings.order.reading(task.settings.direction, tokenizer)
    gc.freeze()  # as in `pipeline`: the items stay, and a scan would copy them into every worker
    encoder = PartEncoder(
        parts=task.parts,
        paths=[store.part_path(number) for number in range(len(task.parts))],
        read=task.read,
        tokenizer=tokenizer,
        order=unit_order(reading, tokenizer, task.settings.order.segments),
        dtype=dtype,
        bos_id=tokenizer.token_id(task.settings.bos_token) if task.settings.bos_token else None,
        min_tokens=task.settings.min_tokens,
        max_tokens=task.settings.max_tokens,
        keep=task.keep,
        searcher=searcher,
        is_first=deduplication.documents_to_keep(task) if task.settings.deduplicate else None,
    )
    counts = Counts(
        tokenizer_path=printable(str(Path(tokenizer.path).resolve())),
        eod_token=tokenizer.eod_token,
        bos_token=task.settings.bos_token or "",
        text_template=task.settings.text_template or "",
        skipped_inputs=[asdict(entry) for entry in task.skipped],
        request_sha256=digest,
        inputs_sha256=task.inputs_sha256(),
        source=task.settings.source,
        reading_tokens=task.settings.order.stored(),
    )
    seed, provenance = task.settings.shuffle_seed, tokenizer.provenance(reading.direction).of_readings(reading)
    messages, contamination = list[str](), ContaminationCounts()
    earlier_seconds = 0.0  # worker time of the parts from an earlier run
    with ShardWriter(task.prefix, provenance, dtype, overwrite=bool(existing_files(task.prefix))) as writer:
        for number, record in enumerate(_records(encoder, task, store)):
            _add(record, counts, messages)
            contamination.add(ContaminationCounts(**record.contamination))
            earlier_seconds += record.seconds
            if seed is None:
                store.append_to(writer, number, record)
        if seed is not None:
            for ids, lengths in _shuffled_documents(encoder.paths, dtype, seed + task.task_id):
                writer.append(ids, lengths)
        _log_skipped(task, messages)
        counts.skipped = dict(sorted(counts.skipped.items()))
        if not writer.num_documents and task.num_tasks == 1:
            store.remove()
            advice = option_to_check(task.read.template, task.read.text_key, counts.skipped)
            if CONTAMINATED in counts.skipped:
                advice = f"{counts.skipped[CONTAMINATED]:,} of them have evaluation items: `ledom decontaminate` reports which"
            raise DataError(
                f"found no document with a token in {len(task.sources)} input files (skipped: {counts.skipped}); {advice}"
            )
        _report_contamination(task, encoder.searcher, contamination, counts)
        counts.elapsed_seconds = round(time.monotonic() - started + earlier_seconds / task.workers, 3)
        return writer.finalize(counts)


def _report_contamination(
    task: PreprocessTask, searcher: Searcher | None, contamination: ContaminationCounts, counts: Counts
) -> None:
    """Write PREFIX.contamination, before the manifest; without a search remove that of an earlier shard."""
    path = f"{task.prefix}{CONTAMINATION_SUFFIX}"
    if searcher is None or task.settings.decontamination is None:
        withdraw(path)
        return
    report = report_of(contamination, searcher, task.settings.decontamination)
    write_json(path, report)
    counts.decontamination = {name: report[name] for name in ("settings", "documents", "sets")}
    logger.info("%s: %s\n%s", task.prefix, "evaluation items in the text:", describe(report))


def _add(record: PartRecord, counts: Counts, messages: list[str]) -> None:
    """Add the record of the next part to the counts and messages."""
    counts.text_bytes += record.text_bytes
    counts.skipped = Counter(counts.skipped) + Counter(record.skipped)
    counts.input_files += record.input_files
    messages += record.messages[: MAX_MESSAGES - len(messages)]


def _records(encoder: PartEncoder, task: PreprocessTask, store: PartStore) -> Iterator[PartRecord]:
    """Yield the records of all parts in order, and make the unfinished ones."""
    finished = {number: record for number in range(len(task.parts)) if (record := store.intact(number)) is not None}
    if finished:
        logger.info("%s: %d of %d parts were finished before", task.prefix, len(finished), len(task.parts))
    made = task.map_parts(encoder, [number for number in range(len(task.parts)) if number not in finished], "preprocess")
    for number in range(len(task.parts)):
        yield finished[number] if number in finished else replace(next(made), seconds=0.0)
    for _ in made:  # finishes the workers and the progress bar
        pass


def _shuffled_documents(
    paths: Sequence[str], dtype: np.dtype[Any], seed: int
) -> Iterator[tuple[npt.NDArray[Any], npt.NDArray[np.int32]]]:
    """Yield (ids, lengths) of all documents of the parts in random order, in arrays of bounded size. paths: without ending.

    The order depends only on the number of documents and the seed. Memory: 28 bytes per document.
    """
    parts = [np.fromfile(f"{path}.len", np.int32) for path in paths]
    ids = [np.memmap(f"{path}.bin", dtype, "r") if len(part) else None for path, part in zip(paths, parts, strict=True)]
    lengths = np.concatenate([np.empty(0, np.int32), *parts])
    part_of = np.repeat(np.arange(len(parts), dtype=np.int32), [len(part) for part in parts])
    starts = np.concatenate([np.empty(0, np.int64), *(np.cumsum(part, dtype=np.int64) - part for part in parts)])
    order = np.random.default_rng(seed).permutation(len(lengths))
    begin = 0
    while begin < len(order):
        ends = np.cumsum(lengths[order[begin : begin + GATHERED_DOCUMENTS]], dtype=np.int64)
        chosen = order[begin : begin + max(1, int(np.searchsorted(ends, GATHERED_TOKENS, "right")))]
        yield np.concatenate([ids[part_of[k]][starts[k] : starts[k] + lengths[k]] for k in chosen.tolist()]), lengths[chosen]
        begin += len(chosen)


def _log_skipped(task: PreprocessTask, messages: list[str]) -> None:
    for message in messages:
        logger.warning("skipped %s", visible(message))
    empty = [source.path for source in task.sources if not source.num_bytes]
    if empty:
        logger.warning("%d input files are empty, for example %s", len(empty), empty[0])

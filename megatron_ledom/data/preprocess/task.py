"""One task of preprocessing: what was asked, the byte ranges of the inputs it reads, and the request that decides its bytes."""

import glob
import hashlib
import importlib
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from tqdm import tqdm

from megatron_ledom.data.preprocess.encode_parts import Filter, PartWork
from megatron_ledom.data.readers.byte_ranges import Part, byte_ranges_of_task, parts_of
from megatron_ledom.data.readers.input_files import find_inputs
from megatron_ledom.data.readers.records import BATCH_BYTES, OnError, ReadSettings
from megatron_ledom.data.readers.streams import MAX_RECORD_BYTES
from megatron_ledom.data.readers.text_template import template_of
from megatron_ledom.data.shards.prefixes import TASK, task_prefix
from megatron_ledom.data.shards.shard import DtypeName, load_manifest
from megatron_ledom.direction import Direction
from megatron_ledom.errors import UsageError
from megatron_ledom.platform.processes import ordered_map
from megatron_ledom.platform.slurm import array_task_id, read_array
from megatron_ledom.storage.hashes import sha256_of
from megatron_ledom.storage.jobs import Request
from megatron_ledom.tokenizers.corpus_tokenizer import Tokenizer

logger = logging.getLogger(__name__)


@dataclass(kw_only=True, slots=True)
class PreprocessSettings:
    """Options of `ledom preprocess-data`."""

    input: list[str]
    tokenizer: str
    output_prefix: str
    direction: Direction = Direction.REVERSE
    text_key: str = "text"
    text_template: str | None = None
    """`{key}` for the text of each key that is joined, in place of `text_key`; see `TextTemplate`."""
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


class PreprocessTask:
    """One task: everything that follows from the settings before anything is written."""

    def __init__(self, settings: PreprocessSettings) -> None:
        _check_numbers(settings)
        self.settings = settings
        self.sources, self.skipped = find_inputs(settings.input)
        self.task_id, self.num_tasks = task_of(settings, os.environ)
        byte_ranges = byte_ranges_of_task(self.sources, self.task_id, self.num_tasks)
        self.parts = parts_of(byte_ranges, settings.part_bytes)
        self.prefix = self.prefix_of(self.task_id)
        self.workers = settings.workers or (
            len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        )
        self.keep = load_filter(settings.filter) if settings.filter else None
        self.read = ReadSettings(
            text_key=settings.text_key,
            template=template_of(settings.text_template, settings.text_key),
            on_error=settings.on_error,
            batch_bytes=settings.batch_bytes,
            max_record_bytes=settings.max_record_bytes,
            keep_records=self.keep is not None,
        )

    def prefix_of(self, task_id: int) -> str:
        """Where a task's shard goes."""
        base = self.settings.output_prefix
        return task_prefix(base, task_id, self.num_tasks) if self.num_tasks > 1 else base

    def map_parts(self, function: PartWork, numbers: Sequence[int], name: str) -> Iterator[Any]:
        """Yield what the function returns for some parts, in order, from the workers, with a bar of the bytes read."""
        sizes = [sum(byte_range.num_bytes for byte_range in part) for part in self.parts]
        total = sum(sizes)
        before = total - sum(sizes[number] for number in numbers)
        with tqdm(total=total, initial=before, unit="B", unit_scale=True, unit_divisor=1000, desc=name, disable=None) as bar:

            def show() -> None:
                bar.update(before + sum(function.progress) - bar.n)

            yield from ordered_map(function, numbers, self.workers, lambda number: _named(self.parts[number]), show)
            bar.update(total - bar.n)

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
            return  # one stands for all; ledom summarize-tasks compares them all

    def reading_request(self) -> Request:
        """Return what decides which documents there are, for all tasks alike."""
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
        """Return what decides the content of the shard."""
        settings = self.settings
        chosen = ("bos_token", "min_tokens", "max_tokens", "filter", "deduplicate", "shuffle_seed", "part_bytes")
        request = {
            **self.reading_request(),
            **{name: getattr(settings, name) for name in chosen},
            "filter_source": source_hash(self.keep) if self.keep else None,
            "task_id": self.task_id,
            "direction": str(settings.direction),
            "tokenizer": tokenizer.sha256,
            "eod_token": tokenizer.eod_token,
            "dtype": dtype.name,
        }
        if tokenizer.is_eod_forced_to_text:  # earlier versions let it end documents in their middle: their work is not this one
            request["is_eod_made_text"] = True
        return dict(orjson.loads(orjson.dumps(request)))


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


def load_filter(name: str) -> Filter:
    """Return the function that `module:function` names."""
    module_name, _, function_name = name.partition(":")
    if not module_name or not function_name:
        raise UsageError(f"--filter {name} is not of the form module:function")
    if "" not in sys.path:
        sys.path.insert(0, "")  # as `python -m` does: the folder the command is started in
    try:
        found = getattr(importlib.import_module(module_name), function_name)
    except Exception as error:  # it is the user's code
        kind = type(error).__name__
        raise UsageError(f"--filter {name} cannot be loaded ({kind}: {error}); check the name, and PYTHONPATH") from error
    if not callable(found):
        raise UsageError(f"--filter {name} is no function; name one that takes (text, record) and returns whether to keep it")
    return found  # type: ignore[no-any-return]


def source_hash(keep: Filter) -> str:
    """SHA-256 of the file a filter is in: what an edited filter left out is not what the new one would."""
    file = getattr(sys.modules.get(keep.__module__), "__file__", None)
    return sha256_of(file) if file and Path(file).is_file() else "unknown"


def _named(part: Part) -> str:
    first = part[0]
    return f"{first.source.path}, bytes {first.start:,} to {first.end:,}" + (
        f" and {len(part) - 1} more" if len(part) > 1 else ""
    )

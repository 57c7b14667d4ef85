"""One task of preprocessing: its options, the byte ranges that it reads, and the request that determines its result."""

import glob
import hashlib
import importlib
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from tqdm import tqdm

from megatron_ledom.contamination.search import Decontamination
from megatron_ledom.data.preprocess.encode_parts import Filter, PartWork
from megatron_ledom.data.readers.byte_ranges import Part, byte_ranges_of_task, parts_of
from megatron_ledom.data.readers.input_files import find_inputs
from megatron_ledom.data.readers.records import BATCH_BYTES, OnError, ReadSettings
from megatron_ledom.data.readers.streams import MAX_RECORD_BYTES
from megatron_ledom.data.readers.text_template import template_of
from megatron_ledom.data.shards.model_order import OrderSettings
from megatron_ledom.data.shards.prefixes import TASK, task_prefix
from megatron_ledom.data.shards.shard import DtypeName, ShardManifest, load_manifest
from megatron_ledom.direction import Direction
from megatron_ledom.errors import UsageError
from megatron_ledom.platform.processes import ordered_map
from megatron_ledom.platform.slurm import array_task_id, read_array
from megatron_ledom.storage.hashes import sha256_of
from megatron_ledom.storage.jobs import Request, moved_commit
from megatron_ledom.tokenizers.corpus_tokenizer import Tokenizer

logger = logging.getLogger(__name__)


@dataclass(kw_only=True, slots=True)
class PreprocessSettings:
    """Options of `ledom preprocess-data`."""

    input: list[str]
    tokenizer: str
    output_prefix: str
    direction: Direction = Direction.REVERSE
    order: OrderSettings = field(default_factory=OrderSettings)
    text_key: str = "text"
    text_template: str | None = None
    """Template that joins the texts of several keys, in place of `text_key`; see `TextTemplate`."""
    workers: int | None = None
    """Number of processes; default: the cores that this process may use."""
    eod_token: str | None = None
    eod_id: int | None = None
    bos_token: str | None = None
    add_specials: bool = False
    """Add the five specials of the original LEDOM to the tokenizer first. Its eod is then <EOD>."""
    dtype: DtypeName = "auto"
    on_error: OnError = "fail"
    max_record_bytes: int = MAX_RECORD_BYTES
    min_tokens: int = 1
    max_tokens: int | None = None
    """Documents with fewer than `min_tokens` or more than `max_tokens`, without eod, are skipped."""
    filter: str | None = None
    """`module:function` that gets (text, record) and returns True to keep the document."""
    deduplicate: bool = False
    hash_only: bool = False
    """Only write the hashes that `deduplicate` needs in an array of tasks."""
    decontamination: Decontamination | None = None
    """Evaluation items to look for in the texts that the other options keep, and what happens to a document that has one."""
    shuffle_seed: int | None = None
    source: dict[str, Any] = field(default_factory=dict)
    """Description of the source in the manifest, see `ShardManifest.source`. It does not change the result."""
    task_id: int | None = None
    num_tasks: int | None = None
    """Default of `task_id` and `num_tasks`: those of the SLURM array."""
    overwrite: bool = False
    batch_bytes: int = BATCH_BYTES
    """Size of the text that the tokenizer gets at a time. It does not change the result."""
    part_bytes: int | None = None
    """Size of the input that a worker gets at a time; default: by the size of all input. It does not change the result."""


class PreprocessTask:
    """One task of preprocessing, of an array or alone: everything that follows from the settings before anything is written."""

    def __init__(self, settings: PreprocessSettings) -> None:
        _check_numbers(settings)
        settings.order.check(settings.direction, settings.bos_token)
        self.settings = settings
        self.sources, self.skipped = find_inputs(settings.input)
        self.task_id, self.num_tasks = task_of(settings, os.environ)
        byte_ranges = byte_ranges_of_task(self.sources, self.task_id, self.num_tasks)
        self.parts = parts_of(byte_ranges, settings.part_bytes)
        self.prefix = self.prefix_of(self.task_id)
        self.workers = settings.workers or (
            len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        )
        if settings.decontamination is not None:
            settings.decontamination.settings.check()
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
        """Return the prefix of the shard of a task."""
        base = self.settings.output_prefix
        return task_prefix(base, task_id, self.num_tasks) if self.num_tasks > 1 else base

    def map_parts(self, function: PartWork, numbers: Sequence[int], name: str) -> Iterator[Any]:
        """Call the function on the parts `numbers` in worker processes, and yield the results in order. Shows a progress bar."""
        sizes = [sum(byte_range.num_bytes for byte_range in part) for part in self.parts]
        total = sum(sizes)
        before = total - sum(sizes[number] for number in numbers)
        with tqdm(total=total, initial=before, unit="B", unit_scale=True, unit_divisor=1000, desc=name, disable=None) as bar:

            def show() -> None:
                bar.update(before + sum(function.progress) - bar.n)

            yield from ordered_map(function, numbers, self.workers, lambda number: _named(self.parts[number]), show)
            bar.update(total - bar.n)

    def inputs_sha256(self) -> str:
        """Return the hash of the inputs that the tasks divide among themselves."""
        inputs = [(source.path, source.num_bytes, source.version) for source in self.sources]
        return hashlib.sha256(orjson.dumps([inputs, self.num_tasks])).hexdigest()

    def moved_commit(self, manifest: ShardManifest) -> str:
        """Return a remark, in parentheses, on a repository of the hub that is at another commit than in a manifest; else nothing."""
        moved = moved_commit((file.path for file in manifest.input_files), (source.path for source in self.sources))
        return moved and f" ({moved})"

    def check_siblings(self) -> None:
        """Raise UsageError if other tasks of the array divided other inputs, because the borders between tasks would differ."""
        base = self.settings.output_prefix
        others = {
            int(match["count"])
            for match in map(TASK.match, glob.glob(f"{glob.escape(base)}-*-of-*.json"))
            if match and match["base"] == base
        }
        if self.num_tasks > 1 and others - {self.num_tasks} and not self.settings.overwrite:
            raise UsageError(
                f"{base} has shards of an array of {max(others - {self.num_tasks})} tasks, this is one of {self.num_tasks}; to run"
                " tasks of that array again give its --num-tasks, else choose another --output-prefix"
            )
        for task_id in range(self.num_tasks if self.num_tasks > 1 else 0):
            prefix = self.prefix_of(task_id)
            if task_id == self.task_id or not Path(f"{prefix}.json").exists():
                continue
            manifest = load_manifest(prefix)
            if manifest.inputs_sha256 != self.inputs_sha256() and not self.settings.overwrite:
                moved = self.moved_commit(manifest)
                raise UsageError(
                    f"{prefix} was made from other inputs, and all tasks must divide the same inputs{moved}: run all tasks again"
                    " with --overwrite, or choose another --output-prefix"
                )
            return  # one is enough here; ledom summarize-tasks compares all of them

    def reading_request(self) -> Request:
        """Return the options and inputs that determine the documents, equal for all tasks."""
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
        """Return the options and inputs that determine the content of the shard."""
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
            **settings.order.request(),
        }
        if settings.decontamination is not None:
            request["decontamination"] = settings.decontamination.request()
        if tokenizer.is_eod_forced_to_text:  # earlier versions ended documents at such an eod: their work cannot be resumed
            request["is_eod_made_text"] = True
        return dict(orjson.loads(orjson.dumps(request)))


def task_of(settings: PreprocessSettings, environment: Mapping[str, str]) -> tuple[int, int]:
    """Return (task id, number of tasks) from the options, else from the SLURM array.

    With only --num-tasks the id is SLURM_ARRAY_TASK_ID itself, so that single tasks of an array can run again. With neither
    option ids count from SLURM_ARRAY_TASK_MIN.
    """
    if settings.num_tasks is not None:
        if settings.task_id is not None:
            return settings.task_id, settings.num_tasks
        slurm_id = array_task_id(environment)
        if slurm_id is None and settings.num_tasks > 1:
            raise UsageError(f"--num-tasks {settings.num_tasks} without --task-id, and not in a SLURM array; give --task-id")
        return slurm_id or 0, settings.num_tasks
    if settings.task_id is not None:
        raise UsageError(f"--task-id {settings.task_id} without --num-tasks; give both")
    array = read_array(environment)
    if array is None:
        return 0, 1
    if array.count == 1:
        raise UsageError(
            f"this SLURM array has only task {array.task_id}, which may be the whole array or a repeated task of a larger one; give"
            " --num-tasks"
        )
    task_id, rest = divmod(array.task_id - array.first, array.step)
    has_gaps = rest or array.last != array.first + (array.count - 1) * array.step
    if has_gaps or not 0 <= task_id < array.count:
        raise UsageError(
            f"SLURM_ARRAY_TASK_ID {array.task_id} of {array.count} tasks from {array.first}: the array has gaps; give"
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
        raise UsageError("--bos-token is empty; name a token of the tokenizer, or omit the option for none")
    if settings.eod_token is not None and settings.eod_id is not None:
        raise UsageError("--eod-token and --eod-id both name the eod; give one of them")


def load_filter(name: str) -> Filter:
    """Return the function that `module:function` names."""
    module_name, _, function_name = name.partition(":")
    if not module_name or not function_name:
        raise UsageError(f"--filter {name} is not of the form module:function")
    if "" not in sys.path:
        sys.path.insert(0, "")  # the current folder, as with `python -m`
    try:
        found = getattr(importlib.import_module(module_name), function_name)
    except Exception as error:  # code of the user
        kind = type(error).__name__
        raise UsageError(f"--filter {name} cannot be loaded ({kind}: {error}); check the name, and PYTHONPATH") from error
    if not callable(found):
        raise UsageError(f"--filter {name} is not a function; name one that gets (text, record) and returns True to keep it")
    return found  # type: ignore[no-any-return]


def source_hash(keep: Filter) -> str:
    """Return the SHA-256 of the file of a filter, so that work from before an edit of the filter is not resumed."""
    file = getattr(sys.modules.get(keep.__module__), "__file__", None)
    return sha256_of(file) if file and Path(file).is_file() else "unknown"


def _named(part: Part) -> str:
    first = part[0]
    return f"{first.source.path}, bytes {first.start:,} to {first.end:,}" + (
        f" and {len(part) - 1} more" if len(part) > 1 else ""
    )

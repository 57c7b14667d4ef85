"""Summarize the tasks of a preprocessing array: totals, speed, and the tasks that must run again."""

import glob
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

import orjson

from megatron_ledom.data.shards.prefixes import TASK, array_list, check_same_inputs, task_prefix
from megatron_ledom.data.shards.shard import ShardManifest, check_shard
from megatron_ledom.errors import DataError, MismatchError, UsageError, VerificationError
from megatron_ledom.storage.files import write_file
from megatron_ledom.storage.locks import output_file_lock


@dataclass(kw_only=True, slots=True)
class SummarySettings:
    """Options of `ledom summarize-tasks`."""

    prefix: str
    """--output-prefix of the tasks."""
    num_tasks: int | None = None
    """Default: the number in the names of the files."""
    json: str | None = None
    """File to write the summary to."""


@dataclass(slots=True)
class TaskSummary:
    """Totals over the finished tasks of an array."""

    prefix: str
    num_tasks: int
    num_documents: int = 0
    num_tokens: int = 0
    text_bytes: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    """Number of skipped documents, by reason."""
    finished: list[int] = field(default_factory=list)
    """Numbers of the tasks with a usable shard."""
    unfinished: list[int] = field(default_factory=list)
    """Numbers of the tasks with files but no manifest."""
    missing: list[int] = field(default_factory=list)
    """Numbers of the tasks without any file."""
    faulty: dict[int, str] = field(default_factory=dict)
    """Number of each task with an unusable shard, and its problem. (The name is a key of the JSON.)"""
    elapsed_seconds: float | None = None
    """Sum over all finished tasks; None if a manifest does not contain its time."""
    slowest_task: int | None = None
    slowest_seconds: float | None = None

    @property
    def to_run_again(self) -> list[int]:
        """Numbers of all tasks without a usable shard."""
        return sorted([*self.unfinished, *self.missing, *self.faulty])

    def to_json(self) -> bytes:
        """Return the summary as one JSON object."""
        stored = {**asdict(self), "to_run_again": self.to_run_again, "array": array_list(self.to_run_again)}
        return orjson.dumps(stored, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE | orjson.OPT_NON_STR_KEYS)


def summarize_tasks(settings: SummarySettings) -> TaskSummary:
    """Print the summary, write it if `json` is set, and raise VerificationError if a task must run again."""
    if settings.json and not Path(settings.json).absolute().parent.is_dir():
        raise UsageError(f"the folder of --json {settings.json} does not exist; make it, or give another name")
    summary = collect(settings.prefix, settings.num_tasks)
    print(describe(summary))
    if settings.json:
        with output_file_lock(settings.json, "--json"):
            write_file(settings.json, summary.to_json())
    if again := summary.to_run_again:
        remove = "; remove the unusable shards first" if summary.faulty else ""
        raise VerificationError(
            f"{len(again)} of {summary.num_tasks} tasks have no usable shard; run them again with"
            f" sbatch --array={array_list(again)}{remove}"
        )
    return summary


def collect(prefix: str, num_tasks: int | None = None) -> TaskSummary:
    """Return the summary, from the manifests and file sizes of all tasks."""
    begun = _files_by_task(prefix)
    counts = sorted({count for count, _ in begun})
    if num_tasks is None:
        if not counts:
            raise UsageError(f"found no files {prefix}-00000-of-000NN.*; give the --output-prefix of the tasks")
        if len(counts) > 1:
            raise UsageError(f"{prefix} has tasks of {' and of '.join(map(str, counts))}; choose an array with --num-tasks")
        num_tasks = counts[0]
    if num_tasks < 1:
        raise UsageError(f"--num-tasks {num_tasks} is not possible; use 1 or more")
    summary = TaskSummary(prefix, num_tasks)
    seconds: dict[int, float | None] = {}
    skipped: Counter[str] = Counter()
    first: ShardManifest | None = None
    for number in range(num_tasks):
        task = task_prefix(prefix, number, num_tasks)
        if (num_tasks, number) not in begun:
            summary.missing.append(number)
        elif not Path(f"{task}.json").exists():
            summary.unfinished.append(number)
        elif manifest := _usable(task, first, summary, number):
            first = first or manifest
            _count(summary, skipped, number, manifest)
            seconds[number] = manifest.elapsed_seconds or None
    summary.skipped = dict(sorted(skipped.items()))
    _add_speed(summary, seconds)
    return summary


def _files_by_task(prefix: str) -> set[tuple[int, int]]:
    """Return (number of tasks, task) of every task with at least one file, unfinished ones too."""
    found = set()
    for file in glob.glob(f"{glob.escape(prefix)}-*-of-*"):
        match = TASK.match(file)
        if match and match["base"] == prefix:
            found.add((int(match["count"]), int(match["number"])))
    return found


def _usable(task: str, first: ShardManifest | None, summary: TaskSummary, number: int) -> ShardManifest | None:
    try:
        manifest = check_shard(task)
        if first is not None:
            manifest.provenance.check_same(first.provenance, f"task {number}", f"task {summary.finished[0]}")
            check_same_inputs([task_prefix(summary.prefix, summary.finished[0], summary.num_tasks), task], [first, manifest])
    except (DataError, MismatchError) as error:
        summary.faulty[number] = str(error)
        return None
    return manifest


def _count(summary: TaskSummary, skipped: Counter[str], number: int, manifest: ShardManifest) -> None:
    summary.finished.append(number)
    summary.num_documents += manifest.num_documents
    summary.num_tokens += manifest.num_tokens
    summary.text_bytes += manifest.text_bytes
    skipped.update(manifest.skipped)


def _add_speed(summary: TaskSummary, seconds: dict[int, float | None]) -> None:
    known = {number: value for number, value in seconds.items() if value is not None}
    if known and len(known) == len(seconds):
        summary.elapsed_seconds = sum(known.values())
        summary.slowest_task = max(known, key=lambda number: known[number])
        summary.slowest_seconds = known[summary.slowest_task]


def describe(summary: TaskSummary) -> str:
    """Return the summary as text for the terminal."""
    rows = {
        "tasks": f"{len(summary.finished):,} of {summary.num_tasks:,} finished",
        "documents": f"{summary.num_documents:,}",
        "tokens": f"{summary.num_tokens:,} with eods",
        "text": f"{summary.text_bytes:,} bytes, {summary.text_bytes / max(1, summary.num_tokens):.2f} per token",
        "skipped": ", ".join(f"{number:,} {reason}" for reason, number in summary.skipped.items()) or "none",
    }
    if summary.elapsed_seconds is not None:
        speed = summary.num_tokens / summary.elapsed_seconds
        rows["speed"] = (
            f"{speed:,.0f} tokens/s per task, {summary.elapsed_seconds:,.0f} s in total; slowest: task {summary.slowest_task}"
            f" with {summary.slowest_seconds:,.0f} s"
        )
    if summary.missing:
        rows["missing"] = array_list(summary.missing)
    if summary.unfinished:
        rows["unfinished"] = array_list(summary.unfinished)
    lines = [f"{name:<10} {value}" for name, value in rows.items()]
    lines += [f"unusable   {number}: {problem}" for number, problem in summary.faulty.items()]
    if summary.to_run_again:
        lines.append(f"run again  --array={array_list(summary.to_run_again)}")
    return "\n".join(lines)

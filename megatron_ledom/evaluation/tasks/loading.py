"""Load items from local files: find them by name, hash them, and check each line against the row formats of its set."""

import difflib
import gzip
import hashlib
import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from megatron_ledom.errors import DataError, UsageError
from megatron_ledom.evaluation.synthetic.tasks import SYNTHETIC_TASKS
from megatron_ledom.evaluation.tasks.benchmarks import TASKS
from megatron_ledom.evaluation.tasks.task import FIELD_TYPES, Item, LoadedTask, Row, RowFormat, Task, TaskKind
from megatron_ledom.storage.hashes import sha256_of

ENDINGS = (".jsonl", ".jsonl.gz", ".parquet", ".arrow")


def all_tasks() -> dict[str, Task]:
    """Return every task by its name."""
    return {task.name: task for task in (*TASKS, *SYNTHETIC_TASKS)}


def task_named(name: str) -> Task:
    """Return the task of this name. Raises UsageError with the nearest name for an unknown one."""
    known = all_tasks()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ";"
        raise UsageError(f"there is no task {name!r}{hint} Use one of: {', '.join(known)}")
    return known[name]


def load_task(
    name: str,
    folder: str | Path,
    *,
    limit: int | None = None,
    num_fewshot: int = 0,
    seed: int = 0,
    max_new_tokens: int | None = None,
) -> LoadedTask:
    """Return the first `limit` items of a task's file in `folder`, with `num_fewshot` examples drawn with `seed`.

    The few-shot examples come from the task's `exemplars_file`. Every line is checked. Raises UsageError or DataError."""
    task, folder = task_named(name), Path(folder)
    if limit is not None and limit < 1:
        raise UsageError(f"limit={limit} must be at least 1")
    if num_fewshot < 0:
        raise UsageError(f"num_fewshot={num_fewshot} must be 0 or more")
    path = find_file(task, folder, task.file)
    files = {path.name: sha256_of(path)}
    items = tuple(_items(task, path))
    exemplars: tuple[Item, ...] = ()
    trained_questions: frozenset[str] = frozenset()
    if task.kind is TaskKind.QUESTION:
        known_path = find_file(task, folder, task.exemplars_file)
        files[known_path.name] = sha256_of(known_path)
        trained_questions = frozenset(item.values["question"] for item in _items(task, known_path))
    if num_fewshot:
        exemplars_path = find_file(task, folder, task.exemplars_file)
        files[exemplars_path.name] = sha256_of(exemplars_path)
        exemplars = _exemplars(task, exemplars_path, num_fewshot, seed)
    for file, known_hash in files.items():
        if sha256_of(folder / file) != known_hash:
            raise DataError(f"{folder / file} was replaced while it was read; start again when it is complete")
    return LoadedTask(
        task=task,
        items=items[:limit],
        exemplars=exemplars,
        trained_questions=trained_questions,
        num_fewshot=num_fewshot,
        seed=seed,
        max_new_tokens=task.max_new_tokens if max_new_tokens is None else max_new_tokens,
        files=files,
        content_sha256=content_hash(items),
    )


def find_file(task: Task, folder: Path, stem: str) -> Path:
    """Return FOLDER/STEM with one of the known endings.

    Raises UsageError with the source of the file if there is none.
    """
    for ending in ENDINGS:
        path = folder / f"{stem}{ending}"
        if path.is_file():
            return path
        if path.is_symlink():
            raise UsageError(
                f"{path} is a link to {path.readlink()}, which is not a file; download it again, or remove the link"
            )
    there = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    found = f"it contains {', '.join(there[:8])}{' ...' if len(there) > 8 else ''}" if there else "it is empty or not a folder"
    if stem == task.file:
        needed = "its items"
    else:
        needed = "the trained questions" if task.kind is TaskKind.QUESTION else "its few-shot examples (--num-fewshot)"
    raise UsageError(
        f"{task.name} needs {needed} in {folder}/{stem} with one of the endings {' '.join(ENDINGS)}; {found}. Get it from:"
        f" {_source(task, stem)}"
    )


def _source(task: Task, name: str) -> str:
    """Return the source of a task's file. name: the file's, with or without its ending."""
    return task.download if name.partition(".")[0] == task.file else task.exemplars_download


def content_hash(items: Iterable[Item]) -> str:
    """Return the sha256 (hex) of the items' prompts, choices, answers and tests, in order: the same for every file type.

    The worked solution (`chain`) is not hashed: it is never judged, and not every copy of a set has it.
    """
    digest = hashlib.sha256()
    for item in items:
        values = sorted((name, value) for name, value in item.values.items() if name != "chain")
        judged = [values, item.choices, item.gold, item.tests.code if item.tests else ""]
        digest.update(json.dumps(judged, ensure_ascii=False).encode() + b"\n")
    return digest.hexdigest()


def read_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """Yield (where, row) of each line of a JSON Lines file, or of each row of a Parquet or Arrow file."""
    if path.suffix in (".parquet", ".arrow"):
        yield from ((f"{path}: row {number}", row) for number, row in enumerate(_table_rows(path), 1))
        return
    opener: Any = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8"))
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path}:{number} is not a line of JSON in UTF-8 ({error}); download the file again") from error
            if not isinstance(row, dict):
                raise DataError(f"{path}:{number} is a {type(row).__name__}, expected an object; use the set's JSON Lines file")
            yield f"{path}:{number}", row


def _table_rows(path: Path) -> list[dict[str, Any]]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise UsageError(f"{path} needs pyarrow; run pip install pyarrow, or give the set as JSON lines") from error
    try:
        if path.suffix == ".parquet":
            return list(pq.read_table(path, page_checksum_verification=True).to_pylist())
        with pa.memory_map(str(path)) as source:
            return list(pa.ipc.open_stream(source).read_all().to_pylist())
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}; download the file again") from error


def parse_row(task: Task, row: Row, where: str, source: str | None = None) -> Item:
    """Return the item of one row, read with the row format that fits it.

    Raises DataError with the found and the expected fields and the `source` of the file, by default the task's
    `download`.
    """
    source = source or task.download
    problems = [(row_format, row_problems(row_format, row)) for row_format in task.row_formats]
    row_format, wrong = min(problems, key=lambda found: len(found[1]))
    if wrong:
        expected = " or ".join(
            "{" + ", ".join(f"{n}: {kind}" for n, kind in found.fields.items()) + "}" for found in task.row_formats
        )
        raise DataError(
            f"{where} is not an item of {task.name}: {'; '.join(wrong)}; found the fields {', '.join(row) or 'none'}, expected"
            f" {expected}. Get it from: {source}"
        )
    try:
        return row_format.read(row)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise DataError(
            f"{where} is not an item of {task.name}: {error}; correct the line, or get the file from: {source}"
        ) from error


def row_problems(row_format: RowFormat, row: Row) -> list[str]:
    """Return the problems of a row that is not in this format, one for each wrong field."""
    found = []
    for name, kind in row_format.fields.items():
        value: Any = row
        for part in name.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        is_fitting = isinstance(value, FIELD_TYPES[kind]) and not (isinstance(value, bool) and kind != "yes or no")
        if value is None:
            found.append(f"{name} is missing")
        elif not is_fitting:
            found.append(f"{name} is {value!r:.60}, expected: {kind}")
    return found


def _items(task: Task, path: Path) -> list[Item]:
    source = _source(task, path.name)
    items = [parse_row(task, row, where, source) for where, row in read_rows(path)]
    if not items:
        raise DataError(f"{path} contains no items; get it from: {source}")
    return items


def _exemplars(task: Task, path: Path, num_fewshot: int, seed: int) -> tuple[Item, ...]:
    """Return `num_fewshot + 1` few-shot examples, because one of them may be the item that is judged."""
    items = _items(task, path)
    needed = [field.name for field in task.template.fields]
    usable = [item for item in items if all(name in item.values for name in needed)]
    if len(usable) <= num_fewshot:
        raise UsageError(
            f"{path} has {len(usable)} items with {', '.join(needed)}, {num_fewshot} few-shot examples need {num_fewshot + 1};"
            " lower --num-fewshot, or give a larger file"
        )
    return tuple(random.Random(seed).sample(usable, num_fewshot + 1))

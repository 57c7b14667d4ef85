"""The items of all evaluation sets in a folder, and of JSON lines of the user, as a search for contamination needs them."""

import hashlib
import json
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_ledom import __version__
from megatron_ledom.contamination.items import EvaluationItem
from megatron_ledom.contamination.search import Decontamination
from megatron_ledom.contamination.settings import SearchSettings
from megatron_ledom.contamination.stored_index import request_of_index, stored_decontamination
from megatron_ledom.errors import DataError, UsageError
from megatron_ledom.evaluation.code import execution
from megatron_ledom.evaluation.tasks import benchmarks, loading, prompts
from megatron_ledom.evaluation.tasks import task as task_types
from megatron_ledom.evaluation.tasks.benchmarks import TASKS
from megatron_ledom.evaluation.tasks.loading import ENDINGS, parse_row, read_rows
from megatron_ledom.evaluation.tasks.task import Item, Row, Task
from megatron_ledom.storage.hashes import sha256_of

logger = logging.getLogger(__name__)
BY_FILE = {task.file: task for task in TASKS}
"""Name of the file of a set, without ending -> the set."""
PARSERS = (benchmarks, loading, prompts, task_types, execution)
"""Modules that make items of files, apart from this one."""


def read_known_items(paths: Sequence[str]) -> list[EvaluationItem]:
    """Return the items of each path: a folder with files of known sets, a file of a known set, or JSON lines of the user.

    Raises UsageError for a path without a set, and DataError for a damaged file.
    """
    return _items_of_files(files_of_items(paths), paths)


def known_decontamination(settings: SearchSettings, paths: Sequence[str], index_folder: str | None = None) -> Decontamination:
    """Return the search for the items of the paths. index_folder: keep the index there, and use the one that is there.

    The key of an index has the content of the files, the code that reads them, and the settings; dates and folders make no difference.
    """
    if index_folder is None:
        return Decontamination(settings, read_known_items(paths))
    files = files_of_items(paths)
    content = [(file.name, sha256_of(file)) for file in files]
    code = [sha256_of(str(module.__file__)) for module in (*PARSERS, sys.modules[__name__])]
    request = [__version__, code, request_of_index(settings), content]

    def read_unchanged() -> list[EvaluationItem]:
        """Return the items. Raises DataError if a file is not the one that was hashed."""
        items = _items_of_files(files, paths)
        if changed := [file for file, (_, digest) in zip(files, content, strict=True) if sha256_of(file) != digest]:
            raise DataError(f"{changed[0]} was replaced while it was read; start again when it is complete")
        return items

    return stored_decontamination(
        index_folder, hashlib.sha256(json.dumps(request).encode()).hexdigest(), settings, read_unchanged
    )


def files_of_items(paths: Sequence[str]) -> list[Path]:
    """Return the files of each path, as `read_known_items` chooses them, each once. Raises UsageError for a path without a set."""
    files: list[Path] = []
    for name in paths:
        path = Path(name)
        if path.is_dir():
            found = [file for stem in BY_FILE if (file := _file_of(path, stem)) is not None]
            if not found:
                raise UsageError(
                    f"{path} has no file of a known set; expected {', '.join(list(BY_FILE)[:4])}, ... with one of the endings"
                    f" {' '.join(ENDINGS)} (`ledom evaluate --list`); give your own sets as JSON lines, by file"
                )
            files += found
            _log_others(path, found)
        elif path.is_file():
            files.append(path)
        else:
            raise UsageError(
                f"{path} does not exist; give a folder as for `ledom evaluate --data`, or JSON lines with `question`"
            )
    return list(dict.fromkeys(files))


def _items_of_files(files: Sequence[Path], paths: Sequence[str]) -> list[EvaluationItem]:
    items = [item for file in files for item in _items_of(file)]
    if not items:
        raise DataError(f"{', '.join(paths)} have no items; give files with questions")
    return items


def _file_of(folder: Path, stem: str) -> Path | None:
    """Return the file of a known set, as `ledom evaluate` chooses it. Raises UsageError for a link to nothing."""
    for file in (folder / f"{stem}{ending}" for ending in ENDINGS):
        if file.is_file():
            return file
        if file.is_symlink():
            raise UsageError(
                f"{file} is a link to {file.readlink()}, which is not a file; bring the set back, or remove the link"
            )
    return None


def _log_others(folder: Path, found: Sequence[Path]) -> None:
    """Name the files that could be sets and are not searched."""
    exemplars = {f"{task.exemplars_file}{ending}" for task in TASKS for ending in ENDINGS if task.exemplars_file}
    others = sorted(file.name for file in folder.iterdir() if file.name.endswith(ENDINGS) and file not in found)
    if others := [name for name in others if name not in exemplars]:
        logger.warning("%s: not searched, because no known set has the name: %s; give them by file", folder, ", ".join(others))


def _items_of(path: Path) -> Iterator[EvaluationItem]:
    ending = next((ending for ending in ENDINGS if path.name.endswith(ending)), path.suffix)
    stem = path.name.removesuffix(ending)
    task = BY_FILE.get(stem)
    for number, (where, row) in enumerate(read_rows(path)):
        yield _own_item(stem, number, row, where) if task is None else _item_of(task, number, parse_row(task, row, where))


def _item_of(task: Task, number: int, item: Item) -> EvaluationItem:
    """Return an item of a known set. The passage of BoolQ is no part of it: it is a text of Wikipedia, the question is not."""
    values = item.values
    gold = item.gold if isinstance(item.gold, int) else None
    if "option" in values:  # WinoGrande: the sentence with the right word
        question, answer = f"{values['before']}{values['option']}{values['after']}", values["option"]
    else:
        question = next((values[key] for key in ("question", "context", "prompt") if key in values), "")
        answer = next((values[key] for key in ("answer", "ending", "code") if key in values), "")
        answer = f"{values['chain']} {answer}" if "chain" in values else answer
    others = tuple(choice for index, choice in enumerate(item.choices) if index != gold)
    return EvaluationItem(set=task.name, number=number, question=question, answer=answer, choices=others)


def _own_item(name: str, number: int, row: Row, where: str) -> EvaluationItem:
    """Return an item of the user's own lines: `question`, and perhaps `answer` and `choices`."""
    question, answer, choices = (row.get(key, empty) for key, empty in (("question", None), ("answer", ""), ("choices", [])))
    if not isinstance(question, str):
        raise DataError(f"{where} has no text `question`; expected {{question: text, answer: text, choices: list of texts}}")
    answer = str(answer) if isinstance(answer, int | float) else answer
    if not isinstance(answer, str) or not _are_texts(choices):
        raise DataError(
            f"{where}: expected {{question: text, answer: text, choices: list of texts}}, the last two may be missing"
        )
    others = tuple(choice for choice in choices if choice != answer)
    return EvaluationItem(set=name, number=number, question=question, answer=answer, choices=others)


def _are_texts(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)

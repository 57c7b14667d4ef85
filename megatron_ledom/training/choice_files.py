"""Files of multiple choice that a run evaluates: JSON lines of `context`, `choices` and `gold`. torch is not imported."""

import json
import os
from dataclasses import dataclass
from typing import Any

from megatron_ledom.config.schema import RunConfig
from megatron_ledom.errors import ConfigError, DataError


@dataclass(frozen=True, slots=True)
class ChoiceItem:
    """context, choices: text order, a choice follows the context as it is. gold: number of the right choice, from 0."""

    context: str
    choices: tuple[str, ...]
    gold: int


def check_tasks(config: RunConfig, has_tokenizer: bool) -> None:
    """Refuse files that could not be evaluated, before anything heavy."""
    for name, path in config.train.task_files.items():
        if not os.path.isfile(path):
            raise ConfigError(f"train.task_files.{name}={path} is no file; give JSON lines of context, choices and gold")
        read_choices(path)
    if config.train.task_files and not has_tokenizer:
        raise ConfigError("train.task_files needs the tokenizer, which is not here; set data.tokenizer")


def read_choices(path: str) -> list[ChoiceItem]:
    """Every line of a file. Raises DataError that names the line."""
    with open(path, encoding="utf-8") as file:
        items = [_item(line, f"{path}:{number}") for number, line in enumerate(file, 1) if line.strip()]
    if not items:
        raise DataError(f"{path} has no lines; give JSON lines of context, choices and gold")
    return items


def _item(line: str, where: str) -> ChoiceItem:
    try:
        record: Any = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where} is not JSON ({error}); repair it") from error
    expected = 'expected {"context": TEXT, "choices": [TEXT, TEXT, ...], "gold": NUMBER}'
    if not isinstance(record, dict) or not {"context", "choices", "gold"} <= record.keys():
        raise DataError(f"{where} lacks a key; {expected}")
    context, choices, gold = record["context"], record["choices"], record["gold"]
    are_texts = isinstance(choices, list) and len(choices) > 1 and all(isinstance(c, str) and c for c in choices)
    if not (isinstance(context, str) and context and are_texts):
        raise DataError(f"{where} has an empty text, or fewer than two choices; {expected}")
    if not isinstance(gold, int) or not 0 <= gold < len(choices):
        raise DataError(f"{where} has gold={gold!r}, none of 0 to {len(choices) - 1}")
    return ChoiceItem(context, tuple(choices), gold)

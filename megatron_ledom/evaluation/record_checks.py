"""Checks of the records of a killed run before it resumes: each must be one that this command can write for its item.

Otherwise a line that was edited, damaged or written by two processes would count as a result. Each check raises
DataError for the first wrong field; `ItemFile` adds the file and the line.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megatron_ledom.direction import Direction
from megatron_ledom.errors import DataError
from megatron_ledom.evaluation.item_file import NUMBER, Check
from megatron_ledom.evaluation.loss_difference import NUM_PARTS, SIDES, Document
from megatron_ledom.evaluation.multiple_choice import score_requests
from megatron_ledom.evaluation.results import Record
from megatron_ledom.evaluation.tasks.task import Item, LoadedTask, TaskKind

LOSSES = ("loss", "inner", "first", "last", "eod")
POSITIONS = ("tenths", "from_start", "from_end")
ROUNDING = 1e-6
"""Tolerance between a sum and the sum of its parts: relative above 1, else absolute."""
BEYOND_ZERO = 1e-3
"""Rounding of a log-softmax, summed over a text: a log-likelihood may exceed 0 by this much."""
TEXT, TEXT_OR_NULL, FLAG, COUNT = "a text", "a text or null", "true or false", "a count"
LOSS, LOGPROB, DIFFERENCE, INTEGER = "a loss", "a log-likelihood or null", "a number or null", "an integer"
TESTS: dict[str, Callable[[Any], bool]] = {
    TEXT: lambda value: isinstance(value, str),
    TEXT_OR_NULL: lambda value: value is None or isinstance(value, str),
    FLAG: lambda value: isinstance(value, bool),
    COUNT: lambda value: type(value) is int and value >= 0,
    INTEGER: lambda value: type(value) is int,
    LOSS: lambda value: type(value) in (int, float) and value >= -BEYOND_ZERO,
    LOGPROB: lambda value: value is None or (type(value) in (int, float) and value <= BEYOND_ZERO),
    DIFFERENCE: lambda value: value is None or type(value) in (int, float),
}
WRITTEN = {
    TaskKind.ANSWER: {"written": TEXT, "answer": TEXT_OR_NULL, "is_right": FLAG},
    TaskKind.CODE: {"written": TEXT, "answer": TEXT_OR_NULL, "reason": TEXT, "is_right": FLAG},
    TaskKind.QUESTION: {
        "written": TEXT,
        "answer": TEXT_OR_NULL,
        "solved": TEXT_OR_NULL,
        "has_answer": FLAG,
        "is_right": FLAG,
        "is_copy": FLAG,
    },
}
"""Fields of a record of `written_answers.write_answers`, apart from the accepted answers."""


def item_check(task: LoadedTask, direction: Direction) -> Check:
    """Return the check of a record of `evaluate_task`."""
    if task.task.kind is not TaskKind.CHOICE:
        return lambda number, record: _check_written(record, task.items[number], task.task.kind)
    first = task.items[0]
    requests = score_requests(task.task, direction, first, task.exemplars_for(first))
    is_difference = {way: choices[0].prior is not None for way, choices in requests.items()}
    return lambda number, record: _check_choice(record, task.items[number], is_difference)


def document_check(documents: Sequence[Document], *, with_positions: bool) -> Check:
    """Return the check of a record of `document_records`."""

    def check(number: int, record: Record) -> None:
        """Check the record of one document."""
        document = documents[number]
        known = {"where": document.where, "domain": document.domain, "bytes": len(document.text.encode())}
        _check_keys("the line", record, {NUMBER, *known, *SIDES, *(POSITIONS if with_positions else ())})
        _check_known(record, known)
        for side in SIDES:
            _check_side(side, record[side])
        if with_positions:
            for name in POSITIONS:
                _check_positions(name, record[name], record)

    return check


def _check_choice(record: Record, item: Item, is_difference: Mapping[str, bool]) -> None:
    """Check the scores of each way.

    is_difference: for each way, True if a prior is subtracted, so that values may have either sign.
    """
    _check_keys("the line", record, {NUMBER, *item.kept, "gold", "scores"})
    _check_known(record, {**item.kept, "gold": item.gold})
    _check_keys("scores", record["scores"], set(is_difference))
    for way, either_sign in is_difference.items():
        columns, name = record["scores"][way], f"scores.{way}"
        _check_keys(name, columns, {"logprob", "tokens", "bytes"})
        _check_list(f"{name}.logprob", columns["logprob"], DIFFERENCE if either_sign else LOGPROB, len(item.choices))
        for column in ("tokens", "bytes"):
            _check_list(f"{name}.{column}", columns[column], INTEGER if either_sign else COUNT, len(item.choices))


def _check_written(record: Record, item: Item, kind: TaskKind) -> None:
    fields = WRITTEN[kind]
    accepted = item.gold if isinstance(item.gold, tuple) else ()
    known = {**item.kept, **({} if kind is TaskKind.CODE else {"gold": list(accepted)})}
    _check_keys("the line", record, {NUMBER, *known, *fields})
    _check_known(record, known)
    for name, expected in fields.items():
        _check_value(name, record[name], expected)
    if record["is_right"] and record["answer"] is None:
        raise DataError("is_right is true and answer is null, expected an answer")
    if kind is TaskKind.QUESTION and record["is_right"] != (record["solved"] in accepted):
        raise DataError(f"is_right is {_shown(record['is_right'])}, expected the opposite from the solution under solved")


def _check_side(side: str, found: Any) -> None:
    """Check one model's sums over a document: the inner, the first and the last losses add up to the whole."""
    _check_keys(side, found, {"tokens", *LOSSES})
    _check_value(f"{side}.tokens", found["tokens"], COUNT)
    for name in LOSSES:
        _check_value(f"{side}.{name}", found[name], LOSS)
    edges = (0.0, found["first"])[found["tokens"] > 0] + (0.0, found["last"])[found["tokens"] > 1]
    _check_sum(f"{side}.loss", found["loss"], found["inner"] + edges)


def _check_positions(name: str, found: Any, record: Record) -> None:
    """Check the sums of the inner tokens by position: they add up to the totals of the document."""
    num = record[SIDES[0]]["tokens"]
    if record[SIDES[1]]["tokens"] != num:
        raise DataError(f"reverse.tokens is {record[SIDES[1]]['tokens']}, expected {num}, the number of forward.tokens")
    _check_keys(name, found, {"tokens", *SIDES})
    size = NUM_PARTS if name == "tenths" else (num - 1).bit_length() if num > 2 else 0
    _check_list(f"{name}.tokens", found["tokens"], COUNT, size)
    _check_sum(f"the sum of {name}.tokens", sum(found["tokens"]), max(0, num - 2))
    for side in SIDES:
        _check_list(f"{name}.{side}", found[side], LOSS, size)
        _check_sum(f"the sum of {name}.{side}", sum(found[side]), record[side]["inner"])


def _check_keys(name: str, found: Any, expected: set[str]) -> None:
    if not isinstance(found, dict):
        raise DataError(f"{name} is {_shown(found)}, expected an object")
    if missing := sorted(expected - set(found)):
        raise DataError(f"{name} has no field {missing[0]!r}")
    if unknown := sorted(set(found) - expected):
        raise DataError(f"{name} has the field {unknown[0]!r}, expected only {', '.join(sorted(expected))}")


def _check_known(record: Record, known: Record) -> None:
    """Check the fields that follow from the item alone. They are compared as JSON, where 1, 1.0 and true differ."""
    for name, expected in known.items():
        if json.dumps(record[name], sort_keys=True) != json.dumps(expected, sort_keys=True):
            raise DataError(f"{name} is {_shown(record[name])}, expected {_shown(expected)}, the item's")


def _check_list(name: str, found: Any, expected: str, size: int) -> None:
    if not isinstance(found, list) or len(found) != size:
        raise DataError(f"{name} is {_shown(found)}, expected a list of {size} values")
    for number, value in enumerate(found):
        _check_value(f"{name}[{number}]", value, expected)


def _check_value(name: str, found: Any, expected: str) -> None:
    if not TESTS[expected](found):
        raise DataError(f"{name} is {_shown(found)}, expected {expected}")


def _check_sum(name: str, found: float, expected: float) -> None:
    if not math.isclose(found, expected, rel_tol=ROUNDING, abs_tol=ROUNDING):
        raise DataError(f"{name} is {found}, expected {expected}, the sum of its parts")


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 60 else f"{text[:60]}..."

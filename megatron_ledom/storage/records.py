"""JSON Lines files in a run folder. A line is written whole or not at all; an error names a damaged line."""

import json
import logging
import math
import os
import shlex
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from megatron_ledom.errors import DataError
from megatron_ledom.storage.files import publish, write_whole
from megatron_ledom.storage.lines import append_lines

METRICS, STEPS, BAD_STEPS, LAUNCHES = "metrics.jsonl", "steps.jsonl", "bad_steps.jsonl", "launches.jsonl"
SAVES = "saves.jsonl"
"""One line for each saved checkpoint."""
Record = dict[str, Any]
Result = TypeVar("Result")

log = logging.getLogger(__name__)


def read_records(path: str, convert: Callable[[Record], Result] | None = None) -> list[Any]:
    """Return the records of a file, oldest first, each converted by `convert`; an empty list if there is no file.

    An incomplete last line, left by a kill, is skipped. Raises DataError with file and line for any other damage, and DataError if
    the path is a folder.
    """
    try:
        return [record if convert is None else _parsed(path, number, record, convert) for number, record, _ in _lines(path)]
    except IsADirectoryError as error:
        raise DataError(f"{path} is a folder, but must be a file of records; move it away, and start again") from error


def iteration_of(record: Record) -> int:
    """Return the iteration of a record. Raises KeyError or TypeError if it has none."""
    iteration = record["iteration"]
    if type(iteration) is not int:
        raise TypeError(f"its iteration is {iteration!r}")
    return iteration


def has_iteration(record: Record) -> Record:
    """Return the record unchanged. Raises the errors of `iteration_of`."""
    iteration_of(record)
    return record


def drop_after(path: str, iteration: int) -> None:
    """Remove the lines after `iteration` and an incomplete last line, so that no iteration appears twice after a resume.

    If `iteration` is 0, rename the file instead, so that the records of an earlier start are kept. Raises OSError and leaves the
    file unchanged if the remaining lines cannot be written.
    """
    lines = [(_parsed(path, number, record, iteration_of), line) for number, record, line in _lines(path)]
    if lines and iteration == 0:
        kept_as = _free_name(path)
        publish(path, kept_as)
        log.warning("an earlier start of this run saved no checkpoint; its records were renamed to %s", kept_as)
        return
    kept = b"".join(line for number, line in lines if number <= iteration)
    if not os.path.exists(path) or len(kept) == os.path.getsize(path):
        return
    write_whole(path, kept)


def append_record(path: str, record: Record) -> None:
    """Add a line and force it to the disk. An incomplete last line, left by a kill, is removed first.

    Only the end of the file is read. Raises OSError, after which nothing of the line is in the file.
    """
    append_lines(path, as_line(record))


def plain(value: float) -> float | str:
    """Return a number for JSON. NaN and infinity, which JSON lacks, become texts that `float` reads."""
    return value if math.isfinite(value) else str(value)


def as_line(record: Record) -> bytes:
    """Return a record as a line of its file. NaN and infinity, which JSON lacks, become null."""
    return json.dumps(numbers_only(record), allow_nan=False).encode() + b"\n"


def numbers_only(value: Any) -> Any:
    """Return a value for JSON: NaN and infinity in it become None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: numbers_only(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [numbers_only(item) for item in value]
    return value


def _lines(path: str) -> Iterator[tuple[int, Record, bytes]]:
    """Yield number, record and text of each whole line."""
    try:
        file = open(path, "rb")  # noqa: SIM115  closed below
    except FileNotFoundError:
        return
    with file:
        for number, line in enumerate(file, 1):
            if line.endswith(b"\n"):
                yield number, _parsed(path, number, line, _as_record), line


def _as_record(line: bytes) -> Record:
    record = json.loads(line)
    if not isinstance(record, dict):
        raise TypeError("it is not an object")
    return record


def _parsed(path: str, number: int, value: Any, convert: Callable[[Any], Result]) -> Result:
    try:
        return convert(value)
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        raise DataError(
            f"{path}:{number}: this line is damaged ({reason}); delete it with `sed -i {number}d {shlex.quote(path)}` and start again:"
            " only that record is lost"
        ) from error


def _free_name(path: str) -> str:
    number = 1
    while os.path.exists(f"{path}.{number}"):
        number += 1
    return f"{path}.{number}"

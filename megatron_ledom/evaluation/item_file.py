"""The file of an evaluation's records: a JSON line for each item. A later run of the same command resumes it.

The caller holds the lock of the output folder (`storage.locks`) while it reads and appends.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_ledom.errors import DataError, cannot_write
from megatron_ledom.storage.files import json_text, write_json
from megatron_ledom.storage.jobs import check_same_request
from megatron_ledom.storage.lines import append_lines, cut_lines, whole_lines

NUMBER = "item"
"""Key of the item's number, from 0. It is checked when a run resumes."""
LARGEST_INTEGER = 2**63
Check = Callable[[int, Mapping[str, Any]], None]
"""Check of an item's number and record.

It raises DataError, without file and line, if the command cannot have written the record.
"""


def numbered(begin: int, records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the records with their items' numbers, from `begin`."""
    return [{NUMBER: number, **record} for number, record in enumerate(records, begin)]


class ItemFile:
    """`FOLDER/NAME.jsonl` with the records, and `NAME.json`, written before it, with the settings that produced them."""

    def __init__(self, folder: Path, name: str, made_by: Mapping[str, Any]) -> None:
        self.path, self._notes = folder / f"{name}.jsonl", folder / f"{name}.json"
        self._made_by = json.loads(json_text(made_by, where=self._notes))
        self._remedy = f"remove {self.path} to start again"
        self._cut_to: int | None = None

    def resume(self, window: int, num_items: int, check: Check) -> list[dict[str, Any]]:
        """Return the records of an earlier run: all of `num_items`, or whole windows of them.

        The first `append` cuts off the rest. Raises MismatchError if the file has a whole line and other settings, and
        DataError, with file and line, for a line that is damaged, out of order or refused by `check`. Lines beyond
        `num_items`, from a run with a larger limit, stay: only their numbers are checked. A file without a whole line is
        ignored.
        """
        lines = whole_lines(self.path)
        if lines:
            self._check_made_by()
        num_kept = num_items if len(lines) >= num_items else len(lines) // window * window
        records = [self._record(number, line, check) for number, line in enumerate(lines[:num_kept])]
        for number, line in enumerate(lines[num_items:], num_items):
            self._record(number, line)
        self._cut_to = sum(map(len, lines[:num_kept])) if len(lines) < num_items else None
        return records

    def _check_made_by(self) -> None:
        """Raise MismatchError if the lines were written with other settings, DataError if the settings are missing."""
        advice = f"give the same options to resume, name another --output, or {self._remedy}"
        check_same_request(self.path, self._read_notes(), self._made_by, advice)

    def _read_notes(self) -> dict[str, Any]:
        unknown = f"so the settings of {self.path.name} are unknown; remove both files to start again"
        if not self._notes.is_file():
            raise DataError(f"{self._notes} is missing, {unknown}")
        try:
            made_by = json.loads(self._notes.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"{self._notes} is not JSON ({error}), {unknown}") from error
        return made_by if isinstance(made_by, dict) else {}

    def _record(self, number: int, line: bytes, check: Check | None = None) -> dict[str, Any]:
        """Return the record of one line: an object of finite numbers, with the expected item number, that passes `check`."""
        where = f"{self.path}:{number + 1}"
        try:
            record = json.loads(line, parse_constant=_finite, parse_float=_finite, parse_int=_integer)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where} is damaged ({error}); {self._remedy}") from error
        if not isinstance(record, dict):
            raise DataError(f"{where} contains a {type(record).__name__}, expected an object; {self._remedy}")
        if NUMBER not in record:
            raise DataError(f"{where} has no number under {NUMBER!r}, expected item {number}; {self._remedy}")
        found = record[NUMBER]
        if type(found) is not int or found != number:
            raise DataError(
                f"{where} is of item {found!r}, expected item {number}: two processes may have written it; {self._remedy}"
            )
        if check is not None:
            try:
                check(number, record)
            except DataError as error:
                raise DataError(f"{where}: {error}; {self._remedy}") from error
        return record

    def append(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Append the records of a window. They are on the disk when this returns."""
        lines = "".join(json_text(record, where=self.path) + "\n" for record in records)
        try:
            if self._cut_to is not None:  # settings first, so that lines never stand next to another run's settings
                write_json(self._notes, self._made_by)
                cut_lines(self.path, self._cut_to)
                self._cut_to = None
            append_lines(self.path, lines.encode())
        except OSError as error:
            raise cannot_write(error, str(self.path)) from error


def _finite(text: str) -> float:
    """Return the number of a JSON text. Raises ValueError for NaN, Infinity and a number that overflows."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not a finite number")
    return value


def _integer(text: str) -> int:
    """Return the integer of a JSON text. Raises ValueError for one of more than 64 bits: no count is that large."""
    value = int(text)
    if abs(value) >= LARGEST_INTEGER:
        raise ValueError(f"{text[:24]}... is larger than any count")
    return value

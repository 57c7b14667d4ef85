"""The file of an evaluation's items: a JSON line for each, which a later run of the same command resumes.

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
"""Key of a line's number, from 0: it is checked before the line is resumed."""
LARGEST_INTEGER = 2**63
Check = Callable[[int, Mapping[str, Any]], None]
"""Raises DataError, without file and line, for the record of an item (its number, its record) that the command cannot have written."""


def numbered(begin: int, records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the records of the items from `begin` on, each with its number."""
    return [{NUMBER: number, **record} for number, record in enumerate(records, begin)]


class ItemFile:
    """`FOLDER/NAME.jsonl`, and beside it `NAME.json` with what made it; the second is written first."""

    def __init__(self, folder: Path, name: str, made_by: Mapping[str, Any]) -> None:
        self.path, self._notes = folder / f"{name}.jsonl", folder / f"{name}.json"
        self._made_by = json.loads(json_text(made_by, where=self._notes))
        self._remedy = f"remove {self.path} to start again"
        self._cut_to: int | None = None

    def resume(self, window: int, num_items: int, check: Check) -> list[dict[str, Any]]:
        """Return the lines of an earlier run: all of `num_items`, or whole windows of them; the first `append` cuts off the rest.

        Raises MismatchError where a file with any whole line was made otherwise, and DataError, with file and line, for a line that
        is damaged, out of order or refused by `check`. Lines beyond `num_items`, of a larger limit, stay: only their numbers are
        checked. A file without a whole line hinders nobody.
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
        """Refuse lines that were made otherwise, or nobody knows how."""
        advice = f"give the same options to resume, name another --output, or {self._remedy}"
        check_same_request(self.path, self._read_notes(), self._made_by, advice)

    def _read_notes(self) -> dict[str, Any]:
        unknown = f"so nobody knows what made {self.path.name}; remove both to start again"
        if not self._notes.is_file():
            raise DataError(f"{self._notes} is missing, {unknown}")
        try:
            made_by = json.loads(self._notes.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"{self._notes} is not JSON ({error}), {unknown}") from error
        return made_by if isinstance(made_by, dict) else {}

    def _record(self, number: int, line: bytes, check: Check | None = None) -> dict[str, Any]:
        """Return one line, checked: an object of finite numbers, of the item that belongs there, and as `check` wants it."""
        where = f"{self.path}:{number + 1}"
        try:
            record = json.loads(line, parse_constant=_finite, parse_float=_finite, parse_int=_integer)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where} is damaged ({error}); {self._remedy}") from error
        if not isinstance(record, dict):
            raise DataError(f"{where} holds a {type(record).__name__}, expected an object; {self._remedy}")
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
        """Add a window's lines; they are on the disk when this returns."""
        lines = "".join(json_text(record, where=self.path) + "\n" for record in records)
        try:
            if self._cut_to is not None:  # the notes come first, so no line is ever beside the notes of another run
                write_json(self._notes, self._made_by)
                cut_lines(self.path, self._cut_to)
                self._cut_to = None
            append_lines(self.path, lines.encode())
        except OSError as error:
            raise cannot_write(error, str(self.path)) from error


def _finite(text: str) -> float:
    """Return the number of a JSON text. Raise ValueError for NaN, Infinity and what overflows to it."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not a finite number")
    return value


def _integer(text: str) -> int:
    """Return the integer of a JSON text. Raise ValueError for one of more than 64 bits: no count is that large."""
    value = int(text)
    if abs(value) >= LARGEST_INTEGER:
        raise ValueError(f"{text[:24]}... is larger than any count")
    return value

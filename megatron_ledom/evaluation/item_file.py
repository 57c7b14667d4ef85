"""What was found of each item as JSON lines, which a later run of the same command resumes.

The caller holds the lock of the output folder (`storage.locks`) while it reads and appends.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_ledom.errors import DataError, MismatchError, cannot_write
from megatron_ledom.storage.files import json_text, write_json

NUMBER = "item"
"""Key of a line's number, from 0, if its command writes one: it is checked before the line is resumed."""


class ItemFile:
    """`FOLDER/NAME.jsonl`, and beside it `NAME.json` with what made it; the second is written first."""

    def __init__(self, folder: Path, name: str, made_by: Mapping[str, Any]) -> None:
        self.path, self._notes = folder / f"{name}.jsonl", folder / f"{name}.json"
        self._made_by = json.loads(json_text(made_by, where=self._notes))

    def resume(self, window: int, num_items: int) -> list[dict[str, Any]]:
        """Return the lines of an earlier run: all of `num_items`, or whole windows of them; the rest is cut off.

        Raises MismatchError where they were made otherwise, and DataError, with file and line, for a line that is damaged or out of
        order; a run that ended before its first window hinders nobody.
        """
        lines = self._whole_lines()
        if len(lines) < min(window, num_items):
            self._begin()
            return []
        made_by = self._read_notes()
        if made_by != self._made_by:
            names = sorted({*made_by, *self._made_by})
            changed = [name for name in names if made_by.get(name) != self._made_by.get(name)]
            told = "; ".join(f"{name} was {made_by.get(name)}, is {self._made_by.get(name)}" for name in changed)
            raise MismatchError(
                f"{self.path} was made otherwise ({told}); run with the same settings to resume, or give another --output"
            )
        num_kept = num_items if len(lines) >= num_items else len(lines) // window * window
        records = [self._record(number, line) for number, line in enumerate(lines[:num_kept])]
        if len(lines) < num_items:
            os.truncate(self.path, sum(map(len, lines[:num_kept])))
        return records

    def _read_notes(self) -> dict[str, Any]:
        try:
            made_by = json.loads(self._notes.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(
                f"{self._notes} is not JSON ({error}), so nobody knows what made {self.path.name}; remove both to start again"
            ) from error
        return made_by if isinstance(made_by, dict) else {}

    def _record(self, number: int, line: bytes) -> dict[str, Any]:
        """Return one line, checked: an object, and the item that belongs there."""
        where = f"{self.path}:{number + 1}"
        remedy = f"remove {self.path} to start again"
        try:
            record = json.loads(line)
        except ValueError as error:
            raise DataError(f"{where} is damaged ({error}); {remedy}") from error
        if not isinstance(record, dict):
            raise DataError(f"{where} holds a {type(record).__name__}, expected an object; {remedy}")
        if record.get(NUMBER, number) != number:
            raise DataError(
                f"{where} is of item {record[NUMBER]}, expected item {number}: two processes may have written it; {remedy}"
            )
        return record

    def _whole_lines(self) -> list[bytes]:
        if not (self._notes.is_file() and self.path.is_file()):
            return []
        return [line for line in self.path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]

    def _begin(self) -> None:
        self.path.unlink(missing_ok=True)
        write_json(self._notes, self._made_by)
        self.path.touch()

    def append(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Add a window's lines; they are on the disk when this returns."""
        lines = [json_text(record, where=self.path) + "\n" for record in records]
        try:
            with self.path.open("a", encoding="utf-8") as output:
                output.writelines(lines)
                output.flush()
                os.fsync(output.fileno())
        except OSError as error:
            raise cannot_write(error, str(self.path)) from error

"""What was found of each item as JSON lines, which a later run of the same command goes on from."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_ledom.errors import MismatchError


class ItemFile:
    """`FOLDER/NAME.jsonl`, and beside it `NAME.json` with what made it; the second is written first."""

    def __init__(self, folder: Path, name: str, made_by: Mapping[str, Any]) -> None:
        self.path, self._notes = folder / f"{name}.jsonl", folder / f"{name}.json"
        self._made_by = json.loads(json.dumps(made_by))

    def resume(self, window: int, num_items: int) -> list[dict[str, Any]]:
        """The lines of an earlier run: all of `num_items`, or whole windows of them; the rest is cut off.

        MismatchError where they were made otherwise; a run that ended before its first window hinders nobody.
        """
        lines = self._whole_lines()
        if len(lines) < min(window, num_items):
            self._begin()
            return []
        made_by = json.loads(self._notes.read_text(encoding="utf-8"))
        if made_by != self._made_by:
            names = sorted({*made_by, *self._made_by})
            changed = [name for name in names if made_by.get(name) != self._made_by.get(name)]
            told = "; ".join(f"{name} was {made_by.get(name)}, is {self._made_by.get(name)}" for name in changed)
            raise MismatchError(f"{self.path} was made otherwise ({told}); say the same to go on, or give another --output")
        num_kept = num_items if len(lines) >= num_items else len(lines) // window * window
        if len(lines) < num_items:
            os.truncate(self.path, sum(map(len, lines[:num_kept])))
        return [json.loads(line) for line in lines[:num_kept]]

    def _whole_lines(self) -> list[bytes]:
        if not (self._notes.is_file() and self.path.is_file()):
            return []
        return [line for line in self.path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]

    def _begin(self) -> None:
        self.path.unlink(missing_ok=True)
        part = self._notes.with_name(self._notes.name + ".part")
        part.write_text(json.dumps(self._made_by, indent=1) + "\n", encoding="utf-8")
        part.replace(self._notes)
        self.path.touch()

    def append(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Add a window's lines; they are on the disk when this returns."""
        with self.path.open("a", encoding="utf-8") as output:
            output.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
            output.flush()
            os.fsync(output.fileno())

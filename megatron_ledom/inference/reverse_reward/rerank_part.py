"""The unfinished output of a reranking, saved window by window, with the notes from which a killed run resumes."""

import json
import math
import os
import sys
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from megatron_ledom.errors import DataError, MismatchError, UsageError, cannot_write
from megatron_ledom.inference.reverse_reward.input_lines import Record, is_ranked_line, json_line
from megatron_ledom.storage.files import publish, write_whole
from megatron_ledom.storage.jobs import check_same_request
from megatron_ledom.storage.lines import append_lines, cut_lines, whole_lines

SUMS = ("forward_tokens", "reverse_tokens", "seconds")
COUNTS = ("num_lines", "num_candidates", "num_skipped", "num_skipped_prompts")


@dataclass(frozen=True, slots=True)
class Window:
    """The output of consecutive lines, and their token usage and seconds: the fields of SUMS."""

    lines: list[dict[str, Any]]
    usage: dict[str, float]

    def counts(self) -> dict[str, int]:
        """Return the fields of COUNTS."""
        return {
            "num_lines": len(self.lines),
            "num_candidates": sum(len(line["scores"]) for line in self.lines),
            "num_skipped": sum(line.get("num_skipped", 0) for line in self.lines),
            "num_skipped_prompts": sum("skipped" in line for line in self.lines),
        }


def usage_file(output: str | Path) -> Path:
    """Return the `.spent.json` file of an output, which records its settings and token usage; links are followed."""
    return Path(f"{os.path.realpath(output)}.spent.json")


class UnfinishedOutput:
    """The files `<output>.part`, with whole windows only, and `<output>.part.notes`, with the settings and a line for each window.

    Both files are only appended to, so the cost of a window does not depend on the windows before it.
    """

    def __init__(self, output: Path, made_by: dict[str, Any]) -> None:
        self._output, self._part = output, output.with_name(output.name + ".part")
        self._notes = output.with_name(output.name + ".part.notes")
        self._report = usage_file(output)
        self._made_by = json.loads(json.dumps(made_by, default=sorted, allow_nan=False))
        self._windows: list[dict[str, float]] = []
        self._is_stale = False

    def is_complete(self, records: list[Record], *, overwrite: bool) -> bool:
        """Return True if the output exists, from the same input and settings; UsageError for another one unless `overwrite`."""
        if not self._output.exists() or overwrite:
            return False
        advice = "pass --overwrite to replace it, or name another output"
        if self._part.exists():
            raise UsageError(f"{self._output} exists, and {self._part} shows an unfinished replacement; {advice}")
        if not self._report.is_file():
            raise UsageError(f"{self._output} exists, but no {self._report.name} records how it was made; {advice}")
        try:
            made_by = self._recorded()
        except (ValueError, TypeError) as error:
            raise UsageError(f"{self._output} exists, but {self._report} is damaged ({error}); {advice}") from error
        check_same_request(self._output, made_by, self._made_by, advice, UsageError)
        with self._output.open("rb") as lines:
            for record, line in zip_longest(records, lines):
                if record is None or not is_ranked_line(record, line):
                    raise UsageError(f"{self._output} was made from another input; {advice}")
        self._notes.unlink(missing_ok=True)  # of a run that was killed in its last step
        return True

    def _recorded(self) -> dict[str, Any]:
        """Return the `made_by` of a complete output. Raises ValueError or TypeError if its report lacks a field."""
        report = json.loads(self._report.read_bytes())
        if not isinstance(report, dict) or not isinstance(report.get("made_by"), dict):
            raise TypeError("it has no made_by")
        for name in (*SUMS, *COUNTS):
            if type(report.get(name)) not in (int, float):
                raise TypeError(f"{name} is {str(report.get(name))[:40]}, expected a number")
        return dict(report["made_by"])

    def resume(self, windows: list[list[Record]], *, overwrite: bool = False) -> int:
        """Cut the output of an earlier run to whole windows, check that it belongs to this input, and return their number.

        overwrite: work from another input or other settings is not an error; the first new window replaces it.
        """
        try:
            return self._resume(windows)
        except (MismatchError, DataError) as error:
            if not overwrite:
                raise type(error)(f"{error}, or pass --overwrite to start again") from error
            print(f"{error}; --overwrite is set, so the run starts again", file=sys.stderr)
            self._is_stale = True
            return 0

    def _resume(self, windows: list[list[Record]]) -> int:
        notes = self._read_notes() if self._part.is_file() else []
        if not notes:  # no earlier run, or one that ended in its last step
            self._part.unlink(missing_ok=True)
            self._notes.unlink(missing_ok=True)
            return 0
        check_same_request(self._part, json.loads(notes[0])["made_by"], self._made_by, "give the same options to resume")
        finished = windows[: len(notes) - 1]
        records = list(chain.from_iterable(finished))
        num_bytes = 0
        with self._part.open("rb") as lines:
            for record in records:
                line = lines.readline()
                if not is_ranked_line(record, line):
                    raise MismatchError(
                        f"{self._part} was made from another input than {record.where}; give the same input to resume"
                    )
                num_bytes += len(line)
        self._windows = [json.loads(line) for line in notes[1 : len(finished) + 1]]
        cut_lines(self._part, num_bytes)
        cut_lines(self._notes, sum(map(len, notes[: len(finished) + 1])))
        return len(finished)

    def _read_notes(self) -> list[bytes]:
        """Return the whole lines of the notes; a killed run may leave an incomplete last line."""
        notes = whole_lines(self._notes)
        try:
            for number, line in enumerate(notes):
                found = json.loads(line)
                missing = {"made_by"} - set(found) if number == 0 else {*SUMS, *COUNTS} - set(found)
                if missing:
                    raise ValueError(f"line {number + 1} has no {sorted(missing)[0]}")
                wrong = [name for name, value in found.items() if not isinstance(value, (int, float) if number else dict)]
                if wrong:
                    raise ValueError(f"line {number + 1} has {wrong[0]}={str(found[wrong[0]])[:40]}")
        except (ValueError, TypeError) as error:
            raise DataError(f"{self._notes} is damaged ({error}); name another output") from error
        return notes

    def append(self, window: Window) -> None:
        """Append a window; its line in the notes is written after its output is safe on the disk."""
        self._remove_stale()
        self._windows.append({**window.counts(), **window.usage})
        note = json_line(dict(self._windows[-1]))
        if not self._notes.exists():
            note = json_line({"made_by": self._made_by}) + note
        try:
            append_lines(self._part, b"".join(map(json_line, window.lines)))
            append_lines(self._notes, note)
        except OSError as error:
            raise cannot_write(error, str(self._part)) from error

    def finish(self) -> None:
        """Write the `.spent.json` file and give the output its name."""
        total: dict[str, Any] = {name: math.fsum(window[name] for window in self._windows) for name in SUMS}
        total |= {name: sum(int(window[name]) for window in self._windows) for name in COUNTS}
        report = {**total, "made_by": self._made_by}
        self._remove_stale()
        try:
            self._part.touch()
            write_whole(self._report, json.dumps(report, indent=1, allow_nan=False).encode())
            publish(self._part, self._output)
            self._notes.unlink(missing_ok=True)
        except OSError as error:
            raise cannot_write(error, str(self._output)) from error

    def _remove_stale(self) -> None:
        """Remove unfinished work that is replaced. Done late, so that a run that fails at its start loses nothing."""
        if self._is_stale:
            self._notes.unlink(missing_ok=True)
            self._part.unlink(missing_ok=True)
            self._is_stale = False

"""Commands that compute a JSON Lines file from another one in windows of lines, and resume after a kill.

Only the input and the settings decide the windows. So a killed run repeats its unfinished window from the same first line, and ends
with the same bytes. Finished windows are in `<output>.part`, the settings and the token usage in `<output>.part.notes`. At the end
the output gets its name, and `<output>.spent.json` records the usage.
"""

import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from tqdm import tqdm

from megatron_ledom.errors import DataError, LedomError, MismatchError, TransientError, UsageError, cannot_write
from megatron_ledom.inference.json_fields import json_line, same_fields
from megatron_ledom.storage.files import publish, real_path, write_whole
from megatron_ledom.storage.jobs import check_same_request
from megatron_ledom.storage.lines import append_lines, cut_lines, whole_lines
from megatron_ledom.storage.locks import output_file_lock

NUM_NAMED = 20
"""Number of skipped texts that are named on stderr; further ones are only counted."""
SUMS = ("forward_tokens", "reverse_tokens", "seconds")


class InputLine(Protocol):
    """A checked line of an input; `fields` are all its fields as read, `where` is its file and number."""

    @property
    def where(self) -> str:
        """File and number of the line."""

    @property
    def fields(self) -> dict[str, Any]:
        """All fields of the line."""


Line = TypeVar("Line", bound=InputLine)


@dataclass(frozen=True, slots=True)
class Window:
    """The output of consecutive lines, with their token usage and seconds (the fields of SUMS), and other counts."""

    lines: list[dict[str, Any]]
    usage: dict[str, float]
    counts: dict[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class LineKind:
    """The kind of an output: the names of a window's counts, the fields that the command writes, and one that every line has."""

    counts: tuple[str, ...]
    written: tuple[str, ...]
    mark: str

    def is_output_of(self, line: InputLine, output: bytes | None) -> bool:
        """Return True if an output line belongs to a line of the input: all fields that the command does not write are equal."""
        return same_fields(line.fields, output, self.written, self.mark)


class LineJob(Protocol[Line]):
    """The work of a command on the lines of a file."""

    @property
    def kind(self) -> LineKind:
        """The kind of the output."""

    def read(self, path: Path) -> list[Line]:
        """Return the checked lines of the input. Raise DataError for a bad line."""

    def windows(self, lines: list[Line]) -> list[list[Line]]:
        """Return the lines in windows."""

    def compute(self, windows: list[list[Line]]) -> Iterator[Window]:
        """Load the models, check the windows, and yield the output of each."""


def write_line_file(
    job: LineJob[Line], input_path: str | Path, output_path: str | Path, made_by: dict[str, Any], *, overwrite: bool
) -> int:
    """Write the output of a job, or resume it, and return the number of lines.

    made_by: everything that the output depends on but the input; a resumed run must have the same. overwrite: replace an output or
    unfinished work from another input or other settings; without it they raise an error. If the output is a link, all files are
    next to its target. Raises MismatchError if the unfinished work is from another input or other settings.
    """
    input_path, output_path = Path(input_path), Path(output_path)
    _check_paths(input_path, output_path)
    real_path(output_path)  # refuses a link that leads nowhere before models are loaded
    lines = job.read(input_path)
    output_path.parent.mkdir(parents=True, exist_ok=True)
    with output_file_lock(output_path):
        _write_into(UnfinishedOutput(Path(real_path(output_path)), made_by, job.kind), job, lines, overwrite=overwrite)
    return len(lines)


def _write_into(part: "UnfinishedOutput[Line]", job: LineJob[Line], lines: list[Line], *, overwrite: bool) -> None:
    """Write the output window by window, after those of an earlier run. The caller holds the lock of the output."""
    if part.is_complete(lines, overwrite=overwrite):
        print(f"{part.output} is complete; nothing to do", file=sys.stderr)
        return
    windows = job.windows(lines)
    num_done = part.resume(windows, overwrite=overwrite)
    computed = job.compute(windows[num_done:])
    with tqdm(total=len(lines), unit=" prompts", file=sys.stderr, disable=not sys.stderr.isatty()) as bar:
        bar.update(sum(map(len, windows[:num_done])))
        for window in computed:
            part.append(window)
            bar.update(len(window.lines))
    part.finish()


def _check_paths(input_path: Path, output_path: Path) -> None:
    """Raise UsageError, before any model is loaded, for an input that is not a file or an output that cannot be written."""
    if not input_path.is_file():
        raise UsageError(f"{input_path} is not a file; pass JSON lines with a prompt each")
    for folder in output_path.parents:
        if folder.exists() and not folder.is_dir():
            raise UsageError(f"{folder} is not a folder, so the output {output_path} cannot be in it; name another path")
    if output_path.is_dir() or output_path.resolve() == input_path.resolve():
        raise UsageError(f"the output {output_path} is a folder or the input itself; name another file")


class SkipLog:
    """Names the first skipped texts on stderr."""

    def __init__(self) -> None:
        self._num = 0

    def add(self, name: str, problem: str | None) -> None:
        """Print the name of a text that has a problem."""
        if problem is None:
            return
        self._num += 1
        if self._num <= NUM_NAMED:
            tqdm.write(f"skipped: {name}: {problem}", file=sys.stderr)
        elif self._num == NUM_NAMED + 1:
            tqdm.write('further skipped texts are only counted; the output marks each with "skipped"', file=sys.stderr)


Output = TypeVar("Output")


def naming_lines(window: list[Line], compute: Callable[[list[Line]], Output]) -> Output:
    """Return the output of a window; after an error, find the line that causes it by computing each line alone, and name it."""
    try:
        return compute(window)
    except TransientError:  # not caused by a line
        raise
    except LedomError as whole:
        for line in window:
            try:
                compute([line])
            except LedomError as error:
                raise type(error)(f"{line.where}: {error}") from error
        raise whole


def usage_file(output: str | Path) -> Path:
    """Return the `.spent.json` file of an output, which records its settings and token usage; links are followed."""
    return Path(f"{os.path.realpath(output)}.spent.json")


class UnfinishedOutput(Generic[Line]):
    """The files `<output>.part`, with whole windows only, and `<output>.part.notes`, with the settings and a line for each window.

    Both files are only appended to, so the cost of a window does not depend on the windows before it.
    """

    def __init__(self, output: Path, made_by: dict[str, Any], kind: LineKind) -> None:
        self.output, self._kind, self._part = output, kind, output.with_name(output.name + ".part")
        self._notes = output.with_name(output.name + ".part.notes")
        self._report = usage_file(output)
        self._made_by = json.loads(json.dumps(made_by, default=sorted, allow_nan=False))
        self._windows: list[dict[str, float]] = []
        self._is_stale = False

    def is_complete(self, records: list[Line], *, overwrite: bool) -> bool:
        """Return True if the output exists, from the same input and settings; UsageError for another one unless `overwrite`."""
        if not self.output.exists() or overwrite:
            return False
        advice = "pass --overwrite to replace it, or name another output"
        if self._part.exists():
            raise UsageError(f"{self.output} exists, and {self._part} shows an unfinished replacement; {advice}")
        if not self._report.is_file():
            raise UsageError(f"{self.output} exists, but no {self._report.name} records how it was made; {advice}")
        try:
            made_by = self._recorded()
        except (ValueError, TypeError) as error:
            raise UsageError(f"{self.output} exists, but {self._report} is damaged ({error}); {advice}") from error
        check_same_request(self.output, made_by, self._made_by, advice, UsageError)
        with self.output.open("rb") as lines:
            for record, line in zip_longest(records, lines):
                if record is None or not self._kind.is_output_of(record, line):
                    raise UsageError(f"{self.output} was made from another input; {advice}")
        self._notes.unlink(missing_ok=True)  # of a run that was killed in its last step
        return True

    def _recorded(self) -> dict[str, Any]:
        """Return the `made_by` of a complete output. Raises ValueError or TypeError if its report lacks a field."""
        report = json.loads(self._report.read_bytes())
        if not isinstance(report, dict) or not isinstance(report.get("made_by"), dict):
            raise TypeError("it has no made_by")
        for name in (*SUMS, *self._kind.counts):
            if type(report.get(name)) not in (int, float):
                raise TypeError(f"{name} is {str(report.get(name))[:40]}, expected a number")
        return dict(report["made_by"])

    def resume(self, windows: list[list[Line]], *, overwrite: bool = False) -> int:
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

    def _resume(self, windows: list[list[Line]]) -> int:
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
                if not self._kind.is_output_of(record, line):
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
                missing = {"made_by"} - set(found) if number == 0 else {*SUMS, *self._kind.counts} - set(found)
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
        self._windows.append({**window.counts, **window.usage})
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
        total |= {name: sum(int(window[name]) for window in self._windows) for name in self._kind.counts}
        report = {**total, "made_by": self._made_by}
        self._remove_stale()
        try:
            self._part.touch()
            write_whole(self._report, json.dumps(report, indent=1, allow_nan=False).encode())
            publish(self._part, self.output)
            self._notes.unlink(missing_ok=True)
        except OSError as error:
            raise cannot_write(error, str(self.output)) from error

    def _remove_stale(self) -> None:
        """Remove unfinished work that is replaced. Done late, so that a run that fails at its start loses nothing."""
        if self._is_stale:
            self._notes.unlink(missing_ok=True)
            self._part.unlink(missing_ok=True)
            self._is_stale = False

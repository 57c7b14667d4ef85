"""The report of a hardware check, as JSON and as Markdown. It has no names of hosts and users and no folders of the machine."""

import getpass
import json
import os
import re
import socket
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_ledom import __version__
from megatron_ledom.hardware_check.check import Status
from megatron_ledom.hardware_check.isolation import Result
from megatron_ledom.storage.files import write_file, write_json
from megatron_ledom.tables import markdown_table

FORMAT = 1
JSON_FILE, MARKDOWN_FILE = "report.json", "report.md"
ABSOLUTE = re.compile(r"(?<![\w.:/])/(?:[^/\s:'\"()\[\]{},;]+/)+")
"""The folders of an absolute path."""


@dataclass(slots=True)
class Report:
    """The results so far, and what the first check found about the machine."""

    started_at: str
    """UTC, ISO 8601."""
    minutes: float
    results: list[Result] = field(default_factory=list)
    is_complete: bool = False
    """False while checks run, and after an interruption or a kill."""

    @property
    def machine(self) -> dict[str, Any]:
        """Return the numbers of the first check, which describes the machine."""
        return self.results[0].outcome.numbers if self.results else {}

    def count(self, status: Status) -> int:
        """Return the number of checks with a status."""
        return sum(result.outcome.status is status for result in self.results)

    def summary(self) -> str:
        """Return a line such as `9 passed, 1 failed, 2 skipped`."""
        return ", ".join(f"{self.count(status)} {status}" for status in Status)

    def to_json(self) -> dict[str, Any]:
        """Return the content of report.json."""
        content = {
            "format": FORMAT,
            "version": __version__,
            "started_at": self.started_at,
            "minutes": self.minutes,
            "is_complete": self.is_complete,
            **{str(status): self.count(status) for status in Status},
            "machine": self.machine,
            "checks": [_row(result, with_numbers=index > 0) for index, result in enumerate(self.results)],
        }
        found: dict[str, Any] = anonymous(content)
        return found

    def write(self, folder: str) -> None:
        """Write both files, each whole or not at all."""
        content = self.to_json()
        write_json(os.path.join(folder, JSON_FILE), content)
        write_file(os.path.join(folder, MARKDOWN_FILE), markdown(content))


def _row(result: Result, *, with_numbers: bool) -> dict[str, Any]:
    return {
        "name": result.check.name,
        "title": result.check.title,
        "status": str(result.outcome.status),
        "reason": result.outcome.reason,
        "seconds": round(result.seconds, 1),
        "limit_seconds": round(result.limit_seconds, 1),
        "numbers": result.outcome.numbers if with_numbers else {},
        "log_tail": result.log_tail,
    }


def markdown(content: dict[str, Any]) -> str:
    """Return the report as Markdown, from the content of report.json."""
    counts = ", ".join(f"{content[status]} {status}" for status in Status)
    state = "" if content["is_complete"] else ", **not complete**"
    head = f"megatron_ledom {content['version']}, {content['started_at']}, {content['minutes']:g} minutes: {counts}{state}."
    rows = [["check", "result", "seconds", "time limit (s)", "finding"]]
    rows += [
        [one["name"], one["status"], f"{one['seconds']:.1f}", f"{one['limit_seconds']:.0f}", _line(one["reason"])]
        for one in content["checks"]
    ]
    parts = ["# Hardware check", head, "## Checks", markdown_table(rows, "llrrl"), "## Machine", _values(content["machine"])]
    for one in content["checks"]:
        if one["numbers"] or one["log_tail"]:
            parts += [f"## {one['name']}: {one['status']}", one["title"], _values(one["numbers"])]
        if one["log_tail"]:
            parts.append("\n".join(["Last lines of the log:", "", "````text", *one["log_tail"], "````"]))
    return "\n\n".join(part for part in parts if part) + "\n"


def _line(text: str) -> str:
    return " ".join(text.split())


def _values(numbers: dict[str, Any]) -> str:
    """Return the values as a table, and each list of objects with the same keys as a table of its own."""
    tables = {key: value for key, value in numbers.items() if _is_table(value)}
    rows = [[key, _text(value)] for key, value in _flat(numbers, "") if key not in tables]
    found = [markdown_table([["value", ""], *rows], "lr")] if rows else []
    for key, values in tables.items():
        lines = [[_text(cell) for cell in value.values()] for value in values]
        found += [f"{key}:", markdown_table([list(values[0]), *lines])]
    return "\n\n".join(found)


def _is_table(value: Any) -> bool:
    return bool(value) and isinstance(value, list) and all(isinstance(row, dict) and [*row] == [*value[0]] for row in value)


def _flat(value: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, inner in value.items():
        if isinstance(inner, dict):
            yield from _flat(inner, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", inner


def _text(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e5 else f"{value:,.0f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return _line(value) if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def anonymous(value: Any) -> Any:
    """Return JSON with the folders of absolute paths removed from its texts, and names of this host and user replaced."""
    if isinstance(value, dict):
        return {key: anonymous(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [anonymous(inner) for inner in value]
    if not isinstance(value, str):
        return value
    for folder in _known_folders():
        value = value.replace(folder, "")
    value = ABSOLUTE.sub("…/", value)
    for name, word in _own_names():
        value = re.sub(rf"(?<![\w-]){re.escape(name)}(?![\w-])", word, value)
    return value


def _known_folders() -> Sequence[str]:
    """Return folders whose content has names of its own: packages are shown as `torch/nn/functional.py`."""
    paths = sysconfig.get_paths()
    installed = [paths["purelib"], paths["platlib"], paths["stdlib"], str(Path(__file__).parents[2])]
    return sorted({f"{folder}/" for folder in installed}, key=len, reverse=True)


def _own_names() -> Iterator[tuple[str, str]]:
    host = socket.gethostname()
    yield from ((name, "HOST") for name in (host, host.partition(".")[0]) if name not in ("", "localhost"))
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # no entry for this user, as in some containers
        return
    if user != "root":
        yield user, "USER"

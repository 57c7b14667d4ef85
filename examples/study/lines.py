"""JSON lines files of the study."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_ledom.storage.files import write_file


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON lines file."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    """One object a line; the file appears whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, "".join(json.dumps(record) + "\n" for record in records))

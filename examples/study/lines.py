"""Read and write the study's JSON lines files."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_ledom.storage.files import write_file


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSON lines file."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    """Write one object per line. The file appears as a whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, "".join(json.dumps(record) + "\n" for record in records))

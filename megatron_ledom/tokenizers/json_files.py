"""JSON objects of a tokenizer folder."""

import json
from pathlib import Path
from typing import Any

from megatron_ledom.errors import DataError
from megatron_ledom.provenance import json_library


def parse_object(content: bytes, where: str) -> dict[str, Any]:
    """Return the object of a JSON text; DataError names `where` it stands."""
    try:
        found = json_library().loads(content)
    except ValueError as error:
        raise DataError(f"{where} is not JSON ({error}); repair it or fetch it again") from error
    if not isinstance(found, dict):
        raise DataError(f"{where} holds no JSON object; repair it or fetch it again")
    return found


def read_object(path: Path) -> dict[str, Any]:
    """Return the object that a JSON file holds."""
    return parse_object(path.read_bytes(), str(path))


def as_bytes(value: dict[str, Any]) -> bytes:
    """Return the object as JSON in UTF-8."""
    library = json_library()
    return json.dumps(value, ensure_ascii=False).encode() if library is json else bytes(library.dumps(value))

"""Read the JSON objects of model and tokenizer folders."""

import json
from pathlib import Path
from typing import Any

from megatron_ledom.errors import DataError
from megatron_ledom.provenance import json_library


def read_object(path: str | Path, library: Any = None) -> dict[str, Any]:
    """Return the object of a JSON file. Raises DataError if it cannot be read or is something else.

    `library` parses it, by default `json_library()`. `json` keeps integers of more than 64 bits, which orjson turns into
    floats.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error}); make it readable, or copy it again") from error
    return parse_object(content, str(path), library)


def parse_object(content: bytes, where: str, library: Any = None) -> dict[str, Any]:
    """Return the object of a JSON text; for `library` see `read_object`. Raises DataError, which names the file as `where`."""
    try:
        found = (library or json_library()).loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} cannot be read: it is not JSON ({error}); repair it, or copy it again") from error
    if not isinstance(found, dict):
        raise DataError(f"{where} cannot be read: it contains no JSON object; repair it, or copy it again")
    return found


def as_bytes(value: dict[str, Any]) -> bytes:
    """Return the object as JSON in UTF-8."""
    library = json_library()
    return json.dumps(value, ensure_ascii=False).encode() if library is json else bytes(library.dumps(value))

"""Objects of JSON Lines files: reading them with the place of an error, and writing them as valid JSON."""

import json
import logging
import math
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_ledom.errors import DataError

log = logging.getLogger(__name__)

MOST_NESTED = 400
"""Limit on nested lists and objects around a NaN; the default recursion limit of Python 3.11 allows some more."""
MOST_DIGITS = 100_000
"""Digits of an integer that is read from a line; Python's own limit is 4,300."""


def read_objects(path: Path) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """Yield number, place and object of each line that is not blank; the number counts from 0, without blank lines.

    The object is as read: `writable` makes it valid JSON. Raises DataError with the file and the line.
    """
    with path.open("rb") as lines:
        numbered = ((number, line) for number, line in enumerate(lines, 1) if line.strip())
        for index, (number, line) in enumerate(numbered):
            with long_integers():
                fields = _object_of(line, f"{path}:{number}")
            yield index, f"{path}:{number}", fields


def text_of(fields: dict[str, Any], name: str, where: str) -> str:
    """Return a text of a line that is not empty. Raise DataError if there is none."""
    text = fields.get(name)
    if not isinstance(text, str) or not text:
        raise DataError(f'{where}: expected an object with a text that is not empty under "{name}"; add it or remove the line')
    return text


def same_fields(fields: dict[str, Any], line: bytes | None, but: Collection[str], mark: str) -> bool:
    """Return True if an output line has the field `mark` and the same fields as the input, apart from those in `but`."""
    try:
        with long_integers():
            found = json.loads(line) if line is not None else None
    except ValueError:
        return False
    if not isinstance(found, dict) or mark not in found:
        return False
    return all(key in found and found[key] == value for key, value in fields.items() if key not in but)


def json_line(fields: dict[str, Any]) -> bytes:
    """Return an object as one line of JSON in UTF-8; half of a surrogate pair, which UTF-8 lacks, is written as an escape.

    Raises ValueError for NaN and infinity, which JSON lacks.
    """
    with long_integers():
        text = json.dumps(fields, ensure_ascii=False, allow_nan=False)
        try:
            return text.encode() + b"\n"
        except UnicodeEncodeError:
            return json.dumps(fields, allow_nan=False).encode() + b"\n"


@contextmanager
def long_integers() -> Iterator[None]:
    """Allow integers of up to MOST_DIGITS digits in the block."""
    limit = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(MOST_DIGITS)
    try:
        yield
    finally:
        sys.set_int_max_str_digits(limit)


def _object_of(line: bytes, where: str) -> dict[str, Any]:
    try:
        fields = json.loads(line.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not a line of JSON in UTF-8 ({error}); repair or remove the line") from error
    return fields if isinstance(fields, dict) else {}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the object; raises ValueError for a duplicate key, because one value would be lost."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!a} is twice in an object")
    return fields


def writable(fields: dict[str, Any], where: str) -> dict[str, Any]:
    """Return the fields with null for numbers that JSON lacks (NaN, Infinity, 1e999); log a warning with line and field.

    Python and pandas write such numbers. Raises DataError for a field that is nested too deep to be written.
    """
    written = {}
    for name, value in fields.items():
        try:
            written[name] = _as_json(value)
            if written[name] is not value:
                log.warning("%s: the field %a contains NaN or Infinity, which JSON lacks; null is written instead", where, name)
        except RecursionError as error:
            raise DataError(f"{where}: the field {name!a} is nested too deep ({error}); remove it") from error
    return written


def _as_json(value: Any) -> Any:
    """Return the value itself if JSON can represent it, else a copy with nulls."""
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:
        return _with_nulls(value)
    return value


def _with_nulls(value: Any, depth: int = 0) -> Any:
    if depth > MOST_NESTED:
        raise RecursionError(f"more than {MOST_NESTED} lists and objects in each other")
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _with_nulls(inner, depth + 1) for key, inner in value.items()}
    return [_with_nulls(inner, depth + 1) for inner in value] if isinstance(value, list) else value

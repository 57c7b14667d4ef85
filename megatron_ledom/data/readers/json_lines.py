"""Lines of JSON that orjson refuses although their text is sound, and files of JSON that are not made of lines.

orjson is strict and fast; Python's `json.dumps` and pandas also write NaN and Infinity, and crawls hold lone surrogates, broken
UTF-8, huge numbers and deep nesting in fields that nobody reads. Such a line is read once more by the standard library.
"""

import json
import re
import sys
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

import orjson

from megatron_ledom.data.readers.streams import BadRecordError
from megatron_ledom.errors import DataError

MOST_NESTED = 20_000
"""Brackets within each other that are read; the standard library takes some 150 bytes of the stack for each."""
MOST_DIGITS = 4_000
"""Of an integer that Python converts; a longer one becomes a Decimal."""
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
ARRAY, OBJECT_OVER_LINES = re.compile(rb"\[\s*(\n|\{|$)"), re.compile(rb"\{[ \t\r]*\n")


def loads_leniently(line: bytes, refusal: orjson.JSONDecodeError) -> Any:
    """Return what the standard library makes of a line that orjson refused. Raises BadRecordError where it refuses it, too.

    A byte that is not UTF-8 becomes a lone surrogate: call `check_text` with the text.
    """
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(MOST_NESTED)
    try:
        return json.loads(line.decode("utf-8", "surrogateescape"), parse_int=_integer)
    except RecursionError:
        raise BadRecordError("malformed_json", f"JSON that nests more than {MOST_NESTED:,} deep") from None
    except ValueError:
        _check_utf8(line)
        raise BadRecordError("malformed_json", f"malformed JSON ({refusal})") from None
    finally:
        sys.setrecursionlimit(limit)


def _integer(digits: str) -> int | Decimal:
    return int(digits) if len(digits) <= MOST_DIGITS else Decimal(digits)


def check_text(text: str, line: bytes) -> None:
    """Raise BadRecordError for a text of `loads_leniently` that is not Unicode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        _check_utf8(line)
        surrogate = f"the text holds the lone surrogate {text[error.start]!r} at character {error.start}"
        raise BadRecordError("malformed_json", f"malformed JSON ({surrogate})") from None


def _check_utf8(line: bytes) -> None:
    try:
        line.decode()
    except UnicodeDecodeError as error:
        raise BadRecordError("invalid_utf8", f"invalid UTF-8 ({error.reason} at byte {error.start})") from None


def check_is_lines(path: str, head: bytes, lines: Sequence[bytes]) -> None:
    """Refuse a file that begins as a JSON array or as an object over several lines; head: its first bytes; lines: its first ones."""
    start = head.removeprefix(BYTE_ORDER_MARK).lstrip()
    is_over_lines = _is_over_lines(b"\n".join(lines).removeprefix(BYTE_ORDER_MARK).strip())
    if ARRAY.match(start) or (is_over_lines and start.startswith(b"[")):
        found, program = "JSON arrays", ".[]"
    elif OBJECT_OVER_LINES.match(start) or is_over_lines:
        found, program = "JSON objects over several lines (pretty-printed)", "."
    else:
        return
    raise DataError(
        f"{path} holds {found}, expected one object a line; convert it, for example with: jq -c '{program}' {path} > NEW.jsonl"
    )


def _is_over_lines(content: bytes) -> bool:
    """Return whether the first value of some whole lines ends on a later line than it begins, or goes on behind all of them."""
    first, newline, _ = content.partition(b"\n")
    if not newline or not first.startswith((b"{", b"[")):
        return False
    try:
        orjson.loads(first)
    except orjson.JSONDecodeError:
        pass
    else:
        return False
    text = content.decode("utf-8", "replace")
    try:
        _, end = json.JSONDecoder(parse_int=_integer).raw_decode(text)
    except json.JSONDecodeError as error:
        return error.pos >= len(text) - 1
    except RecursionError:
        return False
    return "\n" in text[:end]

"""Read JSON lines that orjson refuses although their text is valid, and recognize JSON files that are not lines.

orjson is fast and strict. Python's `json.dumps` and pandas also write NaN and Infinity, and crawls contain lone surrogates,
invalid UTF-8, huge numbers and deep nesting in fields that nobody reads. The standard library parses such a line again.
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
"""Limit on nested brackets. The standard library's parser in C takes about 150 bytes of the stack for each; from Python 3.12 on it
has a lower limit of its own, and the parser in Python is used beyond it."""
MOST_DIGITS = 4_000
"""Limit on the digits of an integer that Python converts; a longer one becomes a Decimal."""
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
ARRAY, OBJECT_OVER_LINES = re.compile(rb"\[\s*(\n|\{|$)"), re.compile(rb"\{[ \t\r]*\n")


def loads_leniently(line: bytes, refusal: orjson.JSONDecodeError) -> Any:
    """Parse a line that orjson refused with the standard library. Raises BadRecordError if that fails, too.

    A byte that is not UTF-8 becomes a lone surrogate, so pass the text to `check_text`.
    """
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(MOST_NESTED)
    text = line.decode("utf-8", "surrogateescape")
    try:
        try:
            return json.loads(text, parse_int=_integer)
        except RecursionError:
            sys.setrecursionlimit(2 * MOST_NESTED)  # two calls for each bracket
            return _PythonDecoder(parse_int=_integer).decode(text)
    except RecursionError:
        raise BadRecordError("malformed_json", f"JSON that nests more than {MOST_NESTED:,} deep") from None
    except ValueError:
        _check_utf8(line)
        raise BadRecordError("malformed_json", f"malformed JSON ({refusal})") from None
    finally:
        sys.setrecursionlimit(limit)


def parse_exactly(line: bytes) -> Any:
    """Parse a good line with the standard library, which keeps huge integers, NaN and Infinity, as orjson does not."""
    return loads_leniently(line, orjson.JSONDecodeError("malformed", "", 0))


class _PythonDecoder(json.JSONDecoder):
    """The standard library's parser in Python."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.scan_once = json.scanner.py_make_scanner(self)  # type: ignore[attr-defined]


def _integer(digits: str) -> int | Decimal:
    return int(digits) if len(digits) <= MOST_DIGITS else Decimal(digits)


def check_text(text: str, line: bytes) -> None:
    """Raise BadRecordError if a text from `loads_leniently` is not valid Unicode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        _check_utf8(line)
        surrogate = f"the text contains the lone surrogate {text[error.start]!r} at character {error.start}"
        raise BadRecordError("malformed_json", f"malformed JSON ({surrogate})") from None


def _check_utf8(line: bytes) -> None:
    try:
        line.decode()
    except UnicodeDecodeError as error:
        raise BadRecordError("invalid_utf8", f"invalid UTF-8 ({error.reason} at byte {error.start})") from None


def check_is_lines(path: str, head: bytes, lines: Sequence[bytes]) -> None:
    """Raise DataError if a file begins with a JSON array or an object over several lines. head, lines: its beginning."""
    start = head.removeprefix(BYTE_ORDER_MARK).lstrip()
    is_over_lines = _is_over_lines(b"\n".join(lines).removeprefix(BYTE_ORDER_MARK).strip())
    if ARRAY.match(start) or (is_over_lines and start.startswith(b"[")):
        found, program = "JSON arrays", ".[]"
    elif OBJECT_OVER_LINES.match(start) or is_over_lines:
        found, program = "JSON objects over several lines (pretty-printed)", "."
    else:
        return
    raise DataError(
        f"{path} contains {found}, expected one object per line; convert it, for example with: jq -c '{program}' {path} > NEW.jsonl"
    )


def _is_over_lines(content: bytes) -> bool:
    """Return True if the first JSON value of some whole lines does not end on its first line."""
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

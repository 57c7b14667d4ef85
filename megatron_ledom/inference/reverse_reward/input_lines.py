"""The lines of a reranking file: reading, checking, and writing them as valid JSON."""

import json
import logging
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ledom.errors import DataError
from megatron_ledom.inference.reverse_reward.reward import Candidate

log = logging.getLogger(__name__)

WRITTEN = ("greedy", "scores", "ranking", "best", "search", "num_skipped", "skipped")
"""Fields that ranking writes; it replaces those of an input that was ranked before."""

LEAST_MEAN = -100.0
"""Smallest plausible mean log-probability of a token; a given sum below it contains -9999 or -1e29 for minus infinity."""

MOST_NESTED = 400
"""Limit on nested lists and objects around a NaN; the default recursion limit of Python 3.11 allows some more."""
MOST_DIGITS = 100_000
"""Digits of an integer that is read from a line; Python's own limit is 4,300."""


@dataclass(frozen=True, slots=True)
class Record:
    """One line of a reranking file; `fields` are all its fields as read.

    problems: for each given candidate the reason why it gets no score, or None. prompt_problem: the reason why no answer can be
    written for the prompt. A line whose prompt an earlier reranking skipped has no candidates and stays skipped with its reason.
    """

    number: int
    where: str
    prompt: str
    candidates: list[Candidate] | None
    fields: dict[str, Any]
    problems: tuple[str | None, ...] = ()
    prompt_problem: str | None = None

    @property
    def was_skipped(self) -> bool:
        """True for a line that an earlier reranking skipped."""
        return self.candidates == []

    def own_fields(self) -> dict[str, Any]:
        """Return the fields without "num_skipped" and "skipped" of an earlier ranking, which not every ranking writes."""
        return {name: value for name, value in self.fields.items() if name not in ("num_skipped", "skipped")}


def read_records(path: Path, *, sampled: bool) -> Iterator[Record]:
    """Yield the checked lines of a reranking file, without blank lines. Raises DataError with the file and the line."""
    with path.open("rb") as lines:
        numbered = ((number, line) for number, line in enumerate(lines, 1) if line.strip())
        for index, (number, line) in enumerate(numbered):
            with long_integers():
                record = _parse_record(line, index, f"{path}:{number}", sampled)
            yield record


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


def is_ranked_line(record: Record, line: bytes | None) -> bool:
    """Return True if an output line belongs to the record: all fields except those that ranking writes are equal."""
    try:
        with long_integers():
            found = json.loads(line) if line is not None else None
    except ValueError:
        return False
    if not isinstance(found, dict) or "ranking" not in found:
        return False
    return all(key in found and found[key] == value for key, value in record.fields.items() if key not in WRITTEN)


def _parse_record(line: bytes, number: int, where: str, sampled: bool) -> Record:
    try:
        fields = json.loads(line.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not a line of JSON in UTF-8 ({error}); repair or remove the line") from error
    prompt = fields.get("prompt") if isinstance(fields, dict) else None
    if not isinstance(prompt, str) or not prompt:
        raise DataError(f'{where}: expected an object with a text that is not empty under "prompt"; add it or remove the line')
    given = fields.get("candidates")
    if sampled:
        if given is not None:
            raise DataError(f"{where}: has candidates already; rank them without --sample and --beam, or remove the field")
        return Record(number, where, prompt, None, _writable(fields, where))
    skipped = fields.get("skipped")
    if given == [] and isinstance(skipped, str):
        return Record(number, where, prompt, [], _writable(fields, where), prompt_problem=skipped)
    if not isinstance(given, list) or not given:
        raise DataError(
            f'{where}: expected a list of at least one answer under "candidates"; add one, or pass --sample N to'
            " let the forward model write N"
        )
    candidates = [parse_candidate(item, f"{where}: candidate {i}") for i, item in enumerate(given)]
    return Record(number, where, prompt, candidates, _writable(fields, where))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the object; raises ValueError for a duplicate key, because one value would be lost."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!a} is twice in an object")
    return fields


def _writable(fields: dict[str, Any], where: str) -> dict[str, Any]:
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


def parse_candidate(item: Any, where: str) -> Candidate:
    """Return a candidate, given as a text or as an object with its forward_logprob; raise DataError if it is neither."""
    if isinstance(item, str):
        return Candidate(item)
    if not isinstance(item, dict) or not isinstance(item.get("text"), str):
        raise DataError(f'{where}: expected a text, or an object with a text under "text"; write it as one of them')
    logprob, num_tokens = item.get("forward_logprob"), item.get("forward_tokens")
    if logprob is None:
        return Candidate(item["text"])
    if type(logprob) not in (int, float) or not -1e300 < logprob <= 0:  # an int may be too large for a float
        raise DataError(
            f"{where}: forward_logprob={repr(logprob)[:40]} is not the logarithm of a probability (a number up to 0); correct or remove it"
        )
    if num_tokens is not None and (type(num_tokens) is not int or not 0 <= num_tokens < 1 << 53):
        raise DataError(f"{where}: forward_tokens={repr(num_tokens)[:40]} is not a number of tokens; correct or remove it")
    most_tokens = len(item["text"].encode("utf-8", "replace")) if num_tokens is None else num_tokens
    if logprob <= -9999 and logprob < LEAST_MEAN * most_tokens:
        raise DataError(
            f"{where}: forward_logprob={repr(logprob)[:40]} for at most {most_tokens} tokens contains a placeholder for minus infinity;"
            " remove it, then the forward model scores the answer"
        )
    return Candidate(item["text"], float(logprob), num_tokens)

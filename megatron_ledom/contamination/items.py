"""The items that a search looks for: question and answer of each, in text order."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationItem:
    """One item of an evaluation set."""

    set: str
    number: int
    """Its number in the file of the set, from 0."""
    question: str
    answer: str = ""
    """The worked solution and the answer, or the right choice."""
    choices: tuple[str, ...] = ()
    """The other choices."""


def items_sha256(items: Iterable[EvaluationItem]) -> str:
    """Return the hash (hex) of the items, in order."""
    digest = hashlib.sha256()
    for item in items:
        values = [item.set, item.number, item.question, item.answer, item.choices]
        digest.update(json.dumps(values, ensure_ascii=True).encode() + b"\n")
    return digest.hexdigest()

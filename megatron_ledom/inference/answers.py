"""The final answer of a text, and when two answers are the same: by number, by text, or by math-verify (an extra)."""

import re
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from typing import Any, Protocol

from megatron_ledom.errors import UsageError

NUMBER = re.compile(r"(?:(?<!\d)-)?\d[\d,]*(?:\.\d+)?")


class Answers(Protocol):
    """How answers are read and compared."""

    def read(self, text: str) -> Any | None:
        """The final answer of a text; None where there is none."""

    def is_same(self, gold: Any, answer: Any) -> bool:
        """Whether two answers that were read are the same."""


def answers_by(kind: str) -> Answers:
    """`number`: the last number, or the one after `####`. `text`: all of it. `math`: math-verify, for any formula."""
    kinds: dict[str, type[Answers]] = {"number": NumberAnswers, "text": TextAnswers, "math": MathAnswers}
    if kind not in kinds:
        raise UsageError(f"answers by {kind!r} are unknown; it can be one of {', '.join(kinds)}")
    return kinds[kind]()


class NumberAnswers:
    """The number after the last `####` of a text, else its last number; 3, 3.0 and 3.00 are the same."""

    def read(self, text: str) -> Decimal | None:
        """See `Answers.read`."""
        _, mark, marked = text.rpartition("####")
        found = NUMBER.findall(marked if mark else text)
        if not found:
            return None
        try:
            return Decimal((found[0] if mark else found[-1]).replace(",", ""))
        except InvalidOperation:
            return None

    def is_same(self, gold: Decimal, answer: Decimal) -> bool:
        """See `Answers.is_same`."""
        return gold == answer


class TextAnswers:
    """The whole text, without white space around it."""

    def read(self, text: str) -> str | None:
        """See `Answers.read`."""
        return text.strip() or None

    def is_same(self, gold: str, answer: str) -> bool:
        """See `Answers.is_same`."""
        return gold == answer


class MathAnswers:
    """What math-verify reads and takes to be equal."""

    def __init__(self) -> None:
        try:
            import math_verify
        except ImportError as error:
            raise UsageError("answers by math need math-verify: pip install 'megatron-ledom[evaluation]'") from error
        self._library = math_verify

    def read(self, text: str) -> list[Any] | None:
        """See `Answers.read`. After `####` only what follows is read; a formula without dollar signs is tried in them."""
        _, mark, marked = text.rpartition("####")
        shown = marked.strip() if mark else text
        return self._library.parse(shown) or self._library.parse(f"${shown}$") or None

    def is_same(self, gold: list[Any], answer: list[Any]) -> bool:
        """See `Answers.is_same`."""
        return bool(self._library.verify(gold, answer))


def classes_of(texts: Sequence[str], answers: Answers) -> list[int | None]:
    """For each text the number of its class of same answers, in order of appearance; None where it has no answer."""
    known: list[Any] = []
    classes: list[int | None] = []
    for text in texts:
        found = answers.read(text)
        if found is None:
            classes.append(None)
            continue
        number = next((index for index, other in enumerate(known) if answers.is_same(other, found)), None)
        if number is None:
            number = len(known)
            known.append(found)
        classes.append(number)
    return classes

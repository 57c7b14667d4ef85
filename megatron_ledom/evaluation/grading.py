"""When an answer that was read out of a text is right: by math-verify, or by any of a question's accepted spellings."""

import re
import string
from collections.abc import Sequence
from typing import Protocol

from megatron_ledom.errors import DataError, UsageError
from megatron_ledom.inference.answers import answers_by, read_golds

ARTICLES = re.compile(r"\b(a|an|the)\b")


class Comparison(Protocol):
    """How an answer is compared with the accepted ones."""

    def check(self, accepted: Sequence[Sequence[str]]) -> None:
        """Refuse accepted answers, in the order of the items, that cannot be compared with. Raises DataError."""

    def is_right(self, accepted: Sequence[str], answer: str) -> bool:
        """Whether `answer`, the whole of a written field, is one of `accepted`."""


def comparison_by(kind: str) -> Comparison:
    """`math`: math-verify, for numbers and formulas. `alias`: equal but for case, punctuation, articles and white space."""
    if kind == "math":
        return MathComparison()
    if kind == "alias":
        return AliasComparison()
    raise UsageError(f"answers by {kind!r} are unknown; it can be one of math, alias")


class MathComparison:
    """math-verify. The whole field is the answer, so it is read as one formula; of an answer without LaTeX, such as "18 dollars",
    the number in it counts as well."""

    def __init__(self) -> None:
        self._answers = answers_by("math")

    def check(self, accepted: Sequence[Sequence[str]]) -> None:
        """See `Comparison.check`."""
        read_golds(self._answers, [(f"item {number}", gold) for number, golds in enumerate(accepted) for gold in golds])

    def is_right(self, accepted: Sequence[str], answer: str) -> bool:
        """See `Comparison.is_right`; DataError where an accepted answer cannot be read."""
        golds = read_golds(self._answers, [("right answer", gold) for gold in accepted])
        reads = [self._answers.read_gold(answer), *([self._answers.read(answer)] if "\\" not in answer else [])]
        found = [read for read in reads if read is not None]
        return any(self._answers.is_same(gold, read) for gold in golds for read in found)


class AliasComparison:
    """For questions with several accepted spellings; only the first line of an answer counts."""

    def check(self, accepted: Sequence[Sequence[str]]) -> None:
        """See `Comparison.check`."""
        empty = [number for number, golds in enumerate(accepted) if not any(_plain(gold) for gold in golds)]
        if empty:
            raise DataError(
                f"{len(empty)} items have no accepted answer with a letter or digit, the first is {empty[0]}; correct the file"
            )

    def is_right(self, accepted: Sequence[str], answer: str) -> bool:
        """See `Comparison.is_right`."""
        found = _plain(answer.strip().partition("\n")[0])
        return found in {_plain(gold) for gold in accepted}


def _plain(text: str) -> str:
    kept = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(ARTICLES.sub(" ", kept).split())

"""When an answer that was read out of a text is right: by math-verify, or by any of a question's accepted spellings."""

import re
import string
from collections.abc import Sequence
from typing import Protocol

from megatron_ledom.errors import DataError, UsageError
from megatron_ledom.evaluation.grading.answers import answers_by, read_golds

ARTICLES = re.compile(r"\b(a|an|the)\b")
DASH = re.compile("[\u2010-\u2013\u2212\ufe63\uff0d\u2796]")
THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")
SIGN = re.compile(r"(?:(?<=[\s(=:,;])|^)-(?=[$€£¥(\s]*\.?\d)")
POINT = re.compile(r"(?<![\w.])\.(?=\d)")
BETWEEN = re.compile(rf"(?<=\d)[{re.escape(string.punctuation)}]+(?=[-(]*\d)")
AFTER = re.compile(r"(?<=\w)[+#]+(?!\w)")
"""Punctuation that is part of an answer: of a number, or of a name such as C++."""
KEPT = 0xE000
"""Where kept punctuation is while the other is removed: in the private characters of Unicode."""


class Comparison(Protocol):
    """How an answer is compared with the accepted ones."""

    def check(self, accepted: Sequence[Sequence[str]]) -> None:
        """Refuse accepted answers, in the order of the items, that cannot be compared with. Raises DataError."""

    def is_right(self, accepted: Sequence[str], answer: str) -> bool:
        """Return True if `answer`, the whole of a written field, is one of `accepted`."""


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
        return found != "" and found in {_plain(gold) for gold in accepted}


def _plain(text: str) -> str:
    """Return words without case, punctuation and articles, and numbers with their signs; what is only articles stays as it is."""
    text = THOUSANDS.sub(lambda found: found[0].replace(",", ""), DASH.sub("-", text.lower()))
    for pattern in (BETWEEN, SIGN, POINT, AFTER):
        text = pattern.sub(lambda found: "".join(chr(KEPT + ord(character)) for character in found[0]), text)
    words = "".join(character for character in text if character not in string.punctuation)
    words = "".join(chr(ord(one) - KEPT) if KEPT <= ord(one) < KEPT + 128 else one for one in words)
    words = re.sub(r"(?<!\S)- (?=\.?\d)", "-", " ".join(words.split()))
    if not any(character.isalnum() for character in words):
        return ""
    return " ".join(ARTICLES.sub(" ", words).split()) or words

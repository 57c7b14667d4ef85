"""Read and compare answers: the final answer of a text (`Answers`), or a written field (`Comparison`).

Answers are compared by number, by text, or by math-verify (an extra); written fields by math-verify, or by spelling.
"""

import re
import string
from collections.abc import Callable, Sequence
from decimal import Decimal
from fractions import Fraction
from typing import Any, Protocol

from megatron_ledom.errors import DataError, UsageError
from megatron_ledom.evaluation.grading.numbers import (
    ANSWER,
    FUNCTIONS,
    SENTENCE_END,
    UNREAD,
    after_mark,
    final_number,
    last_boxed,
    sign_of_box,
    sole_number,
    with_signs,
)

MINUS_DOLLAR = re.compile(r"(?<![\w$])- ?\$ ?(\d[\d,]*(?:\.\d+)?)(?![^\n]*\$)")
THIN_SPACE = re.compile(r"\\!\s*")
WORD = re.compile(r"[^\W\d_]{2,}")
MOST_NAME = 60
"""Maximum characters of an answer in words, such as a name."""
DELIMITERS = ("$", "\\boxed", "\\(", "\\[")
"""Marks by which math-verify finds the formulas of a text."""
MIXED = re.compile(r"(?<![\w.,/])(\d+)[ \u00a0]+(\d+)/(\d+)(?![\w/])")
SCIENTIFIC = re.compile(r"(?<![\w.])\d{1,30}(?:\.\d{1,30})?[eE][-+]?\d{1,2}(?!\w|\.\d)")
BASE = re.compile(r"(?<![\w.])(\d[0-9A-Z]*) ?\(?(?:in )?base[ -]?(\d+)(?!\w)\)?")
BASES = {"two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"}
NAMED_BASE = re.compile(rf"(?<=\d)_\{{?(?:\\text\{{)? ?({'|'.join(BASES)})(?![a-z]) ?\}}?\}}?")
BARE_FUNCTION = re.compile(rf"(?<![\\a-zA-Z])({FUNCTIONS})(?=[ (_^\d])")
PLAIN_NUMBER = re.compile(r"\s*-?[^-+*/^=!|\\{}%]*")
"""A text without operators. If it is a number, the number grader can read it."""
SMALL, EXACT, ROUNDED = 1e-3, 1e-9, 1e-2
"""Numbers below SMALL are different if they differ by more than this fraction: EXACT, or ROUNDED for those with decimals.
"""
ARTICLES = re.compile(r"\b(a|an|the)\b")
DASH = re.compile("[\u2010-\u2013\u2212\ufe63\uff0d\u2796]")
THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")
SIGN = re.compile(r"(?:(?<=[\s(=:,;])|^)-(?=[$€£¥(\s]*\.?\d)")
POINT = re.compile(r"(?<![\w.])\.(?=\d)")
BETWEEN = re.compile(rf"(?<=\d)[{re.escape(string.punctuation)}]+(?=[-(]*\d)")
AFTER = re.compile(r"(?<=\w)[+#]+(?!\w)")
"""Punctuation that belongs to an answer: to a number, or to a name such as C++."""
KEPT = 0xE000
"""Offset that moves kept punctuation to the private characters of Unicode while other punctuation is removed."""


class Answers(Protocol):
    """A way to read and compare answers."""

    def read(self, text: str) -> Any | None:
        """Return the final answer of a text, or None if there is none or its value is not certain."""

    def read_gold(self, text: str) -> Any | None:
        """Return the right answer: the text, or its end after `####` or in `\\boxed`. None if it cannot be read."""

    def is_same(self, gold: Any, answer: Any) -> bool:
        """Return True if two read answers are the same."""


def answers_by(kind: str) -> Answers:
    """Return the answers of this kind: `number`, `text` or `math`.

    `number` is the last number of a text, `text` the whole text, `math` any formula (math-verify).
    """
    kinds: dict[str, type[Answers]] = {"number": NumberAnswers, "text": TextAnswers, "math": MathAnswers}
    if kind not in kinds:
        raise UsageError(f"answers cannot be compared by {kind!r}; it can be one of {', '.join(kinds)}")
    return kinds[kind]()


def is_right(answers: Answers, gold: str, text: str) -> bool:
    """Return True if the final answer of a text is `gold`. Raises DataError if `gold` cannot be read."""
    (right,) = read_golds(answers, [("right answer", gold)])
    found = answers.read(text)
    return found is not None and answers.is_same(right, found)


def read_golds(answers: Answers, golds: Sequence[tuple[str, str]]) -> list[Any]:
    """Return the right answers of pairs (where, text). Raises DataError with the number and places of unreadable ones."""
    found = [answers.read_gold(text) for _, text in golds]
    unread = [f"{where}: {text[:60]!r}" for (where, text), one in zip(golds, found, strict=True) if one is None]
    if unread:
        raise DataError(
            f"{len(unread)} of {len(golds)} right answers cannot be read: {'; '.join(unread[:5])}{'; ...' * (len(unread) > 5)};"
            " correct or remove these lines, or compare answers in another way with --answers number, text or math"
        )
    return found


def classes_of(texts: Sequence[str], answers: Answers) -> list[int | None]:
    """Return for each text the number of its class of equal answers, in order of appearance; None without an answer."""
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


class NumberAnswers:
    """The number after the last `####` of a text, in its last `\\boxed`, else its last number.

    3, 3.0 and 6/2 are the same.
    """

    def read(self, text: str) -> Fraction | None:
        """See `Answers.read`."""
        return final_number(text)

    def read_gold(self, text: str) -> Fraction | None:
        """See `Answers.read_gold`. A text with several numbers and no mark cannot be read."""
        return sole_number(text)

    def is_same(self, gold: Fraction, answer: Fraction) -> bool:
        """See `Answers.is_same`."""
        return gold == answer


class TextAnswers:
    """The whole text, without white space around it."""

    def read(self, text: str) -> str | None:
        """See `Answers.read`."""
        return text.strip() or None

    def read_gold(self, text: str) -> str | None:
        """See `Answers.read_gold`."""
        return self.read(text)

    def is_same(self, gold: str, answer: str) -> bool:
        """See `Answers.is_same`."""
        return gold == answer


class MathAnswers:
    """Answers that math-verify reads and compares."""

    def __init__(self) -> None:
        try:
            import math_verify
        except ImportError as error:
            raise UsageError("answers by math need math-verify; run pip install 'megatron-ledom[evaluation]'") from error
        self._library = math_verify

    def read(self, text: str) -> list[Any] | None:
        """See `Answers.read`.

        A formula without marks is read after "the answer is", else it is the whole of a short text.
        """
        marked = after_mark(text)
        shown = _signed_box(_plain(text if marked is None else marked))
        if shown is None:
            return None
        if any(delimiter in shown for delimiter in DELIMITERS):
            return _certain(self._library.parse(MIXED.sub(_as_fraction, shown)), last_boxed(shown))
        told = [SENTENCE_END.split(shown[found.end() :].lstrip(), maxsplit=1)[0] for found in ANSWER.finditer(shown)]
        lines = [line.strip() for line in shown.splitlines() if line.strip()]
        formula = told[-1] if told else lines[0].removesuffix(".") if len(lines) == 1 else ""
        if formula and ("\\" in formula or not WORD.search(formula)):
            return self._formula(formula)
        found = self._library.parse(shown)
        if (
            found
            and _number_of(found) is not None
            and (final_number(shown) is None or not _certain(found, shown, final_number))
        ):
            return None
        return found or (self._formula(formula) if 0 < len(formula) < MOST_NAME else None)

    def read_gold(self, text: str) -> list[Any] | None:
        """See `Answers.read_gold`. A text without dollar signs and box is one formula."""
        marked = after_mark(text)
        shown = (_signed_box(_plain(text if marked is None else marked)) or "").strip()
        boxed = last_boxed(shown)
        is_marked = "$" in shown or boxed is not None
        return _certain(self._library.parse(shown), boxed) if is_marked else self._formula(shown)

    def _formula(self, text: str) -> list[Any] | None:
        return _certain(self._library.parse(f"${MIXED.sub(_as_fraction, text)}$"), text) if text else None

    def is_same(self, gold: list[Any], answer: list[Any]) -> bool:
        """See `Answers.is_same`."""
        has_same_base = _base_of(gold) == _base_of(answer)  # math-verify ignores the base
        return has_same_base and bool(self._library.verify(gold, answer)) and not _differ(gold, answer)


class Comparison(Protocol):
    """A way to compare an answer with the accepted ones."""

    def check(self, accepted: Sequence[Sequence[str]]) -> None:
        """Raise DataError for accepted answers, in the order of the items, that cannot be read."""

    def is_right(self, accepted: Sequence[str], answer: str) -> bool:
        """Return True if `answer`, the whole of a written field, is one of `accepted`."""


def comparison_by(kind: str) -> Comparison:
    """Return the comparison of this kind: `math` or `alias`.

    `math` is math-verify, for numbers and formulas. `alias` ignores case, punctuation, articles and white space.
    """
    if kind == "math":
        return MathComparison()
    if kind == "alias":
        return AliasComparison()
    raise UsageError(f"answers cannot be compared by {kind!r}; it can be one of math, alias")


class MathComparison:
    """Comparison by math-verify.

    The whole field is read as one formula. For an answer without LaTeX, such as "18 dollars", its number counts as well.
    """

    def __init__(self) -> None:
        self._answers = answers_by("math")

    def check(self, accepted: Sequence[Sequence[str]]) -> None:
        """See `Comparison.check`."""
        read_golds(self._answers, [(f"item {number}", gold) for number, golds in enumerate(accepted) for gold in golds])

    def is_right(self, accepted: Sequence[str], answer: str) -> bool:
        """See `Comparison.is_right`. Raises DataError if an accepted answer cannot be read."""
        golds = read_golds(self._answers, [("right answer", gold) for gold in accepted])
        reads = [self._answers.read_gold(answer), *([self._answers.read(answer)] if "\\" not in answer else [])]
        found = [read for read in reads if read is not None]
        return any(self._answers.is_same(gold, read) for gold in golds for read in found)


class AliasComparison:
    """Comparison for questions with several accepted spellings. Only the first line of an answer counts."""

    def check(self, accepted: Sequence[Sequence[str]]) -> None:
        """See `Comparison.check`."""
        empty = [number for number, golds in enumerate(accepted) if not any(_normalized(gold) for gold in golds)]
        if empty:
            raise DataError(
                f"{len(empty)} items have no accepted answer with a letter or digit, the first is {empty[0]}; correct the file"
            )

    def is_right(self, accepted: Sequence[str], answer: str) -> bool:
        """See `Comparison.is_right`."""
        found = _normalized(answer.strip().partition("\n")[0])
        return found != "" and found in {_normalized(gold) for gold in accepted}


def _plain(text: str) -> str:
    """Unify the spelling of signs, bases and functions, remove currency, and expand `1e5`.

    math-verify reads the e of `1e5` as Euler's number.
    """
    text = MINUS_DOLLAR.sub(r"-\1", THIN_SPACE.sub("", with_signs(text).replace("\\$", "")))
    text = BASE.sub(r"\1_{\2}", NAMED_BASE.sub(lambda found: f"_{{{BASES[found[1]]}}}", text))
    text = BARE_FUNCTION.sub(r"\\\1", text)
    return SCIENTIFIC.sub(lambda found: format(Decimal(found[0]), "f"), text)


def _signed_box(text: str) -> str | None:
    """Return a text with the sign before its last box moved into it, or None if the box is a part of a larger formula."""
    boxed = last_boxed(text)
    if boxed is None:
        return text
    sign = sign_of_box(text)
    if sign == -1 and "=" in boxed:
        return None
    if sign is None or sign == 1:
        return None if sign is None else text
    return f"\\boxed{{-{boxed}}}" if PLAIN_NUMBER.fullmatch(boxed) else f"\\boxed{{-({boxed})}}"


def _certain(
    read: list[Any], formula: str | None, number_in: Callable[[str], Fraction | None] = sole_number
) -> list[Any] | None:
    """Return the result of math-verify, or None if it read only a part of a number.

    The number grader reveals this: it reads another value, or none where it should read one.
    """
    number = _number_of(read)
    if formula is None or number is None or "%" in formula or _base_of(read) is not None:
        return read or None
    value = number_in(formula)
    if value is None:
        return None if UNREAD in formula or PLAIN_NUMBER.fullmatch(formula) else read
    is_same = number.is_real is not True or abs(number.evalf(30) - value) <= max(Fraction(1), abs(value)) / 10**9
    return read if is_same else None


def _as_fraction(found: re.Match[str]) -> str:
    return rf"{found[1]}\frac{{{found[2]}}}{{{found[3]}}}"


def _differ(gold: list[Any], answer: list[Any]) -> bool:
    """Return True if both are small, unequal numbers. math-verify compares six decimals, so 1/2004! equals 1/2006! there."""
    numbers = [number for number in map(_number_of, (gold, answer)) if number is not None]
    if len(numbers) < 2:
        return False
    one, other = (number.doit().evalf(30) for number in numbers)
    size, difference = max(abs(one), abs(other)), abs(one - other)
    has_decimals = any(number.atoms(type(one)) for number in numbers)
    return bool(0 < size < SMALL and difference > (ROUNDED if has_decimals else EXACT) * size)


def _base_of(read: list[Any]) -> str | None:
    """Return the base of a number such as 52_8, or None."""
    written = re.fullmatch(
        r"(?:[^=]*=)?[-\s]*[0-9A-Z\s]+_\{?\s*(\d+)\s*\}?[\s.]*", next((found for found in read if isinstance(found, str)), "")
    )
    return written[1] if written else None


def _number_of(read: list[Any]) -> Any | None:
    """Return the first number that math-verify read, or None."""
    return next((found for found in read if getattr(found, "is_number", False) is True), None)


def _normalized(text: str) -> str:
    """Return words without case, punctuation and articles, and numbers with their signs.

    A text of articles alone keeps them.
    """
    text = THOUSANDS.sub(lambda found: found[0].replace(",", ""), DASH.sub("-", text.lower()))
    for pattern in (BETWEEN, SIGN, POINT, AFTER):
        text = pattern.sub(lambda found: "".join(chr(KEPT + ord(character)) for character in found[0]), text)
    words = "".join(character for character in text if character not in string.punctuation)
    words = "".join(chr(ord(one) - KEPT) if KEPT <= ord(one) < KEPT + 128 else one for one in words)
    words = re.sub(r"(?<!\S)- (?=\.?\d)", "-", " ".join(words.split()))
    if not any(character.isalnum() for character in words):
        return ""
    return " ".join(ARTICLES.sub(" ", words).split()) or words

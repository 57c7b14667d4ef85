"""The texts of part 9: short pieces of prose and code, their gaps, and pieces rearranged for fill-in-the-middle training."""

import re
from collections.abc import Iterator
from random import Random
from typing import Any

PREFIX, SUFFIX, MIDDLE = "\x01", "\x02", "\x03"
"""Marks of the parts of a rearranged piece: one token each, the byte tokens of characters that no piece contains."""
KINDS = ("code", "prose")
STOPS = {"code": "\n", "prose": "."}
"""The text that ends a line or a sentence, at both of its ends; no gap contains it."""
MOST_CHARACTERS, LEAST_CHARACTERS = 400, 120
"""Characters of a piece: nearly all fit into a sample of 256 tokens."""
REARRANGED = 0.9
"""Share of the pieces that the FIM model reads rearranged."""
_UNITS = re.compile(r"[^\n]*\n|[^\n]+")
_LINE = re.compile(r"(?<=\n)[ \t]*\S[^\n]{8,58}\S(?=\n)")
_SENTENCE = re.compile(r"(?<=\.)\s+[A-Z][^.]{15,150}(?=\.\s)")


def kind_of(record: dict[str, Any]) -> str:
    """Return the kind of a record of the corpus `text`."""
    return "code" if str(record["source"]).endswith(".py") else "prose"


def pieces_of(text: str) -> Iterator[str]:
    """Yield pieces of whole lines. Lines longer than a piece, texts with one of the marks, and short ends are skipped."""
    if any(mark in text for mark in (PREFIX, SUFFIX, MIDDLE)):
        return
    piece = ""
    for unit in [*_UNITS.findall(text), ""]:
        if piece and (not unit or len(piece) + len(unit) > MOST_CHARACTERS):
            if LEAST_CHARACTERS <= len(piece) <= MOST_CHARACTERS:
                yield piece
            piece = ""
        piece += unit


def gaps_of(piece: str, kind: str) -> list[tuple[str, str, str]]:
    """Return (prefix, middle, suffix) for each inner line of code, or inner sentence of prose, of a piece."""
    found = (_LINE if kind == "code" else _SENTENCE).finditer(piece)
    parts = [(piece[: one.start()], one.group(), piece[one.end() :]) for one in found]
    return [one for one in parts if len(one[0]) >= 30 and len(one[2]) >= 20]


def rearranged(piece: str, kind: str, random: Random) -> str:
    """Return a piece for the FIM model: prefix, suffix, middle (Bavarian et al., arXiv 2207.14255), or unchanged.

    The middle is a gap as in the test, if the piece has one; that favours this model. Otherwise it is a random span.
    """
    if random.random() >= REARRANGED:
        return piece
    if gaps := gaps_of(piece, kind):
        return fim_text(*random.choice(gaps))
    begin, end = sorted(random.sample(range(len(piece) + 1), 2))
    return fim_text(piece[:begin], piece[begin:end], piece[end:])


def fim_text(prefix: str, middle: str, suffix: str) -> str:
    """Return the parts in the order in which the FIM model reads them; with an empty middle, its prompt."""
    return f"{PREFIX}{prefix}{SUFFIX}{suffix}{MIDDLE}{middle}"

"""Words of texts: what makes no difference, and the C++ against a plain implementation."""

import random
import re
import unicodedata

import pytest

from megatron_ledom.contamination.items import EvaluationItem
from megatron_ledom.contamination.normalization import (
    FRACTIONS,
    HANGUL,
    NO_WORDS,
    TABLE_SIZE,
    WORDS_BY_CHARACTER,
    fold,
)
from megatron_ledom.contamination.search import Decontamination, Searcher
from megatron_ledom.contamination.settings import SearchSettings

SAME = {
    "case": ("The Cat sat", "THE cat SAT"),
    "punctuation": ("the cat, sat: (well) - down!", "the cat sat well down"),
    "apostrophes": ("don't", "don’t"),
    "line breaks": ("the cat\nsat\r\n\tdown", "the cat sat down"),
    "hyphens at line ends": ("the prob-\nlem is", "the problem is"),
    "unusual spaces": ("the\u00a0cat\u2009sat\u3000down", "the cat sat down"),
    "invisible characters": ("ca\u00adt s\u200bat", "cat sat"),
    "accents": ("naïve café", "nai\u0308ve cafe"),
    "thousands": ("1,000 and 2{,}000 and 3\\,000", "1000 and 2000 and 3000"),
    "full width": ("１２３ ＡＢＣ", "123 abc"),
    "ligatures": ("ﬁne oﬀer", "fine offer"),
    "superscripts": ("x² + y²", "x^2 + y^2"),
    "fractions": ("½", "1/2"),
    "LaTeX spacing": ("$\\left( 3x \\right)\\quad\\dfrac{1}{2}\\,y$", "( 3 x ) \\frac{1}{2} y"),
    "LaTeX text": ("\\text{the cat}", "the cat"),
    "Chinese": ("中文。字", "中 文 字"),
    "other digits": ("٣٤", "34"),
}
DIFFERENT = {
    "numbers": ("has 12 cats", "has 13 cats"),
    "a comma in a list": ("1,23", "123"),
    "a word more": ("the cat", "the big cat"),
    "decimals": ("3.5", "35"),
}


def searcher(**changes: object) -> Searcher:
    return Searcher(Decontamination(SearchSettings(**changes), [EvaluationItem(set="s", number=0, question="a")]))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def plain() -> Searcher:
    return searcher()


@pytest.mark.parametrize("name", SAME)
def test_texts_that_read_the_same_have_the_same_words(name: str, plain: Searcher) -> None:
    first, second = SAME[name]
    assert plain.words(first) == plain.words(second) != []


@pytest.mark.parametrize("name", DIFFERENT)
def test_texts_that_read_differently_have_different_words(name: str, plain: Searcher) -> None:
    first, second = DIFFERENT[name]
    assert plain.words(first) != plain.words(second)


def test_ignored_numbers_are_equal_and_runs_of_them_are_one() -> None:
    found = searcher(ignore_numbers=True)
    assert found.words("has 12 cats, 3.50 each") == ["has", "0", "cats", "0", "each"] == found.words("has 9 cats, 4 each")


def by_character(text: str) -> list[str]:
    """Return the words by the description in csrc/helpers/normalized_words.h, a character at a time."""
    text = re.sub(r"(?<=\d)(,|\{,\}|\\,)(?=\d{3}(?!\d))", "\ue000", text, flags=re.ASCII)
    text = re.sub(r"(?<=[^\W\d_])-\r?\n(?=[a-z])", "\ue000", text)
    pieces: list[tuple[str, int]] = []  # (folded character, its place)
    for place, character in enumerate(text):
        code = ord(character)
        if character == "\ue000":
            folded = ""
        elif code < 0x80:
            folded = character.lower() if character.isalnum() else " "
        elif code >= TABLE_SIZE or any(low <= code <= high for low, high in WORDS_BY_CHARACTER):
            folded = f" {character} "
        else:
            folded = character if HANGUL[0] <= code <= HANGUL[1] else fold(character)
        pieces += [(part, place) for part in folded]
    words: list[tuple[str, int]] = []
    kind = ""
    for part, place in pieces:
        now = "" if part == " " else "d" if part in "0123456789" else "l"
        if not now:
            kind = ""
        elif now == kind:
            words[-1] = (words[-1][0] + part, words[-1][1])
        else:
            words.append((part, place))
            kind = now
    commands = [
        (word, place > 0 and text[place - 1] == "\\" and text[place : place + len(word)].lower() == word and word.isascii())
        for word, place in words
    ]
    return [
        "frac" if is_command and word in FRACTIONS else word
        for word, is_command in commands
        if not (is_command and word in NO_WORDS)
    ]


def test_words_equal_those_of_a_plain_implementation_on_random_texts(plain: Searcher) -> None:
    chance = random.Random(5)
    alphabet = [
        *"abcXYZ019 ,.-\n\\{}$",
        *"éÉäßﬁ²½中語한ねの٣\u00a0\u00ad\u0301–’😀",
        "-\n",
        "\\quad ",
        "\\dfrac",
        "1,000",
        "{,}",
        "longerword",
    ]
    for _ in range(3000):
        text = "".join(chance.choices(alphabet, k=chance.randrange(40)))
        assert plain.words(text) == by_character(text), repr(text)


def test_every_code_point_has_the_same_words_as_in_a_plain_implementation(plain: Searcher) -> None:
    points = [code for code in range(1, 0x30000) if not 0xD800 <= code < 0xE000 and code != 0xE000]
    for begin in range(0, len(points), 512):
        text = " ".join(f"a{chr(code)}b" for code in points[begin : begin + 512])
        assert plain.words(text) == by_character(text), hex(points[begin])


def test_a_version_names_the_unicode_of_this_python() -> None:
    assert unicodedata.unidata_version in Decontamination(SearchSettings(), []).request()["normalization"]

"""The table by which the C++ search folds characters, so that texts that read the same have the same words.

Case, accents, compatibility forms (full-width digits, ligatures, superscripts) and invisible characters make no difference; everything
that is neither letter nor digit separates words. csrc/helpers/normalized_words.h describes the words.
"""

import unicodedata

LETTER, SEPARATOR, IGNORED, WORD, FOLDED = range(5)
TABLE_SIZE = 0x20000
"""Code points from here on are Chinese characters, emoji and unassigned: each is a word of its own."""
NO_WORDS = (
    *(
        "quad",
        "qquad",
        "thinspace",
        "medspace",
        "thickspace",
        "enspace",
        "hspace",
        "vspace",
        "hfill",
        "left",
        "right",
        "middle",
    ),
    *("big", "bigl", "bigr", "bigg", "biggl", "biggr", "displaystyle", "textstyle", "limits", "nolimits"),
    *("text", "textrm", "textbf", "textit", "mathrm", "mathbf", "mathit", "mathsf", "mbox", "operatorname", "rm", "bf", "it"),
)
"""LaTeX commands of spacing and style, in lower case."""
FRACTIONS = ("dfrac", "tfrac", "cfrac")
"""LaTeX commands that mean \\frac."""
WORDS_BY_CHARACTER = (
    *((0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF)),  # Thai, Lao, Burmese, Khmer: no spaces between words
    *((0x3040, 0x30FF), (0x31F0, 0x31FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF)),  # Japanese and Chinese
)
HANGUL = (0xAC00, 0xD7A3)
UNCHANGED_MARKS = "Mc"
"""Vowel signs of Indian scripts have this category: they are part of a word."""


def normalization_version() -> str:
    """Return the version of the words; hits of another version cannot be compared. It has Python's version of Unicode."""
    return f"1, Unicode {unicodedata.unidata_version}"


def fold_table() -> tuple[list[int], str]:
    """Return (table, pool) as csrc/helpers/normalized_words.h describes them."""
    table, pool, size, known = [LETTER] * TABLE_SIZE, [], 0, {}
    for first, last in WORDS_BY_CHARACTER:
        table[first : last + 1] = [WORD] * (last + 1 - first)
    for code in range(0x80, TABLE_SIZE):
        if table[code] == WORD or HANGUL[0] <= code <= HANGUL[1]:
            continue
        character = chr(code)
        folded = fold(character)
        if folded == character:
            continue
        if folded in ("", " "):
            table[code] = SEPARATOR if folded else IGNORED
            continue
        if folded not in known:
            known[folded] = FOLDED + size
            pool.append(f"{folded}\0")
            size += len(pool[-1].encode())
        table[code] = known[folded]
    return table, "".join(pool)


def fold(character: str) -> str:
    """Return the folded form of a character outside ASCII: letters and digits, with spaces where words end; nothing if ignored."""
    category = unicodedata.category(character)
    if category in ("Mn", "Me", "Cf"):
        return ""
    if category in ("Cn", "Co", "Cs"):
        return " "
    kept = []
    for part in unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", character).casefold()):
        category = unicodedata.category(part)
        if category in ("Mn", "Me", "Cf"):
            continue
        digit = unicodedata.decimal(part, None)
        if digit is not None:
            kept.append(str(int(digit)))
        else:
            kept.append(part if category[0] == "L" or category in (UNCHANGED_MARKS, "Nl") else " ")
    return " ".join("".join(kept).split()) or " "

"""Writes unicode_classes.h and nfc_classes.h: properties of each code point for the byte encoder.

    python csrc/helpers/make_unicode_tables.py

The classes come from the `tokenizers` library, whose regular expressions they must match; a test compares them for all code points.
Combining classes come from Python's unicodedata. A code point is marked if unicodedata does not contain it, or if NFC may change it
or join it to the one before; the `tokenizers` library then normalises the text.
"""

import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path

import tokenizers
from tokenizers import Regex, normalizers, pre_tokenizers

CODES = [code for code in range(0x110000) if not 0xD800 <= code < 0xE000]
CHUNK = 4096
CLASSES = (  # in the order of enum CodePointClass
    r"[\p{Lu}\p{Lt}]",
    r"\p{Ll}",
    r"[\p{Lm}\p{Lo}]",
    r"\p{M}",
    r"\p{N}",
    r"[\r\n]",
    r"\s",
)
NOT_SURE = 255
HANGUL_PARTS = range(0x1160, 0x1200)  # medial and final letters, which join an initial one
ENTRIES_A_LINE = 11


def members(pattern: str) -> set[int]:
    """Return the code points that a pattern of `tokenizers` matches."""
    remove = pre_tokenizers.Split(Regex(pattern), "removed")
    found: set[int] = set()
    for begin in range(0, len(CODES), CHUNK):
        chunk = CODES[begin : begin + CHUNK]
        kept = {ord(char) for piece, _ in remove.pre_tokenize_str("".join(map(chr, chunk))) for char in piece}
        found.update(code for code in chunk if code not in kept)
    return found


def class_of() -> Callable[[int], int]:
    """Return a function from a code point to the number of its class: its position in CLASSES + 1, or 0."""
    number: dict[int, int] = {}
    for index, pattern in enumerate(CLASSES):
        for code in members(pattern):
            number.setdefault(code, index + 1)
    return lambda code: number.get(code, 0)


def combining_of() -> Callable[[int], int]:
    """Return a function from a code point to its combining class, or NOT_SURE if normalisation may do more than sort it."""
    normalize = normalizers.NFC().normalize_str
    second = set(HANGUL_PARTS)
    for code in CODES:
        parts = unicodedata.decomposition(chr(code)).split()
        if len(parts) == 2 and not parts[0].startswith("<"):
            second.add(int(parts[1], 16))

    def combining(code: int) -> int:
        char = chr(code)
        is_known = unicodedata.category(char) != "Cn" and normalize(char) == char
        return unicodedata.combining(char) if is_known and code not in second else NOT_SURE

    return combining


def runs(number_of: Callable[[int], int]) -> Iterator[int]:
    """Yield first code point << 8 | number for every run of equal numbers; surrogates belong to the run before them."""
    last = -1
    for code in CODES:
        if (number := number_of(code)) != last:
            yield code << 8 | number
            last = number


def write(name: str, array: str, comment: str, entries: list[int]) -> None:
    """Write a header with one array."""
    words = [f"0x{entry:X}," for entry in entries]
    lines = [" ".join(words[begin : begin + ENTRIES_A_LINE]) for begin in range(0, len(words), ENTRIES_A_LINE)]
    head = [
        f"// {comment}",
        "// Written by make_unicode_tables.py; do not edit.",
        "#pragma once",
        "",
        "#include <cstdint>",
        "",
    ]
    body = ["namespace ledom {", "", f"constexpr uint32_t {array}[] = {{", *(f"    {line}" for line in lines), "};"]
    (Path(__file__).parent / name).write_text("\n".join([*head, *body, "", "}  // namespace ledom", ""]))


def main() -> None:
    """Write both headers."""
    where = f"tokenizers {tokenizers.__version__}"
    about = "first code point << 8 | class (CodePointClass) of every run of code points, as the regular expressions of"
    write("unicode_classes.h", "UNICODE_CLASSES", f"{about} {where}.", list(runs(class_of())))
    about = (
        "first code point << 8 | combining class of every run; 255: NFC may change it or join it to what is before it, Unicode"
    )
    write("nfc_classes.h", "NFC_CLASSES", f"{about} {unicodedata.unidata_version}.", list(runs(combining_of())))


if __name__ == "__main__":
    main()

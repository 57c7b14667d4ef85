"""Cut passages out of a text, as for GPT-3 (Brown et al. 2020, arXiv 2005.14165, appendix C).

Around each passage 200 characters are cut too, because more of the item may stand there. The pieces that remain are documents of
their own; those below 200 characters are dropped, and a text that falls into more than 10 pieces is dropped as a whole.
"""

from collections.abc import Sequence

import numpy as np

from megatron_ledom.contamination.search import Passage

WINDOW_CHARACTERS = 200
SHORTEST_CHARACTERS = 200
MOST_PIECES = 10
COUNTED_AT_ONCE = 1 << 20


def pieces_without(text: str, passages: Sequence[Passage]) -> list[str]:
    """Return the pieces of a text without the passages and what surrounds them, cut at white space. passages: in text order."""
    place = _characters(text, [offset for passage in passages for offset in (passage.begin, passage.end)])
    kept, position = [], 0
    for passage in passages:
        begin, end = place[passage.begin], place[passage.end]
        begin, end = _at_space(text, max(0, begin - WINDOW_CHARACTERS), -1), _at_space(text, end + WINDOW_CHARACTERS, 1)
        if begin > position:
            kept.append(text[position:begin].strip())
        position = max(position, end)
    kept.append(text[position:].strip())
    pieces = [piece for piece in kept if len(piece) >= SHORTEST_CHARACTERS]
    return pieces if len(pieces) <= MOST_PIECES else []


def _characters(text: str, offsets: Sequence[int]) -> dict[int, int]:
    """Return the number of characters before each offset in the UTF-8 of a text."""
    if text.isascii():
        return {offset: offset for offset in offsets}
    utf8 = np.frombuffer(text.encode(), np.uint8)
    found, count, last = {}, 0, 0
    for offset in sorted(set(offsets)):
        for begin in range(last, offset, COUNTED_AT_ONCE):
            block = utf8[begin : min(offset, begin + COUNTED_AT_ONCE)]
            count += int(np.count_nonzero((block & 0xC0) != 0x80))  # all but the further bytes of a character
        found[offset], last = count, offset
    return found


def _at_space(text: str, position: int, step: int) -> int:
    """Return the nearest border of a word from `position` on, or from `position` back for a negative step, within 50 characters."""
    position = min(position, len(text))
    for moved in range(position, position + 50 * step, step):
        if not 0 < moved < len(text) or text[moved - 1].isspace() or text[moved].isspace():
            return min(max(moved, 0), len(text))
    return position

"""The place where two written texts meet: one that follows a prefix, and one that precedes a suffix.

Nguyen et al. (Meet in the Middle, arXiv 2303.07295, section on inference) let both models write at the same time until some tokens
in a row of one text stand in the other. Here the given text counts too: a model that reaches the text that the other one read has
met it. All ids are in text order.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from heapq import heapify, heappop

from megatron_ledom.direction import Direction, to_text_order
from megatron_ledom.inference.joint_tokenizer import HealedPrompt, JointTokenizer


@dataclass(frozen=True, slots=True)
class Side:
    """The ids that one model read and wrote.

    given_ids: the ids of its given text that token healing keeps. written_ids: the ids that it wrote, without special ids. The
    first of them, next to the given text, spell `edge`, the given bytes that token healing left to the model. bridge: a space that
    the model read at the cut and that is not in the given text.
    """

    given_ids: list[int]
    written_ids: list[int]
    edge: bytes
    bridge: bytes = b""

    @classmethod
    def of(cls, tokenizer: JointTokenizer, direction: Direction, healed: HealedPrompt, written_ids: list[int]) -> "Side":
        """Return the side of a model that wrote ids (text order) next to a healed text."""
        kept = [id_ for id_ in written_ids if id_ not in tokenizer.special_ids]
        return cls(to_text_order(healed.tokens, direction), kept, healed.trimmed, healed.bridge)


@dataclass(frozen=True, slots=True)
class Overlap:
    """The text between prefix and suffix, and the ids that each model had written when they met."""

    middle: str
    num_forward: int
    num_reverse: int


def find_overlap(tokenizer: JointTokenizer, forward: Side, reverse: Side, num_ids: int) -> Overlap | None:
    """Return the overlap in the fewest steps, if in each step both models write one id; None if they do not meet.

    They meet where `num_ids` ids in a row of prefix and forward text equal ids in a row of reverse text and suffix, unless the row is
    only white space, on which any two texts agree. Of overlaps in the same step, the one with the fewest written ids is taken,
    then the one with the fewest of the forward model. An overlap counts only if the joined ids spell the prefix, some text that is
    whole characters, and the suffix.
    """
    before, after = forward.given_ids[-num_ids:], reverse.given_ids[:num_ids]
    onward, back = [*before, *forward.written_ids], [*reverse.written_ids, *after]
    found = []
    for place, other in _equal_runs(onward, back, num_ids):
        num_forward = max(0, place + num_ids - len(before))
        num_reverse = max(0, len(reverse.written_ids) - other)
        found.append((max(num_forward, num_reverse), num_forward + num_reverse, num_forward, place, other))
    edges = (tokenizer.spell(before) + forward.edge, (reverse.edge + tokenizer.spell(after)).removeprefix(reverse.bridge))
    heapify(found)  # not sorted: a text that repeats itself has very many, and the first usually counts
    while found:
        _, total, num_forward, place, other = heappop(found)
        if not tokenizer.spell(onward[place : place + num_ids]).strip():
            continue
        middle = _between(tokenizer.spell(onward[:place] + back[other:]), *edges)
        if middle is not None:
            return Overlap(middle, num_forward, total - num_forward)
    return None


def _equal_runs(one: list[int], other: list[int], length: int) -> Iterator[tuple[int, int]]:
    """Yield the places of all runs of `length` ids that both lists have."""
    places: dict[tuple[int, ...], list[int]] = {}
    for place in range(len(other) - length + 1):
        places.setdefault(tuple(other[place : place + length]), []).append(place)
    for place in range(len(one) - length + 1):
        yield from ((place, found) for found in places.get(tuple(one[place : place + length]), []))


def _between(joined: bytes, before: bytes, after: bytes) -> str | None:
    """Return the text between `before` and `after`; None if the joined bytes do not begin and end with them, or cut a character."""
    if len(joined) < len(before) + len(after) or not (joined.startswith(before) and joined.endswith(after)):
        return None
    try:
        return joined[len(before) : len(joined) - len(after)].decode()
    except UnicodeDecodeError:
        return None

"""The place where two written texts meet: properties of the joined text, the seams with the given texts, and the first step."""

from itertools import product
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from megatron_ledom.direction import Direction
from megatron_ledom.inference.infilling.overlap import Overlap, Side, find_overlap
from megatron_ledom.inference.joint_tokenizer import JointTokenizer
from tests.support.tiny_models import FRAGMENTS, TOKENIZERS

LOADED = {name: JointTokenizer(Tokenizer.from_str(make())) for name, make in TOKENIZERS.items()}
PLAIN = [fragment for fragment in FRAGMENTS if "<" not in fragment and fragment != "▁"]  # a tokenizer reads ▁ as a space
TEXTS = st.lists(st.sampled_from([*PLAIN, *(f" {one}" for one in PLAIN)]), min_size=1, max_size=8).map("".join)


def written(tokenizer: JointTokenizer, direction: Direction, given_text: str, whole: list[int]) -> Side:
    """Return the side of a model that reads `given_text` and writes, in text order, all other ids of the ids `whole`."""
    healed = tokenizer.heal_prompt(given_text, direction)
    kept = len(healed.tokens)
    return Side.of(tokenizer, direction, healed, whole[kept:] if direction is Direction.FORWARD else whole[: len(whole) - kept])


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=150, deadline=None)
@given(prefix=TEXTS, middle=TEXTS, suffix=TEXTS, num_ids=st.integers(1, 4))
def test_models_that_write_the_whole_text_meet_in_exactly_the_middle(
    name: str, prefix: str, middle: str, suffix: str, num_ids: int
) -> None:
    """Both write the ids of the text that they do not keep; each reaches the other's text, so they meet, and the seams are exact."""
    tokenizer = LOADED[name]
    whole = tokenizer.encode(prefix + middle + suffix)
    sides = {d: tokenizer.heal_prompt(text, d) for d, text in ((Direction.FORWARD, prefix), (Direction.REVERSE, suffix))}
    forward, reverse = (
        written(tokenizer, direction, text, whole)
        for direction, text in ((Direction.FORWARD, prefix), (Direction.REVERSE, suffix))
    )
    kept = (
        forward.given_ids == whole[: len(forward.given_ids)]
        and reverse.given_ids == whole[len(whole) - len(reverse.given_ids) :]
    )
    if not kept or sides[Direction.REVERSE].bridge or len(whole) < num_ids:
        return  # the given ids are not those of the whole text, so no model would write its other ids
    if not all(tokenizer.spell(whole[n : n + num_ids]).strip() for n in range(len(whole) - num_ids + 1)):
        return  # a row of white space does not count, and may be the only place where they meet
    found = find_overlap(tokenizer, forward, reverse, num_ids)
    assert found is not None
    repeats = len(set(zip(*(whole[n:] for n in range(num_ids)), strict=False))) < len(whole) - num_ids + 1
    if not repeats:
        assert found.middle == middle


SIDES = st.lists(st.integers(300, 330), min_size=0, max_size=12)


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=200, deadline=None)
@given(prefix=TEXTS, suffix=TEXTS, onward=SIDES, back=SIDES, num_ids=st.integers(1, 3))
def test_an_overlap_is_the_first_one_and_its_ids_spell_prefix_middle_and_suffix(
    name: str, prefix: str, suffix: str, onward: list[int], back: list[int], num_ids: int
) -> None:
    """Compared with a search over all pairs of places that joins the whole id lists."""
    tokenizer = LOADED[name]
    ids = [id_ for id_ in (*onward, *back) if id_ not in tokenizer.vocab.values()]
    onward, back = ([id_ for id_ in side if id_ not in ids] for side in (onward, back))
    healed = [tokenizer.heal_prompt(text, d) for d, text in ((Direction.FORWARD, prefix), (Direction.REVERSE, suffix))]
    edges = [LOADED[name].encode(one.trimmed.decode("utf-8", "ignore")) if one.trimmed else [] for one in healed]
    forward = Side.of(tokenizer, Direction.FORWARD, healed[0], [*edges[0], *onward])
    reverse = Side.of(tokenizer, Direction.REVERSE, healed[1], [*back, *edges[1]])
    assert find_overlap(tokenizer, forward, reverse, num_ids) == searched(tokenizer, forward, reverse, num_ids)


def searched(tokenizer: JointTokenizer, forward: Side, reverse: Side, num_ids: int) -> Overlap | None:
    """Return the first overlap by trying every pair of places of the whole texts."""
    one, other = [*forward.given_ids, *forward.written_ids], [*reverse.written_ids, *reverse.given_ids]
    before = tokenizer.spell(forward.given_ids) + forward.edge
    after = (reverse.edge + tokenizer.spell(reverse.given_ids))[len(reverse.bridge) :]
    best: tuple[Any, Overlap] | None = None
    for end, begin in product(range(num_ids, len(one) + 1), range(len(other) - num_ids + 1)):
        steps = max(0, end - len(forward.given_ids)), max(0, len(reverse.written_ids) - begin)
        reaches = end >= len(forward.given_ids) and begin <= len(reverse.written_ids)
        if not reaches or one[end - num_ids : end] != other[begin : begin + num_ids]:
            continue
        if not tokenizer.spell(one[end - num_ids : end]).strip():
            continue
        joined = tokenizer.spell([*one[:end], *other[begin + num_ids :]])
        middle = joined[len(before) : len(joined) - len(after)]
        if len(joined) < len(before + after) or joined != before + middle + after:
            continue
        rank = (max(steps), sum(steps), steps[0], end)
        if is_text(middle) and (best is None or rank < best[0]):
            best = rank, Overlap(middle.decode(), *steps)
    return None if best is None else best[1]


def is_text(spelled: bytes) -> bool:
    return spelled.decode("utf-8", "ignore").encode() == spelled


def test_the_overlap_with_the_fewest_steps_is_taken_and_one_token_more_prevents_it() -> None:
    tokenizer = LOADED["byte_level"]
    ids = tokenizer.encode
    forward = Side([], ids("The cat sat on the mat, and the dog"), b"The")
    reverse = Side([], ids(" the mat, and the dog ran."), b"ran.")
    met = find_overlap(tokenizer, forward, reverse, 2)
    assert met is not None
    assert met.middle == " cat sat on the mat, and the dog "
    assert find_overlap(tokenizer, forward, reverse, len(ids(" the mat, and the dog")) + 1) is None


def test_white_space_that_both_texts_have_is_no_overlap() -> None:
    tokenizer = LOADED["byte_level"]
    ids = tokenizer.encode
    blank, dog, cat = ids("\n\n\n"), ids(" dog"), ids(" cat")
    forward, reverse = Side(ids("Here"), [*blank, *dog], b""), Side(ids("."), [*cat, *blank], b"")
    assert find_overlap(tokenizer, forward, reverse, len(blank)) is None
    reverse = Side(ids("."), [*cat, *blank, *dog], b"")
    assert find_overlap(tokenizer, forward, reverse, len(blank) + len(dog)) is not None


def test_a_model_that_writes_into_the_given_text_of_the_other_has_met_it() -> None:
    """The reverse model wrote nonsense; the forward model wrote the middle and two tokens of the suffix."""
    tokenizer = LOADED["byte_level"]
    middle, suffix = tokenizer.encode(" of France"), tokenizer.encode(" is Paris.")
    forward = Side(tokenizer.encode("The capital"), [*middle, *suffix[:2]], b"")
    reverse = Side(suffix, tokenizer.encode(" dog dog dog"), b"")
    assert find_overlap(tokenizer, forward, reverse, 2) == Overlap(" of France", len(middle) + 2, 0)
    assert find_overlap(tokenizer, forward, reverse, 3) is None

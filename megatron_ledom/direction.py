"""The order of tokens: the one place that turns text order into model order and back.

Text order is as read; model order is as fed to the network. A reverse model (LEDOM, arXiv 2507.01335) reads each document
from its end, so its model order is the text order turned around, token by token, never character by character.
"""

from collections.abc import Sequence
from enum import StrEnum
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt


class Direction(StrEnum):
    """Which way a model reads: `reverse` predicts the preceding token of the text, `forward` the following one."""

    REVERSE = "reverse"
    FORWARD = "forward"

    @property
    def other(self) -> "Direction":
        """The opposite direction."""
        return Direction.FORWARD if self is Direction.REVERSE else Direction.REVERSE


Ids = TypeVar("Ids", list[int], npt.NDArray[Any])


def to_model_order(text_ids: Ids, direction: Direction) -> Ids:
    """One document's ids [length] from text order to model order; always a fresh, contiguous copy."""
    if direction is Direction.REVERSE:
        return _reversed(text_ids)
    return text_ids.copy()


def to_text_order(model_ids: Ids, direction: Direction) -> Ids:
    """One document's ids [length] from model order to text order; always a fresh, contiguous copy."""
    return to_model_order(model_ids, direction)  # turning twice is the identity


def _reversed(ids: Ids) -> Ids:
    return np.ascontiguousarray(ids[::-1]) if isinstance(ids, np.ndarray) else ids[::-1]


def check_helpers() -> None:
    """Raise UsageError where the C++ helpers, which `concatenate_into` and `reverse_into` call, are not built."""
    import megatron_ledom._helpers  # noqa: F401


def concatenate_into(
    text_ids: npt.NDArray[np.uint32],
    offsets: npt.NDArray[np.int64],
    packed: npt.NDArray[Any],
    *,
    direction: Direction,
    eod_id: int,
    vocab_size: int,
    bos_id: int | None = None,
) -> int:
    """Fill `packed` with many documents in model order, each closed by eod: what a shard stores.

    text_ids [total]: the documents' ids one after the other, text order; offsets [documents + 1]: where each begins;
    packed [total + documents with tokens], uint16 or int32. A document without tokens leaves nothing. A `bos_id` stands
    first in model order, one more id a document. Returns -1, or the position in `text_ids` of the first id that is at or above
    `vocab_size` or is the eod; `packed` is then incomplete.
    """
    import megatron_ledom._helpers as helpers  # compiled at install; imported late: all but this does without it

    is_reverse = direction is Direction.REVERSE
    return int(
        helpers.pack_documents(text_ids, offsets, packed, is_reverse, -1 if bos_id is None else bos_id, eod_id, vocab_size)
    )


def reverse_into(
    stored_ids: npt.NDArray[Any],
    lengths: npt.NDArray[np.int64],
    reversed_ids: npt.NDArray[Any],
    *,
    is_closed: bool,
    eod_id: int,
    vocab_size: int,
) -> int:
    """Fill `reversed_ids` with many stored documents in the other direction, each closed by eod: what the other shard stores.

    stored_ids [sum(lengths)], uint8, uint16, int32 or int64: the documents one after the other; lengths [documents]; turned,
    uint16 or int32. With `is_closed` each document ends with eod, which stays last, else none does and one is added; one
    without ids besides eod leaves nothing. Returns -1, or the position in `stored_ids` of the first id that is outside
    [0, vocab_size), is an eod inside a document, or closes a document without being eod; `reversed_ids` is then incomplete.
    """
    import megatron_ledom._helpers as helpers  # compiled at install; imported late: all but this does without it

    return int(helpers.turn_documents(stored_ids, lengths, reversed_ids, is_closed, eod_id, vocab_size))


def concatenate_documents_reference(
    documents: Sequence[Sequence[int]], direction: Direction, eod_id: int, bos_id: int | None = None
) -> list[int]:
    """What `concatenate_into` computes, in plain Python: the text of the rule, and the yardstick of its tests."""
    packed: list[int] = []
    for document in documents:
        if document:
            packed += [*([] if bos_id is None else [bos_id]), *to_model_order(list(document), direction), eod_id]
    return packed

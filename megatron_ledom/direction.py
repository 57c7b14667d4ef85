"""The order of tokens: the only module, with `reversal_units`, that converts text order to model order and back.

People read text order; the network reads model order. A reverse model (LEDOM, arXiv 2507.01335) reads each document
from its end, so its model order is the text order with the tokens reversed, never the characters. Other units of reversal, such
as words, are in `reversal_units`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt


class Direction(StrEnum):
    """Reading direction of a model: `reverse` predicts the preceding token of the text, `forward` the following one."""

    REVERSE = "reverse"
    FORWARD = "forward"

    @property
    def other(self) -> "Direction":
        """The opposite direction."""
        return Direction.FORWARD if self is Direction.REVERSE else Direction.REVERSE


ModelDirection = Direction | Literal["both"]
"""Directions in which a model reads: one of them, or both (a two-way model)."""
BOTH: Literal["both"] = "both"


class Unit(StrEnum):
    """Unit whose order a reverse document reverses; the tokens inside a unit keep their order. See `reversal_units`."""

    TOKEN = "token"
    WORD = "word"
    ENTITY = "entity"
    SEGMENT = "segment"


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """The model order of documents: their direction and unit, and the ids that are added to them apart from eod."""

    direction: Direction
    unit: Unit = Unit.TOKEN
    """Always token for forward documents."""
    marker_id: int | None = None
    """First id of each document in model order, which names the direction; None for no marker."""
    boundary_id: int | None = None
    """Id between or around units, see `reversal_units`; None for the unit token."""

    @property
    def is_plain(self) -> bool:
        """True if the documents have the unit token and no marker, as in the published models."""
        return self == Reading(direction=self.direction)

    def describe(self) -> str:
        """Return the reading in words, such as `reverse by word, marker 5`."""
        unit = "" if self.unit is Unit.TOKEN else f" by {self.unit}, boundary {self.boundary_id}"
        return f"{self.direction}{unit}{'' if self.marker_id is None else f', marker {self.marker_id}'}"


Ids = TypeVar("Ids", list[int], npt.NDArray[Any])


def to_model_order(text_ids: Ids, direction: Direction) -> Ids:
    """Return one document's ids [length], given in text order, in model order; always a new, contiguous copy."""
    if direction is Direction.REVERSE:
        return _reversed(text_ids)
    return text_ids.copy()


def to_text_order(model_ids: Ids, direction: Direction) -> Ids:
    """Return one document's ids [length], given in model order, in text order; always a new, contiguous copy."""
    return to_model_order(model_ids, direction)  # reversing twice is the identity


def _reversed(ids: Ids) -> Ids:
    return np.ascontiguousarray(ids[::-1]) if isinstance(ids, np.ndarray) else ids[::-1]


def check_helpers() -> None:
    """Raise UsageError if the C++ helpers, which `concatenate_into` and `reverse_into` call, are not built."""
    import megatron_ledom._helpers  # noqa: F401


def concatenate_into(
    text_ids: npt.NDArray[np.uint32],
    offsets: npt.NDArray[np.int64],
    stored_ids: npt.NDArray[Any],
    *,
    direction: Direction,
    eod_id: int,
    vocab_size: int,
    bos_id: int | None = None,
) -> int:
    """Fill `stored_ids` with documents in model order, each closed by eod, as a shard stores them.

    text_ids [total]: the ids of all documents, one document after the other, in text order.
    offsets [documents + 1]: the beginning of each document in `text_ids`.
    stored_ids [total + documents with tokens], uint16 or int32. A document without tokens adds nothing. A `bos_id` comes
    first in model order and adds one id to each document.
    Returns -1, or the position in `text_ids` of the first id that is `vocab_size` or more, or is the eod; `stored_ids` is
    then incomplete.
    """
    import megatron_ledom._helpers as helpers  # compiled at install; imported here because few functions need it

    is_reverse = direction is Direction.REVERSE
    return int(
        helpers.pack_documents(text_ids, offsets, stored_ids, is_reverse, -1 if bos_id is None else bos_id, eod_id, vocab_size)
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
    """Fill `reversed_ids` with stored documents in the other direction, each closed by eod, as a shard stores them.

    stored_ids [sum(lengths)], uint8, uint16, int32 or int64: the ids of all documents, one document after the other.
    lengths [documents]; reversed_ids, uint16 or int32.
    is_closed: every document ends with eod, which stays last; otherwise none does, and one is added. A document with no
    other id adds nothing.
    Returns -1, or the position in `stored_ids` of the first wrong id: outside [0, vocab_size), an eod inside a document, or
    a last id that is not eod although `is_closed`. `reversed_ids` is then incomplete.
    """
    import megatron_ledom._helpers as helpers  # compiled at install; imported here because few functions need it

    return int(helpers.turn_documents(stored_ids, lengths, reversed_ids, is_closed, eod_id, vocab_size))


def concatenate_documents_reference(
    documents: Sequence[Sequence[int]], direction: Direction, eod_id: int, bos_id: int | None = None
) -> list[int]:
    """Return the ids that `concatenate_into` writes: the rule in plain Python, the reference of its tests."""
    stored_ids: list[int] = []
    for document in documents:
        if document:
            stored_ids += [*([] if bos_id is None else [bos_id]), *to_model_order(list(document), direction), eod_id]
    return stored_ids

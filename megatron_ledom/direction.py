"""The order of tokens: the one place that turns text order into model order and back.

Text order is as read; model order is as fed to the network. A reverse model (LEDOM, arXiv 2507.01335) reads each document
from its end, so its model order is the text order turned around, token by token, never character by character.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from megatron_ledom.errors import DataError, MismatchError


class Direction(StrEnum):
    """Which way a model reads: `reverse` predicts the preceding token of the text, `forward` the following one."""

    REVERSE = "reverse"
    FORWARD = "forward"


Ids = TypeVar("Ids", list[int], npt.NDArray[Any])


def to_model_order(text_ids: Ids, direction: Direction) -> Ids:
    """One document's ids [length] from text order to model order; always a fresh, contiguous copy."""
    if direction is Direction.REVERSE:
        return _turned(text_ids)
    return text_ids.copy()


def to_text_order(model_ids: Ids, direction: Direction) -> Ids:
    """One document's ids [length] from model order to text order; always a fresh, contiguous copy."""
    return to_model_order(model_ids, direction)  # turning twice is the identity


def _turned(ids: Ids) -> Ids:
    return np.ascontiguousarray(ids[::-1]) if isinstance(ids, np.ndarray) else ids[::-1]


def pack_documents(
    text_ids: npt.NDArray[np.uint32],
    offsets: npt.NDArray[np.int64],
    *,
    direction: Direction,
    eod_id: int,
    vocab_size: int,
    dtype: npt.DTypeLike,
) -> tuple[npt.NDArray[Any], npt.NDArray[np.int32]]:
    """Many documents from text order into what a shard stores: model order, each closed by eod.

    text_ids [total]: the documents' ids one after the other, text order; offsets [documents + 1]: where each begins.
    Documents without tokens are left out. Every id is checked against `vocab_size` before it is narrowed to `dtype`,
    because a numpy cast wraps around in silence. Returns the packed ids [total + kept] and the stored lengths [kept],
    eod included. Raises DataError for an id outside [0, vocab_size) or one that `dtype` cannot hold.
    """
    import megatron_ledom._helpers as helpers  # compiled at install; imported late so that inference does without it

    dtype = np.dtype(dtype)
    if vocab_size - 1 > np.iinfo(dtype).max:
        raise DataError(f"a vocabulary of {vocab_size:,} ids does not fit in {dtype}; use --dtype int32")
    if not 0 <= eod_id < vocab_size:
        raise DataError(f"the eod id {eod_id} is outside the vocabulary of {vocab_size:,} ids")
    lengths = np.diff(offsets)
    kept = lengths[lengths > 0]
    packed = np.empty(int(kept.sum()) + len(kept), dtype)
    bad = helpers.pack_documents(text_ids, offsets, packed, direction is Direction.REVERSE, eod_id, vocab_size)
    if bad >= 0:
        raise DataError(f"token id {int(text_ids[bad])} is outside the vocabulary of {vocab_size:,} ids")
    return packed, (kept + 1).astype(np.int32)


def pack_documents_reference(documents: Sequence[Sequence[int]], direction: Direction, eod_id: int) -> list[int]:
    """What `pack_documents` computes, in plain Python: the text of the rule, and the yardstick of its tests."""
    packed: list[int] = []
    for document in documents:
        if document:
            packed += [*to_model_order(list(document), direction), eod_id]
    return packed


@dataclass(kw_only=True, frozen=True, slots=True)
class Provenance:
    """What stored ids mean and in which order they stand; shards, checkpoints and exports all carry it."""

    direction: Direction
    tokenizer_name: str
    tokenizer_sha256: str
    vocab_size: int
    eod_id: int

    @classmethod
    def from_dict(cls, stored: dict[str, Any], where: str) -> "Provenance":
        """Read the fields from a manifest; `where` names the file in the error when one is missing."""
        names = [field.name for field in fields(cls)]
        missing = [name for name in names if name not in stored]
        if missing:
            raise DataError(f"{where} lacks {', '.join(missing)}; it was not written by this package, or was damaged")
        values = {name: stored[name] for name in names}
        return cls(**{**values, "direction": Direction(values["direction"])})

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "direction": str(self.direction)}

    def check_same(self, other: "Provenance", mine: str, others: str) -> None:
        """Refuse two things that do not fit; `mine` and `others` name them, for example a shard and a run."""
        if self.direction is not other.direction:
            raise MismatchError(
                f"{mine} is {self.direction}, {others} is {other.direction}: a {other.direction} model fed {self.direction}"
                f" ids gives nonsense without an error; use a {other.direction} one, or change {others}"
            )
        if self.tokenizer_sha256 != other.tokenizer_sha256:
            raise MismatchError(
                f"{mine} was made with tokenizer {self.tokenizer_name} ({self.tokenizer_sha256[:12]}), {others} with"
                f" {other.tokenizer_name} ({other.tokenizer_sha256[:12]}): use the same tokenizer for both"
            )
        if (self.eod_id, self.vocab_size) != (other.eod_id, other.vocab_size):
            raise MismatchError(
                f"{mine} has eod {self.eod_id} of {self.vocab_size:,} ids, {others} has eod {other.eod_id} of"
                f" {other.vocab_size:,}: preprocess with the same --eod-token"
            )

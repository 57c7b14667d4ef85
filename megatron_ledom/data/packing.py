"""Encoded documents become the array a shard appends: range-checked, narrowed, in model order."""

from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_ledom.direction import Direction, pack_into
from megatron_ledom.errors import DataError


class EodInsideError(DataError):
    """A document holds the eod, which would end it in its middle."""


def pack_documents(
    text_ids: npt.NDArray[np.uint32],
    offsets: npt.NDArray[np.int64],
    *,
    direction: Direction,
    eod_id: int,
    vocab_size: int,
    dtype: npt.DTypeLike,
    bos_id: int | None = None,
) -> tuple[npt.NDArray[Any], npt.NDArray[np.int32]]:
    """Many documents from text order into what a shard stores: model order, each closed by eod.

    text_ids [total]: the documents' ids one after the other, text order; offsets [documents + 1]: where each begins.
    `bos_id`, if given, stands first in model order. Documents without tokens are left out.
    Every id is checked against `vocab_size` before it is narrowed to `dtype`,
    because a numpy cast wraps around in silence. Returns the packed ids [total + kept] and the stored lengths [kept],
    eod included. Raises DataError for an id outside [0, vocab_size) or one that `dtype` cannot hold, EodInsideError for an eod
    in a document.
    """
    dtype = np.dtype(dtype)
    if vocab_size - 1 > np.iinfo(dtype).max:
        raise DataError(f"a vocabulary of {vocab_size:,} ids does not fit in {dtype}; use --dtype int32")
    if not 0 <= eod_id < vocab_size:
        raise DataError(f"the eod id {eod_id} is outside the vocabulary of {vocab_size:,} ids; name another --eod-token")
    if bos_id is not None and not 0 <= bos_id < vocab_size:
        raise DataError(f"the bos id {bos_id} is outside the vocabulary of {vocab_size:,} ids; name another --bos-token")
    lengths = np.diff(offsets)
    kept = lengths[lengths > 0]
    added = 1 if bos_id is None else 2
    packed = np.empty(int(kept.sum()) + added * len(kept), dtype)
    bad = pack_into(text_ids, offsets, packed, direction=direction, eod_id=eod_id, vocab_size=vocab_size, bos_id=bos_id)
    if bad >= 0 and int(text_ids[bad]) == eod_id:
        document = int(np.searchsorted(offsets, bad, side="right")) - 1
        raise EodInsideError(f"document {document} holds the eod {eod_id} at its id {bad - int(offsets[document])}")
    if bad >= 0:
        raise DataError(
            f"token id {int(text_ids[bad])} is outside the vocabulary of {vocab_size:,} ids: the tokenizer is damaged, get it anew"
        )
    return packed, (kept + added).astype(np.int32)

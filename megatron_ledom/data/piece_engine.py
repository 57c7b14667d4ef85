"""SentencePiece BPE encoding several times faster than the `sentencepiece` library, with the same ids.

Where no piece of the vocabulary has a character b directly after a character a, no merge can reach over that boundary, so a text
may be cut there and its units, mostly words, encoded apart and remembered (`csrc/helpers/piece_encoder.h`). This holds for BPE
models that keep the text as it is; `why_not_cached` says what is wrong with another one, which the library then has to encode.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_ledom._helpers import PieceEncoder
from megatron_ledom.data.engines import FlatIds
from megatron_ledom.errors import UsageError
from megatron_ledom.tokenizers.sentencepiece_bpe import SPACE, parse_model

CACHE_BYTES = 64 << 20
"""What a process may spend on remembered units; when it is full, all are forgotten and it fills anew."""

MAX_PIECES = 1_000_000


class CachedEngine:
    """What the two encoders of `csrc/helpers` share: `_encoder` is one of them."""

    _encoder: Any

    def encode(self, texts: Sequence[str]) -> FlatIds:
        """Ids of all texts one after the other [total] in text order, and where each begins [texts + 1].

        Nothing is added, and a special token spelled out in a text is ordinary text.
        """
        ids: npt.NDArray[np.uint32]
        offsets: npt.NDArray[np.int64]
        ids, offsets = self._encoder.encode(texts)
        return ids, offsets

    def statistics(self) -> dict[str, int]:
        """Counts since the start: units, misses (units merged anew), steps this took, clears of the cache; and of now: units in
        the cache and cache_bytes, the most it can take.
        """
        found: dict[str, int] = self._encoder.statistics()
        return found


class CachedPieceEngine(CachedEngine):
    """Encodes with the SentencePiece `.model` file `model`, one for which `why_not_cached` is None.

    The ids are those of the library; the engine may be used from several threads, which take turns.
    """

    name = "cached pieces (csrc)"

    def __init__(self, model: bytes, cache_bytes: int = CACHE_BYTES) -> None:
        reason = why_not_cached(model)
        if reason is not None:
            raise UsageError(f"this SentencePiece model {reason}; encode with the sentencepiece library")
        proto = parse_model(model, "the model")
        self._encoder = PieceEncoder(
            pieces=[piece.piece.encode() for piece in proto.pieces],
            scores=[piece.score for piece in proto.pieces],
            types=[piece.type for piece in proto.pieces],
            byte_fallback=proto.trainer_spec.byte_fallback,
            dummy_prefix=proto.normalizer_spec.add_dummy_prefix,
            cache_bytes=cache_bytes,
        )


def why_not_cached(model: bytes) -> str | None:
    """Why a SentencePiece `.model` file cannot be encoded here, as the end of "this model ..."; None if it can."""
    proto = parse_model(model, "the model")
    trainer, normalizer, kinds = proto.trainer_spec, proto.normalizer_spec, proto.SentencePiece
    types = [piece.type for piece in proto.pieces]
    num_bytes = types.count(kinds.BYTE)
    found = [
        (trainer.model_type != trainer.BPE, "is not a BPE model"),
        (bool(normalizer.precompiled_charsmap), f"normalises text ({normalizer.name})"),
        (normalizer.remove_extra_whitespaces, "removes extra whitespace"),
        (not normalizer.escape_whitespaces, f"does not write spaces as {SPACE}"),
        (trainer.treat_whitespace_as_suffix, "puts the space at the end of a word"),
        (kinds.USER_DEFINED in types, "has user-defined pieces, which are matched before merging"),
        (kinds.UNUSED in types, "has unused pieces, which are split in a way that depends on the whole text"),
        (num_bytes != (256 if trainer.byte_fallback else 0), f"has {num_bytes} byte pieces"),
        (types.count(kinds.UNKNOWN) != 1, f"has {types.count(kinds.UNKNOWN)} unknown pieces"),
        (len(types) > MAX_PIECES, f"has more than {MAX_PIECES:,} pieces"),
    ]
    return next((reason for is_so, reason in found if is_so), None) or _confusable(proto)


def _confusable(proto: Any) -> str | None:
    """A reserved piece that is spelled like something merging can make gets its id in the library; not here."""
    normal = {piece.piece for piece in proto.pieces if piece.type == proto.SentencePiece.NORMAL}
    for piece in proto.pieces:
        if piece.type != proto.SentencePiece.NORMAL and (len(piece.piece) < 2 or piece.piece in normal):
            return f"has the reserved piece {piece.piece!r}, which text can become"
    return None

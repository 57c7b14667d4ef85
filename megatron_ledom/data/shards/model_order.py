"""The model order of a shard: the options that choose it, the ids they name, and the converter for a tokenizer."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_ledom.data.shards.shard import ShardManifest
from megatron_ledom.direction import Direction, Reading, Unit
from megatron_ledom.errors import DataError, UsageError
from megatron_ledom.reversal_units import DEFAULT_SEGMENT_TOKENS, SegmentSettings, UnitOrder
from megatron_ledom.tokenizers.corpus_tokenizer import Tokenizer, word_pieces_of


@dataclass(kw_only=True, frozen=True, slots=True)
class OrderSettings:
    """Options of the model order apart from the direction."""

    unit: Unit = Unit.TOKEN
    marker: str | None = None
    """Token at the beginning of each document in model order, which names the direction."""
    boundary_token: str | None = None
    """Token between or around units, see `reversal_units`; needed with another unit than token."""
    segment_tokens: int = DEFAULT_SEGMENT_TOKENS
    """Most tokens in a segment. The seed and the ids of a document determine the lengths of its segments."""
    segment_seed: int = 0

    @property
    def is_plain(self) -> bool:
        """True for the unit token without a marker."""
        return self.unit is Unit.TOKEN and self.marker is None

    def check(self, direction: Direction, bos_token: str | None = None) -> None:
        """Raise UsageError for options that exclude each other, before any work."""
        if self.unit is not Unit.TOKEN and direction is Direction.FORWARD:
            raise UsageError(
                f"--unit {self.unit} changes the order of reverse documents; use --direction reverse, or omit --unit"
            )
        if self.unit is not Unit.TOKEN and self.boundary_token is None:
            raise UsageError(
                f"--unit {self.unit} needs --boundary-token: a special token of the tokenizer that no text contains, such as <SEP>"
            )
        if self.unit is Unit.TOKEN and self.boundary_token is not None:
            raise UsageError(
                f"--boundary-token {self.boundary_token} has no effect with --unit token; omit it, or choose a --unit"
            )
        if self.segment_tokens < 1 or not 0 <= self.segment_seed < 2**64:
            raise UsageError(
                f"--segment-tokens {self.segment_tokens} and --segment-seed {self.segment_seed}: use at least 1, and 0 to 2^64 - 1"
            )
        if self.unit is not Unit.SEGMENT and self.segments != SegmentSettings():
            raise UsageError("--segment-tokens and --segment-seed have no effect without --unit segment; omit them")
        if self.marker is not None and bos_token is not None:
            raise UsageError("--marker and --bos-token both name the first token of each document; give one of them")

    @property
    def segments(self) -> SegmentSettings:
        """Lengths of segments."""
        return SegmentSettings(segment_tokens=self.segment_tokens, seed=self.segment_seed)

    def reading(self, direction: Direction, tokenizer: Tokenizer) -> Reading:
        """Return the reading with the ids of the tokens. Raises UsageError if the tokenizer lacks one, or two are the same."""
        ids = {
            option: tokenizer.token_id(token)
            for option, token in (("--marker", self.marker), ("--boundary-token", self.boundary_token))
            if token is not None
        }
        if len({tokenizer.eod_id, *ids.values()}) <= len(ids):
            named = " and ".join(f"{option} {token_id}" for option, token_id in ids.items())
            raise UsageError(
                f"found the ids {named} and the eod {tokenizer.eod_id}, expected different ones; name other tokens"
            )
        return Reading(
            direction=direction, unit=self.unit, marker_id=ids.get("--marker"), boundary_id=ids.get("--boundary-token")
        )

    def stored(self) -> dict[str, Any]:
        """Return the tokens and lengths for `ShardManifest.reading_tokens`."""
        if self.is_plain:
            return {}
        tokens = {"marker": self.marker or "", "boundary": self.boundary_token or ""}
        lengths = {"segment_tokens": self.segment_tokens, "seed": self.segment_seed}
        return {**tokens, **lengths} if self.unit is Unit.SEGMENT else tokens

    def request(self) -> dict[str, Any]:
        """Return the options that determine the ids of a shard, for the request of preprocessing."""
        return {} if self.is_plain else {"model_order": {"unit": str(self.unit), **self.stored()}}


def unit_order(reading: Reading, tokenizer: Tokenizer | None, segments: SegmentSettings | None = None) -> UnitOrder:
    """Return the converter of a reading. Raises UsageError if the pieces of the tokenizer do not show where words begin."""
    if reading.unit not in (Unit.WORD, Unit.ENTITY):
        return UnitOrder(reading, segments=segments)
    if tokenizer is None:
        raise UsageError(
            f"documents in {reading.unit} order need their tokenizer, which is not on this machine; name it by --tokenizer"
        )
    return UnitOrder(reading, word_pieces_of(tokenizer, reading.unit))


def contents(
    ids: npt.NDArray[Any], lengths: npt.NDArray[np.int64], reading: Reading
) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
    """Return the ids of stored documents without marker and eod, and their offsets. Raises DataError if a marker is missing.

    ids [sum(lengths)] in model order; every document ends with eod.
    """
    ends = np.cumsum(lengths)
    begins = ends - lengths
    kept = np.ones(len(ids), np.bool_)
    kept[ends[lengths > 0] - 1] = False
    if reading.marker_id is not None:
        if len(wrong := np.flatnonzero(ids[np.minimum(begins, len(ids) - 1)] != reading.marker_id)):
            raise DataError(
                f"document {wrong[0]} of the read ids begins with id {ids[begins[wrong[0]]]}, expected the marker {reading.marker_id};"
                " the shard is damaged"
            )
        kept[begins] = False
    before = np.concatenate([[0], np.cumsum(kept)])
    return ids[kept], before[np.concatenate([[0], ends])].astype(np.int64)


def text_ids_of(document: npt.NDArray[Any], manifest: ShardManifest, tokenizer: Tokenizer | None) -> npt.NDArray[Any]:
    """Return a stored document [length] in text order, without marker and eod."""
    reading = manifest.model_order
    ids, offsets = contents(document, np.array([len(document)], np.int64), reading)
    return unit_order(reading, tokenizer).to_text(ids, offsets)[0]

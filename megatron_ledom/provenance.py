"""What stored ids mean and in which order they stand. Shards, checkpoints and exports carry it; loading compares it."""

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from typing import Any

from megatron_ledom.direction import Direction
from megatron_ledom.errors import DataError, MismatchError

UNHASHED = ("version", "truncation", "padding", "post_processor")
"""What a tokenizer.json holds besides the way from text to ids."""


@dataclass(kw_only=True, frozen=True, slots=True)
class Provenance:
    """The direction, and the tokenizer with its eod: two things fit together only when all of it is equal."""

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
        if values["direction"] not in list(Direction):
            raise DataError(f"{where} has the direction {values['direction']!r}, neither reverse nor forward; it was damaged")
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


def vocabulary_hash(tokenizer_json: bytes | dict[str, Any]) -> str:
    """SHA-256 of what decides a text's ids.

    It is taken of the `tokenizer.json` (its bytes, or its object if that is there already): the object without version,
    truncation, padding and post-processor (nothing of which this package uses), merges as pairs, keys sorted, no spaces. So a
    folder and the tokenizer.json in it have one hash, and so has an export.
    A SentencePiece `.model` has the hash of its exact conversion (`tokenizers.sentencepiece_bpe.convert`).
    """
    stored = tokenizer_json if isinstance(tokenizer_json, dict) else json_library().loads(tokenizer_json)
    content = {key: value for key, value in stored.items() if key not in UNHASHED}
    model = dict(content.get("model") or {})
    if isinstance(model.get("merges"), list) and str in set(map(type, model["merges"])):
        model["merges"] = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    return hashlib.sha256(_canonical({**content, "model": model})).hexdigest()


def _canonical(content: dict[str, Any]) -> bytes:
    """JSON with sorted keys and no spaces. orjson, many times faster, writes the same bytes but for floats."""
    library = json_library()
    large = ("vocab", "merges")  # without floats where the model is one of these
    small = {**content, "model": {key: value for key, value in content["model"].items() if key not in large}}
    if library is not json and content["model"].get("type") in ("BPE", "WordLevel", "WordPiece") and not _has_floats(small):
        return bytes(library.dumps(content, option=library.OPT_SORT_KEYS))
    return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def _has_floats(value: Any) -> bool:
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return isinstance(value, float) or any(_has_floats(item) for item in items)


def json_library() -> Any:
    """orjson, or json for those who have an exported folder, torch and transformers only."""
    try:
        import orjson
    except ImportError:
        return json
    return orjson

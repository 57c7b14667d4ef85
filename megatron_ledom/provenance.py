"""The direction and tokenizer of stored ids. Shards, checkpoints and exports record both; loading compares them."""

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from typing import Any

from megatron_ledom.direction import Direction
from megatron_ledom.errors import DataError, MismatchError

UNHASHED = ("version", "truncation", "padding", "post_processor")
"""Keys of a tokenizer.json that do not change the ids of a text."""


@dataclass(kw_only=True, frozen=True, slots=True)
class Provenance:
    """The direction, the tokenizer and its eod. Two things fit together only if all fields except the tokenizer's name are equal."""

    direction: Direction
    tokenizer_name: str
    tokenizer_sha256: str
    vocab_size: int
    eod_id: int

    @classmethod
    def from_dict(cls, stored: dict[str, Any], where: str) -> "Provenance":
        """Read the fields from a manifest; `where` names the file in the error if one is missing."""
        names = [field.name for field in fields(cls)]
        missing = [name for name in names if name not in stored]
        if missing:
            raise DataError(f"{where} lacks {', '.join(missing)}; this package did not write it, or it is damaged")
        values = {name: stored[name] for name in names}
        if values["direction"] not in list(Direction):
            raise DataError(
                f"{where} has the direction {values['direction']!r}, neither reverse nor forward; the file is damaged"
            )
        return cls(**{**values, "direction": Direction(values["direction"])})

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values for JSON."""
        return {**asdict(self), "direction": str(self.direction)}

    def check_same(self, other: "Provenance", mine: str, others: str) -> None:
        """Raise MismatchError if two things do not fit; `mine` and `others` name them, such as a shard and a run."""
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
    """Return the SHA-256 of the parts of a `tokenizer.json` that determine a text's ids.

    tokenizer_json: the bytes of the file, or its parsed object. Version, truncation, padding and post-processor are omitted,
    because this package uses none of them. The rest is hashed as JSON with sorted keys, merges as pairs and no spaces, so that
    a folder, the tokenizer.json in it and an export have the same hash.
    A SentencePiece `.model` has the hash of its exact conversion (`tokenizers.sentencepiece_bpe.convert`).
    """
    stored = tokenizer_json if isinstance(tokenizer_json, dict) else json_library().loads(tokenizer_json)
    content = {key: value for key, value in stored.items() if key not in UNHASHED}
    model = dict(content.get("model") or {})
    if isinstance(model.get("merges"), list) and str in set(map(type, model["merges"])):
        model["merges"] = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    return hashlib.sha256(_canonical({**content, "model": model})).hexdigest()


def _canonical(content: dict[str, Any]) -> bytes:
    """Return JSON with sorted keys and no spaces. orjson is many times faster and writes the same bytes, except for floats."""
    library = json_library()
    large = ("vocab", "merges")  # these contain no floats if the model is of one of the types below
    small = {**content, "model": {key: value for key, value in content["model"].items() if key not in large}}
    if library is not json and content["model"].get("type") in ("BPE", "WordLevel", "WordPiece") and not _has_floats(small):
        return bytes(library.dumps(content, option=library.OPT_SORT_KEYS))
    return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def _has_floats(value: Any) -> bool:
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return isinstance(value, float) or any(_has_floats(item) for item in items)


def json_library() -> Any:
    """Return orjson, or json if orjson is missing: an exported folder needs only torch and transformers."""
    try:
        import orjson
    except ImportError:
        return json
    return orjson

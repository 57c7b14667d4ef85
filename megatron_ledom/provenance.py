"""The direction and tokenizer of stored ids. Shards, checkpoints and exports record both; loading compares them."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from megatron_ledom.direction import BOTH, Direction, ModelDirection, Reading, Unit
from megatron_ledom.errors import DataError, MismatchError

UNHASHED = ("version", "truncation", "padding", "post_processor")
"""Keys of a tokenizer.json that do not change the ids of a text."""


@dataclass(kw_only=True, frozen=True, slots=True)
class Provenance:
    """The direction, the tokenizer and its eod. Two things fit together only if all fields except the tokenizer's name are equal."""

    direction: ModelDirection
    """Direction of a shard, or the directions that a model reads."""
    tokenizer_name: str
    tokenizer_sha256: str
    vocab_size: int
    eod_id: int
    readings: tuple[Reading, ...] = ()
    """Model order in each direction, the forward one first. Default: the unit token without a marker; not with direction both."""

    def __post_init__(self) -> None:
        """Fill in the default of `readings`. Raises DataError for readings that do not fit the direction."""
        if not self.readings and self.direction != BOTH:
            object.__setattr__(self, "readings", (Reading(direction=Direction(self.direction)),))
        check_readings(self.direction, self.readings)

    @classmethod
    def from_dict(cls, stored: dict[str, Any], where: str) -> "Provenance":
        """Read the fields from a manifest; `where` names the file in the error if one is missing."""
        names = [field.name for field in fields(cls) if field.name != "readings"]
        missing = [name for name in names if name not in stored]
        if missing:
            raise DataError(f"{where} lacks {', '.join(missing)}; this package did not write it, or it is damaged")
        values = {name: stored[name] for name in names}
        if values["direction"] not in [*Direction, BOTH]:
            raise DataError(
                f"{where} has the direction {values['direction']!r}, not one of reverse, forward and both; the file is damaged"
            )
        direction: ModelDirection = BOTH if values["direction"] == BOTH else Direction(values["direction"])
        try:
            readings = readings_from(stored.get("readings", []))
            return cls(**{**values, "direction": direction, "readings": readings})
        except DataError as error:
            raise DataError(f"{where}: {error}") from error

    @property
    def is_plain(self) -> bool:
        """True for one direction with the unit token and no marker, as in all earlier versions of this package."""
        return self.direction != BOTH and self.readings[0].is_plain

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values for JSON. `readings` is omitted for a plain provenance, as before it existed."""
        values = {**asdict(self), "direction": str(self.direction)}
        del values["readings"]
        return values if self.is_plain else {**values, "readings": readings_to(self.readings)}

    def of_readings(self, *readings: Reading) -> "Provenance":
        """Return the same tokenizer with another reading, or with two for a two-way model."""
        direction = BOTH if len(readings) > 1 else readings[0].direction
        return replace(self, direction=direction, readings=tuple(sorted(readings, key=lambda reading: reading.direction)))

    def check_same(self, other: "Provenance", mine: str, others: str) -> None:
        """Raise MismatchError if two things do not fit; `mine` and `others` name them, such as a shard and a run."""
        if self.direction != other.direction and BOTH in (self.direction, other.direction):
            raise MismatchError(
                f"{mine} is {self.direction}, {others} is {other.direction}: a two-way model is trained on with data.direction=both and shards of"
                f" both directions, each with its marker; restore them, or use another run_dir for {others}"
            )
        if self.direction != other.direction:
            raise MismatchError(
                f"{mine} is {self.direction}, {others} is {other.direction}: a {other.direction} model fed {self.direction}"
                f" ids gives nonsense without an error; use a {other.direction} one, or change {others}"
            )
        if self.readings != other.readings:
            raise MismatchError(
                f"{mine} is {describe_readings(self.readings)}, {others} is {describe_readings(other.readings)}: use the same --unit,"
                " --marker and --boundary-token for both"
            )
        self.check_same_tokenizer(other, mine, others)

    def check_same_tokenizer(self, other: "Provenance", mine: str, others: str) -> None:
        """Raise MismatchError if tokenizer, eod or vocabulary size differ; directions may."""
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


def describe_readings(readings: Sequence[Reading]) -> str:
    """Return readings in words."""
    return " and ".join(reading.describe() for reading in readings)


def readings_to(readings: Sequence[Reading]) -> list[dict[str, Any]]:
    """Return readings as JSON values."""
    return [{**asdict(reading), "direction": str(reading.direction), "unit": str(reading.unit)} for reading in readings]


def readings_from(stored: Any) -> tuple[Reading, ...]:
    """Return readings from JSON values. Raises DataError if they are not what `readings_to` writes."""
    try:
        return tuple(
            Reading(**{**values, "direction": Direction(values["direction"]), "unit": Unit(values["unit"])})
            for values in stored
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"found the readings {stored!r}, expected a list of direction, unit and ids ({error})") from error


def check_readings(direction: ModelDirection, readings: Sequence[Reading]) -> None:
    """Raise DataError if readings do not belong to a direction, or if a two-way model could not tell them apart."""
    expected = [Direction.FORWARD, Direction.REVERSE] if direction == BOTH else [Direction(direction)]
    if [reading.direction for reading in readings] != expected:
        found = describe_readings(readings) or "nothing"
        raise DataError(f"the direction is {direction}, but it reads {found}; the file is damaged")
    for reading in readings:
        has_boundary = reading.boundary_id is not None
        if has_boundary is (reading.unit is Unit.TOKEN) or (
            reading.unit is not Unit.TOKEN and reading.direction is Direction.FORWARD
        ):
            raise DataError(f"found the reading {reading.describe()}, which no shard has; the file is damaged")
    if direction == BOTH and readings[0].marker_id == readings[1].marker_id:
        raise DataError(
            f"both directions begin with the same marker ({readings[0].marker_id}), so a model could not tell them apart; give one or"
            " both of them another --marker"
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

"""The model orders in which an imported model is trained: as its folder records, or as the options of `hf-to-mcore` say."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from megatron_ledom.direction import BOTH, Direction, ModelDirection, Reading, Unit
from megatron_ledom.errors import UsageError
from megatron_ledom.tokenizers.corpus_tokenizer import Tokenizer, word_pieces_of


@dataclass(kw_only=True, frozen=True, slots=True)
class ReadingOptions:
    """The model order of the shards of the next training, as in `ledom preprocess-data`. None: as the folder records."""

    forward_marker: str | None = None
    reverse_marker: str | None = None
    reverse_unit: Unit | None = None
    reverse_boundary_token: str | None = None

    def readings(self, known: Sequence[Reading], aim: ModelDirection, tokenizer: Tokenizer) -> list[Reading]:
        """Return the reading of each direction of `aim`. known: those that the folder records. Raises UsageError."""
        aims = list(Direction) if aim == BOTH else [Direction(aim)]
        self._check_used(aims, aim)
        recorded = {reading.direction: reading for reading in known}
        found = [self._reading(recorded.get(direction, Reading(direction=direction)), tokenizer) for direction in aims]
        if len({reading.marker_id for reading in found}) < len(found):
            raise UsageError(
                "--direction both needs documents of the two directions with different markers; name those of the shards by"
                " --forward-marker and --reverse-marker"
            )
        return found

    def _given(self) -> Mapping[str, str]:
        """Return the options that are given, by their names."""
        values = {name: getattr(self, name) for name in self.__slots__}
        return {f"--{name.replace('_', '-')}": str(value) for name, value in values.items() if value is not None}

    def _check_used(self, aims: Sequence[Direction], aim: ModelDirection) -> None:
        for option in self._given():
            if not option.startswith(tuple(f"--{direction}-" for direction in aims)):
                raise UsageError(f"{option} has no effect with --direction {aim}; omit it, or choose --direction both")

    def _reading(self, recorded: Reading, tokenizer: Tokenizer) -> Reading:
        """Return the reading of one direction. Raises UsageError for an order that no shard can have."""
        is_forward = recorded.direction is Direction.FORWARD
        marker, reading = self.forward_marker if is_forward else self.reverse_marker, recorded
        if marker is not None:
            reading = replace(reading, marker_id=tokenizer.token_id(marker))
        if not is_forward:
            reading = self._with_unit(reading, tokenizer)
        _check_ids(reading, tokenizer)
        return reading

    def _with_unit(self, reading: Reading, tokenizer: Tokenizer) -> Reading:
        unit, token = self.reverse_unit or reading.unit, self.reverse_boundary_token
        if unit is Unit.TOKEN and token is not None:
            raise UsageError(
                f"--reverse-boundary-token {token} has no effect with the unit token; omit it, or give the unit of the reverse shards by"
                " --reverse-unit"
            )
        boundary_id = reading.boundary_id if token is None else tokenizer.token_id(token)
        if unit is not Unit.TOKEN and boundary_id is None:
            raise UsageError(
                f"--reverse-unit {unit} needs --reverse-boundary-token: that of the reverse shards, as in `ledom preprocess-data"
                " --boundary-token`"
            )
        if unit in (Unit.WORD, Unit.ENTITY):
            word_pieces_of(tokenizer, unit)
        return replace(reading, unit=unit, boundary_id=None if unit is Unit.TOKEN else boundary_id)


def _check_ids(reading: Reading, tokenizer: Tokenizer) -> None:
    """Raise UsageError if marker or boundary is not an id of the tokenizer, is its eod, or if both are the same."""
    ids = {"marker": reading.marker_id, "boundary-token": reading.boundary_id}
    for name, token_id in ids.items():
        if token_id is not None and (token_id == tokenizer.eod_id or token_id >= tokenizer.vocab_size):
            raise UsageError(
                f"the {reading.direction} {name} has the id {token_id}, which is the eod or not an id of {tokenizer.name}; give that of"
                f" the shards by --{reading.direction}-{name}"
            )
    if reading.marker_id is not None and reading.marker_id == reading.boundary_id:
        raise UsageError(
            f"--reverse-marker and --reverse-boundary-token have the same id {reading.marker_id}; give two different tokens, those of the shards"
        )

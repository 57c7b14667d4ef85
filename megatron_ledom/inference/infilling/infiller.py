"""Write the text between a prefix and a suffix with a forward and a reverse model that meet in the middle, and score it with both."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_ledom.direction import Direction
from megatron_ledom.errors import DataError, MismatchError, UsageError
from megatron_ledom.inference.engines.engine import Engine
from megatron_ledom.inference.engines.transformers_engine import TransformersEngine
from megatron_ledom.inference.generation import Generation, Sampling
from megatron_ledom.inference.infilling.overlap import Overlap, Side, find_overlap
from megatron_ledom.inference.language_model import LanguageModel
from megatron_ledom.inference.row_generation import (
    LocalRows,
    RowRequest,
    RowResult,
    RowWriter,
    written_part,
)

DIRECTIONS = (Direction.FORWARD, Direction.REVERSE)
OVERLAP_TOKENS = 3
"""Default number of equal tokens in a row at which the models have met. It was not tuned."""
BOTH = "both"
"""Writer of a text in which the models met; others are the name of one direction."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InfillSettings:
    """Settings of infilling. sampling: that of each model; each writes `num_return_sequences` texts."""

    sampling: Sampling = field(default_factory=Sampling)
    overlap_tokens: int = OVERLAP_TOKENS

    def __post_init__(self) -> None:
        """Raise UsageError for an overlap without tokens."""
        if self.overlap_tokens < 1:
            raise UsageError(f"overlap_tokens={self.overlap_tokens}: the models meet in at least 1 token")


@dataclass(frozen=True, slots=True)
class Gap:
    """A text to fill in. key: seeds the random numbers of its samples, so they do not depend on the other gaps."""

    prefix: str
    suffix: str
    key: str
    settings: InfillSettings


@dataclass(frozen=True, slots=True)
class Infilling:
    """A text for a gap.

    writer: both, if the models met in it, else the direction of the model that wrote it alone. steps: the tokens that the model
    with more of them had written by then. finished: the models met, or the one ended at eod or a stop string and not at the token
    limit. forward_logprob: log P_F(middle + suffix | prefix); reverse_logprob: log P_R(prefix + middle | suffix).
    """

    middle: str
    writer: str
    steps: int
    finished: bool
    forward_logprob: float = math.nan
    reverse_logprob: float = math.nan

    @property
    def met(self) -> bool:
        """True if both models agree on this text."""
        return self.writer == BOTH

    @property
    def score(self) -> float:
        """The sum of both log-probabilities, without division by a length.

        The middles of one gap compete for the same prefix and suffix. So each term is log P(middle | prefix, suffix) of its model
        plus a constant, for a middle of any length, and their sum is a product of experts.
        """
        return self.forward_logprob + self.reverse_logprob

    def as_fields(self) -> dict[str, Any]:
        """Return the fields for JSON, in which null stands for the logarithm of 0."""
        logprobs = {name: getattr(self, name) for name in ("forward_logprob", "reverse_logprob", "score")}
        values = {name: None if value == -math.inf else value for name, value in logprobs.items()}
        return {"middle": self.middle, "met": self.met, "writer": self.writer, "finished": self.finished, **values}


@dataclass(frozen=True, slots=True)
class Filled:
    """The texts for a gap, best first: those in which the models met, by score, then the others, by score.

    read, written: by direction the tokens that the model read and wrote before scoring.
    """

    infillings: list[Infilling]
    read: dict[Direction, int]
    written: dict[Direction, int]


@dataclass(frozen=True, slots=True)
class InfillModel:
    """A model that writes rows and scores texts."""

    rows: RowWriter
    engine: Engine

    @classmethod
    def of(cls, model: LanguageModel, batch_size: int = 16) -> "InfillModel":
        """Return a model of this process, for batches of at most `batch_size` sequences."""
        return cls(LocalRows(model, batch_size), TransformersEngine(model, batch_size))


IsWanted = Callable[[int], bool]
"""Returns False if nobody wants the gap with this index any more."""


class Infiller:
    """A forward and a reverse model with one tokenizer. Raises MismatchError for two tokenizers, UsageError for one without bytes."""

    def __init__(self, forward: InfillModel, reverse: InfillModel) -> None:
        self._models = {Direction.FORWARD: forward, Direction.REVERSE: reverse}
        for direction, model in self._models.items():
            if model.engine.direction is not direction:
                raise UsageError(
                    f"a {model.engine.direction} model was passed in the place of the {direction} model; exchange them"
                )
        self._tokenizer = forward.rows.tokenizer
        if self._tokenizer.content != reverse.rows.tokenizer.content:
            raise MismatchError(
                "the forward and the reverse model have different tokenizers, so their ids cannot meet; pass twins, or one two-way model"
            )
        if self._tokenizer.surfaces is None:
            raise UsageError(
                "the models' tokenizer does not tell the bytes of its ids, so texts cannot be joined exactly; use models with a byte-level"
                " or SentencePiece tokenizer"
            )

    def problem(self, gap: Gap) -> str | None:
        """Return the reason if a gap cannot be filled: an empty part, or too long for a model. Does not run the models.

        A model needs room to write, and to score prefix, suffix and all that both wrote.
        """
        for name, text in (("prefix", gap.prefix), ("suffix", gap.suffix)):
            if not text:
                return f"the {name} is empty, so one of the models has nothing to start from"
        num_new = gap.settings.sampling.max_new_tokens
        given = {Direction.FORWARD: gap.prefix, Direction.REVERSE: gap.suffix}
        for direction, model in self._models.items():
            found = model.rows.growth_problem(given[direction], num_new)
            if found := found or model.rows.growth_problem(gap.prefix + gap.suffix, 2 * num_new):
                return found
        return None

    def fill(self, gaps: Sequence[Gap], is_wanted: IsWanted = lambda _: True) -> list[Filled]:
        """Return the texts for each gap. All rows of a model are written in common batches, and so are scores."""
        results = {direction: self._write(direction, gaps, is_wanted) for direction in DIRECTIONS}
        wanted = [is_wanted(index) for index in range(len(gaps))]
        pairs = [(results[Direction.FORWARD][index], results[Direction.REVERSE][index]) for index in range(len(gaps))]
        found = [
            list(self._candidates(gap, *pair)) if needed else [] for gap, pair, needed in zip(gaps, pairs, wanted, strict=True)
        ]
        scored = self._scored(gaps, found)
        return [
            Filled(
                sorted(infillings, key=lambda one: (not one.met, -one.score)),
                {d: rows[0].num_given for d, rows in zip(DIRECTIONS, pair, strict=True)},
                {d: sum(row.num_new for row in rows) for d, rows in zip(DIRECTIONS, pair, strict=True)},
            )
            for infillings, pair in zip(scored, pairs, strict=True)
        ]

    def _write(self, direction: Direction, gaps: Sequence[Gap], is_wanted: IsWanted) -> list[list[RowResult]]:
        """Return the rows that one model writes for each gap."""
        requests, owners = [], []
        for index, gap in enumerate(gaps):
            text = gap.prefix if direction is Direction.FORWARD else gap.suffix
            for number in range(gap.settings.sampling.num_return_sequences):
                requests.append(RowRequest(text, gap.settings.sampling, f"{gap.key}/{number}"))
                owners.append(index)

        def _wants(row: int) -> bool:
            return is_wanted(owners[row])

        rows = self._models[direction].rows.write_rows(requests, lambda row, _: _wants(row), lambda row, _: None, _wants)
        found: list[list[RowResult]] = [[] for _ in gaps]
        for owner, row in zip(owners, rows, strict=True):
            found[owner].append(row)
        return found

    def _candidates(self, gap: Gap, forward: list[RowResult], reverse: list[RowResult]) -> Iterator[Infilling]:
        """Yield the texts for a gap, once for each writer: one for each pair of rows that meet, then those of single rows."""
        known = set[tuple[str, str]]()
        for one in [
            *self._overlaps(gap, forward, reverse),
            *_alone(Direction.FORWARD, forward),
            *_alone(Direction.REVERSE, reverse),
        ]:
            if (one.middle, one.writer) not in known:
                known.add((one.middle, one.writer))
                yield one

    def _overlaps(self, gap: Gap, forward: list[RowResult], reverse: list[RowResult]) -> Iterator[Infilling]:
        stops = gap.settings.sampling.stop_strings
        sides = {}
        for direction, text, rows in ((Direction.FORWARD, gap.prefix, forward), (Direction.REVERSE, gap.suffix, reverse)):
            healed = self._tokenizer.heal_prompt(text, direction)
            sides[direction] = [Side.of(self._tokenizer, direction, healed, row.generation.text_ids) for row in rows]
        for one in sides[Direction.FORWARD]:
            for other in sides[Direction.REVERSE]:
                met: Overlap | None = find_overlap(self._tokenizer, one, other, gap.settings.overlap_tokens)
                if met is not None and not any(stop in met.middle for stop in stops):
                    yield Infilling(met.middle, BOTH, max(met.num_forward, met.num_reverse), finished=True)

    def _scored(self, gaps: Sequence[Gap], found: list[list[Infilling]]) -> list[list[Infilling]]:
        """Return the texts with their scores; one that is too long for a model when it is encoded as a whole is skipped."""
        kept = [
            [one for one in infillings if not any(self._too_long(gap, one, direction) for direction in DIRECTIONS)]
            for gap, infillings in zip(gaps, found, strict=True)
        ]
        for gap, before, after in zip(gaps, found, kept, strict=True):
            if before and not after:
                raise DataError(f"{self._too_long(gap, before[0], Direction.FORWARD)}; shorten the texts or write fewer tokens")
        rows = [(gap, one) for gap, infillings in zip(gaps, kept, strict=True) for one in infillings]
        scores = {
            direction: iter(self._models[direction].engine.score([_pair(gap, one, direction) for gap, one in rows]))
            for direction in DIRECTIONS
        }
        return [
            [
                replace(
                    one,
                    forward_logprob=next(scores[Direction.FORWARD]).logprob,
                    reverse_logprob=next(scores[Direction.REVERSE]).logprob,
                )
                for one in infillings
            ]
            for infillings in kept
        ]

    def _too_long(self, gap: Gap, one: Infilling, direction: Direction) -> str | None:
        return self._models[direction].engine.score_problem(_pair(gap, one, direction))


def _pair(gap: Gap, one: Infilling, direction: Direction) -> tuple[str, str]:
    """Return the (preceding, following) that a model scores: all that it did not read."""
    if direction is Direction.FORWARD:
        return gap.prefix, one.middle + gap.suffix
    return gap.prefix + one.middle, gap.suffix


def _alone(direction: Direction, rows: Sequence[RowResult]) -> Iterator[Infilling]:
    """Yield the texts that one model wrote."""
    for row in rows:
        generation: Generation = row.generation
        finished = generation.stopped or generation.stop_string is not None
        yield Infilling(written_part(generation, direction), str(direction), row.num_new, finished)

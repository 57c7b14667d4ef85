"""The common part of inference engines whose model runs elsewhere: token ids go there, log-probabilities and text come back."""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from megatron_ledom.direction import BOTH, Direction
from megatron_ledom.errors import MismatchError, UsageError
from megatron_ledom.inference.engines.engine import Engine, PartialAnswer, StepDelimiter
from megatron_ledom.inference.generation import Sampling, TextJoiner
from megatron_ledom.inference.model_folder import (
    PYTHON_OPTIONS,
    OptionNames,
    leading_ids_of,
    load_tokenizer,
    read_model_config,
    recorded_reading,
)
from megatron_ledom.inference.scoring import (
    Span,
    SpanScore,
    distinct_spans,
    no_room,
    span_score,
    span_tokens,
    too_long,
)


@dataclass(frozen=True, slots=True)
class UnrecordedReverse:
    """Facts about a reverse model whose folder records no direction: that it is one, and the id that ended its documents."""

    is_reverse: bool = False
    eod_id: int | None = None
    option_names: OptionNames = PYTHON_OPTIONS


RECORDED = UnrecordedReverse()
KEPT_SPANS = 512
KEPT_CHARACTERS = 1000
"""The most characters of a pair whose span an engine keeps; with KEPT_SPANS it limits the memory to a few megabytes."""


class RemoteEngine(Engine):
    """An `Engine` whose subclasses implement two requests to the model: `_logprobs` and `_written`.

    folder: the folder of the model, for tokenizer and direction; MismatchError if it records another direction. The ids that
    are sent are in model order. unrecorded: the direction and eod of a reverse model whose folder records none.
    """

    def __init__(self, folder: str | Path, direction: Direction, unrecorded: UnrecordedReverse = RECORDED) -> None:
        folder = Path(folder)
        config = read_model_config(folder)
        recorded = config.get("direction")
        is_recorded = recorded is not None or direction is Direction.FORWARD or unrecorded.is_reverse
        if recorded not in (None, str(direction), BOTH) or not is_recorded:
            raise MismatchError(f"{folder}/config.json records the direction {recorded!r}, expected {str(direction)!r}")
        reading = recorded_reading(folder, config, direction)
        super().__init__(direction)
        self.tokenizer, self.stop_ids = load_tokenizer(folder, direction, unrecorded.eod_id, unrecorded.option_names)
        self.leading_ids = leading_ids_of(reading, direction, self.tokenizer)
        self.num_positions: int | None = config.get("max_position_embeddings")
        self.vocab_size: int = config["vocab_size"]
        self._kept_span = lru_cache(KEPT_SPANS)(self._encoded)

    @abstractmethod
    def _logprobs(self, spans: list[Span]) -> list[list[float]]:
        """Return the log-probabilities of the scored ids of each span, in model order."""

    @abstractmethod
    def _written(self, answers: list[PartialAnswer], sampling: Sampling) -> list[tuple[str, int]]:
        """Continue each answer until eod or the token limit; return the new text and its number of tokens."""

    @contextmanager
    def _computing(self, spans: list[Span]) -> Iterator[Callable[[], list[list[float]]]]:
        """Give the function that returns `_logprobs`; a subclass may begin to compute at once."""
        yield lambda: self._logprobs(spans)

    def score(self, pairs: Sequence[tuple[str, str]], *, include_end: bool = False) -> list[SpanScore]:
        """See `Engine.score`."""
        with self.scoring(pairs, include_end=include_end) as scores:
            return scores()

    @contextmanager
    def scoring(
        self, pairs: Sequence[tuple[str, str]], *, include_end: bool = False
    ) -> Iterator[Callable[[], list[SpanScore]]]:
        """See `Engine.scoring`. Without pairs, nothing is sent to the model."""
        if not pairs:
            yield list
            return
        spans = [self._span(pair, include_end) for pair in pairs]
        distinct = distinct_spans(spans)
        with self._computing(list(distinct.values())) as logprobs:

            def _scores() -> list[SpanScore]:
                values = dict(zip(distinct, logprobs(), strict=True))
                ordered = [values[tuple(span.tokens), span.num_context] for span in spans]
                return [span_score(span, row, self.direction, include_end) for span, row in zip(spans, ordered, strict=True)]

            yield _scores

    def score_problem(self, pair: tuple[str, str], *, include_end: bool = False) -> str | None:
        """See `Engine.score_problem`."""
        return too_long(len(self._span(pair, include_end).tokens), self.num_positions, self.direction)

    def growth_problem(self, text: str, num_new_tokens: int) -> str | None:
        """See `Engine.growth_problem`."""
        num_given = len(self.leading_ids) + len(self.tokenizer.encode(text))
        return no_room(num_given, num_new_tokens, self.num_positions, self.direction)

    def expand(
        self, answers: Sequence[PartialAnswer], num: int, delimiter: StepDelimiter, sampling: Sampling
    ) -> list[list[PartialAnswer]]:
        """See `Engine.expand`."""
        if delimiter.token_ids:
            raise UsageError("this engine returns text, so a step ends at a pattern; give regex:PATTERN instead of ids")
        return super().expand(answers, num, delimiter, sampling)

    def prompt_ids(self, answer: PartialAnswer) -> list[int]:
        """Return the ids that a forward model continues: the prompt and the answer so far, encoded as one text."""
        return [*self.leading_ids, *self.tokenizer.encode(answer.prompt + answer.text)]

    def _span(self, pair: tuple[str, str], include_end: bool) -> Span:
        """Return the span of a pair. A short pair is encoded once for `score_problem` and `score`."""
        is_short = sum(map(len, pair)) <= KEPT_CHARACTERS
        return self._kept_span(pair, include_end) if is_short else self._encoded(pair, include_end)

    def _encoded(self, pair: tuple[str, str], include_end: bool) -> Span:
        tokens, num_given = span_tokens(self.tokenizer, self.direction, pair, self.leading_ids, self.stop_ids)
        return Span([*tokens, *(self.stop_ids[:1] if include_end else [])], num_given)

    def _grow(
        self, answers: Sequence[PartialAnswer], num: int, delimiter: StepDelimiter | None, sampling: Sampling
    ) -> list[list[PartialAnswer]]:
        """See `Engine._grow`. The step is cut here, because servers do not distinguish a stop string from the model's eod."""
        children = [answer.child(number) for answer in answers if not answer.finished for number in range(num)]
        written = self._written(children, sampling)
        grown = iter(
            self._grown(answer, *text_and_count, delimiter) for answer, text_and_count in zip(children, written, strict=True)
        )
        return [[answer] if answer.finished else [next(grown) for _ in range(num)] for answer in answers]

    def _grown(self, answer: PartialAnswer, written: str, num_tokens: int, delimiter: StepDelimiter | None) -> PartialAnswer:
        """Return the answer with the text that the engine wrote, or with only its first step if there is a delimiter.

        num_tokens: the number of tokens of `written`. A step that is cut out of it counts the tokens that it encodes to.
        """
        end = delimiter.end_of_step(written) if delimiter else None
        finished = end is None or end == len(written)
        kept = written[:end]
        num_kept = num_tokens if finished else len(self.tokenizer.encode(kept))
        return replace(
            answer, text=answer.text + kept, num_tokens=answer.num_tokens + num_kept, finished=finished, forward_logprob=None
        )


class RemoteRows:
    """The parts of a `RowWriter` that need no weights, from the engine of the same model."""

    def __init__(self, engine: RemoteEngine) -> None:
        self.direction, self.tokenizer, self.leading_ids = engine.direction, engine.tokenizer, engine.leading_ids
        self.num_positions = engine.num_positions
        self.writer = TextJoiner(engine.tokenizer, engine.direction, engine.stop_ids)

    def growth_problem(self, text: str, num_new_tokens: int) -> str | None:
        """Return the reason if the model has no room for a text and `num_new_tokens` more; None if it has."""
        healed = self.tokenizer.heal_prompt(text, self.direction)
        num_given = len(self.leading_ids) + len(healed.tokens) + len(healed.trimmed)
        return no_room(num_given, num_new_tokens, self.num_positions, self.direction)


def seed_of(answer: PartialAnswer) -> int:
    """Return the seed, of 31 bits, for the answer's own random numbers."""
    return int(answer.draw(answer.num_tokens) * 2**31)

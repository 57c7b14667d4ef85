"""An engine whose weights are elsewhere: it knows the model folder's tokenizer and direction, sends ids and checks what comes back."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megatron_ledom.direction import Direction
from megatron_ledom.errors import MismatchError, UsageError
from megatron_ledom.inference.engines.engine import Engine, StepDelimiter
from megatron_ledom.inference.engines.engine import Path as AnswerPath
from megatron_ledom.inference.generation import Sampling
from megatron_ledom.inference.model_folder import load_tokenizer, read_model_config
from megatron_ledom.inference.scoring import (
    Span,
    SpanScore,
    distinct_spans,
    no_room,
    span_score,
    span_tokens,
    too_long,
)


class RemoteEngine(Engine):
    """An `Engine` of two questions that go to where the weights are.

    folder: of the served model; MismatchError where it records another direction. Ids that are sent are in model order.
    """

    def __init__(self, folder: str | Path, direction: Direction) -> None:
        folder = Path(folder)
        config = read_model_config(folder)
        recorded = config.get("direction")
        if recorded not in (None, str(direction)) or (recorded is None and direction is Direction.REVERSE):
            raise MismatchError(f"{folder}/config.json records the direction {recorded!r}, asked for was {str(direction)!r}")
        super().__init__(direction)
        self.tokenizer, self.stop_ids = load_tokenizer(folder)
        self._leading_ids = [] if recorded else self.tokenizer.leading_ids
        self._num_positions: int | None = config.get("max_position_embeddings")

    @abstractmethod
    def _logprobs(self, spans: list[Span]) -> list[list[float]]:
        """Return the log-probabilities of the scored ids of each span, model order."""

    @abstractmethod
    def _written(self, paths: list[AnswerPath], sampling: Sampling) -> list[tuple[str, int]]:
        """Write behind each path until eod or the token limit; returns text and number of tokens."""

    def score(self, pairs: Sequence[tuple[str, str]], *, include_end: bool = False) -> list[SpanScore]:
        """See `Engine.score`."""
        spans = [self._span(pair, include_end) for pair in pairs]
        distinct = distinct_spans(spans)
        values = dict(zip(distinct, self._logprobs(list(distinct.values())), strict=True))
        ordered = [values[tuple(span.tokens), span.num_context] for span in spans]
        return [span_score(span, row, self.direction, include_end) for span, row in zip(spans, ordered, strict=True)]

    def score_fault(self, pair: tuple[str, str], *, include_end: bool = False) -> str | None:
        """See `Engine.score_fault`."""
        return too_long(len(self._span(pair, include_end).tokens), self._num_positions, self.direction)

    def growth_fault(self, text: str, num_new_tokens: int) -> str | None:
        """See `Engine.growth_fault`."""
        num_given = len(self._leading_ids) + len(self.tokenizer.encode(text))
        return no_room(num_given, num_new_tokens, self._num_positions, self.direction)

    def expand(
        self, paths: Sequence[AnswerPath], num: int, delimiter: StepDelimiter, sampling: Sampling
    ) -> list[list[AnswerPath]]:
        """See `Engine.expand`."""
        if delimiter.token_ids:
            raise UsageError("this engine answers with text, so a step ends at a pattern; give regex:PATTERN instead of ids")
        return super().expand(paths, num, delimiter, sampling)

    def prompt_ids(self, path: AnswerPath) -> list[int]:
        """Return what a forward model goes on from: the ids of the prompt and the answer so far, encoded as one text."""
        return [*self._leading_ids, *self.tokenizer.encode(path.prompt + path.text)]

    def _span(self, pair: tuple[str, str], include_end: bool) -> Span:
        tokens, num_given = span_tokens(self.tokenizer, self.direction, pair, self._leading_ids, self.stop_ids)
        return Span([*tokens, *(self.stop_ids[:1] if include_end else [])], num_given)

    def _grow(
        self, paths: Sequence[AnswerPath], num: int, delimiter: StepDelimiter | None, sampling: Sampling
    ) -> list[list[AnswerPath]]:
        """See `Engine._grow`. The step is cut out here: servers do not tell a stop string from the model's own end."""
        children = [path.child(number) for path in paths if not path.finished for number in range(num)]
        answers = self._written(children, sampling)
        grown = iter(self._grown(path, *answer, delimiter) for path, answer in zip(children, answers, strict=True))
        return [[path] if path.finished else [next(grown) for _ in range(num)] for path in paths]

    def _grown(self, path: AnswerPath, written: str, num_tokens: int, delimiter: StepDelimiter | None) -> AnswerPath:
        """Return the path with what the engine wrote until eod or the token limit; with a delimiter, with one step of it.

        num_tokens: of `written`; of a step that was cut out of it, what the step encodes to. What lies beyond is given up.
        """
        end = delimiter.end_of_step(written) if delimiter else None
        finished = end is None or end == len(written)
        kept = written[:end]
        num_kept = num_tokens if finished else len(self.tokenizer.encode(kept))
        return replace(
            path, text=path.text + kept, num_tokens=path.num_tokens + num_kept, finished=finished, forward_logprob=None
        )


def seed_of(path: AnswerPath) -> int:
    """Return a seed of 31 bits for the path's own random numbers."""
    return int(path.draw(path.num_tokens) * 2**31)

"""The interface of inference engines for Reverse Reward: they sample answers, score spans and expand answers by one step.

The engines are `TransformersEngine`, `VllmEngine` (both in this process) and `CompletionsEngine` (a server).
"""

import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_ledom.direction import Direction
from megatron_ledom.errors import UsageError
from megatron_ledom.inference.generation import Sampling
from megatron_ledom.inference.row_choice import uniform_draw
from megatron_ledom.inference.scoring import SpanScore, TokenUsage


@dataclass(frozen=True, slots=True)
class StepDelimiter:
    """The end of a step of an answer: text that matches the pattern, or one of the token ids.

    A delimiter counts only after a character that is not white space, so no step is empty. The whole token that completes
    the delimiter belongs to the step.
    """

    pattern: str | None = "\n"
    """A regular expression; None if only ids count."""
    token_ids: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        """Raise UsageError for no delimiter, an invalid regular expression, and one that matches the empty text."""
        if self.pattern is None and not self.token_ids:
            raise UsageError("a step delimiter needs a pattern or token ids")
        try:
            matches_nothing = self.pattern is not None and re.search(self.pattern, "") is not None
        except re.error as error:
            raise UsageError(f"the step delimiter {self.pattern!r} is not a regular expression: {error}") from error
        if matches_nothing:
            raise UsageError(f"the step delimiter {self.pattern!r} matches the empty text, so every step would end at once")

    @classmethod
    def parse(cls, text: str) -> "StepDelimiter":
        """Return the delimiter for `newline`, `regex:PATTERN` or `ids:13,198`."""
        kind, _, rest = text.partition(":")
        if text == "newline":
            return cls()
        if kind == "regex" and rest:
            return cls(pattern=rest)
        if kind == "ids" and re.fullmatch(r"\d+(,\d+)*", rest):
            return cls(pattern=None, token_ids=frozenset(map(int, rest.split(","))))
        raise UsageError(f"step delimiter {text!r}: expected newline, regex:PATTERN or ids:NUMBER,NUMBER")

    def end_of_step(self, text: str) -> int | None:
        """Return the number of characters of the step at the start of `text`; None if it does not end within `text`."""
        if self.pattern is None:
            return None
        content = re.search(r"\S", text)
        found = re.compile(self.pattern).search(text, content.end()) if content else None
        return found.end() if found else None

    def steps_of(self, answer: str) -> list[str]:
        """Return the steps of an answer, which is cut after each delimiter. White space at the end belongs to the last step."""
        steps: list[str] = []
        rest = answer
        while rest:
            end = self.end_of_step(rest)
            if end is None:
                if rest.strip() or not steps:
                    return [*steps, rest]
                return [*steps[:-1], steps[-1] + rest]
            steps.append(rest[:end])
            rest = rest[end:]
        return steps


@dataclass(frozen=True, slots=True)
class PartialAnswer:
    """The written beginning of an answer to a prompt.

    key: seeds the answer's own random numbers, so they do not depend on the batch. finished: the model wrote eod, or the token
    limit cut the answer. num_tokens: the tokens that the model wrote. forward_logprob: the sum of log P_F of these tokens as
    they were sampled, without temperature; None if the engine does not report it. state: private to the engine.
    """

    prompt: str
    key: str
    text: str = ""
    finished: bool = False
    num_tokens: int = 0
    forward_logprob: float | None = 0.0
    state: Any = field(default=None, repr=False, compare=False)

    def child(self, number: int) -> "PartialAnswer":
        """Return this answer as the start of its continuation `number`, with the key for its random numbers.

        Continuation 0 keeps the key, so an answer is the same whether it is written at once or step by step.
        """
        if not self.num_tokens:
            return replace(self, key=f"{self.key}/{number}")
        return replace(self, key=f"{self.key}.{self.num_tokens}:{number}") if number else self

    def draw(self, position: int) -> float:
        """Return the random number, uniform in [0, 1), that chooses the token at `position` of the answer."""
        return uniform_draw(self.key, position)


class Engine(ABC):
    """A language model of one direction. All texts are in text order.

    usage: the tokens that the model has read and written, and the seconds, since the engine was created.
    """

    def __init__(self, direction: Direction) -> None:
        self.direction, self.usage = direction, TokenUsage()

    @abstractmethod
    def score(self, pairs: Sequence[tuple[str, str]], *, include_end: bool = False) -> list[SpanScore]:
        """Score each (preceding, following).

        A forward model gives log P(following | preceding), a reverse model log P(preceding | following). Both parts are
        tokenized as one text; a token that crosses the boundary belongs to `following`. An empty given part means the start of
        a document. include_end adds log P(eod) at the far end of the scored part. Equal pairs are computed once.
        """

    @contextmanager
    def scoring(
        self, pairs: Sequence[tuple[str, str]], *, include_end: bool = False
    ) -> Iterator[Callable[[], list[SpanScore]]]:
        """Give the function that returns the result of `score`.

        An engine whose model runs elsewhere starts at once, so that it can compute while the caller prepares the next work.
        """
        yield lambda: self.score(pairs, include_end=include_end)

    @abstractmethod
    def score_problem(self, pair: tuple[str, str], *, include_end: bool = False) -> str | None:
        """Return the reason if a pair is too long for `score`; None if it fits. Does not run the model."""

    @abstractmethod
    def growth_problem(self, text: str, num_new_tokens: int) -> str | None:
        """Return the reason if the model has no room for a text and `num_new_tokens` more; None if it has. Does not run the model."""

    @abstractmethod
    def _grow(
        self, answers: Sequence[PartialAnswer], num: int, delimiter: StepDelimiter | None, sampling: Sampling
    ) -> list[list[PartialAnswer]]:
        """Return `num` continuations of each answer, by one step or, without a delimiter, to its end.

        A finished answer has itself as its only continuation.
        """

    def sample(self, starts: Sequence[PartialAnswer], sampling: Sampling) -> list[list[PartialAnswer]]:
        """Return `sampling.num_return_sequences` whole answers for each of `starts` (see `empty_answer`)."""
        self._check_writes(sampling)
        return self._grow(starts, sampling.num_return_sequences, None, sampling)

    def expand(
        self, answers: Sequence[PartialAnswer], num: int, delimiter: StepDelimiter, sampling: Sampling
    ) -> list[list[PartialAnswer]]:
        """Return `num` continuations of each answer by one step.

        A step ends at the delimiter, at eod, or where the whole answer has `max_new_tokens`.
        """
        self._check_writes(sampling)
        return self._grow(answers, num, delimiter, sampling)

    def _check_writes(self, sampling: Sampling) -> None:
        """Raise UsageError for stop strings, because steps end at a StepDelimiter, and for a reverse model."""
        if sampling.stop_strings:
            raise UsageError(
                f"engines accept no stop_strings ({list(sampling.stop_strings)}); pass a StepDelimiter to `expand`"
            )
        if self.direction is not Direction.FORWARD:
            raise UsageError("a reverse model writes the text before a prompt, not answers; sample from the forward model")


class UsageMeter:
    """Measures the usage of a forward and a reverse engine from now on."""

    def __init__(self, forward: Engine, reverse: Engine) -> None:
        self._forward, self._reverse = forward, reverse
        self._begin = (forward.usage.tokens, reverse.usage.tokens, time.monotonic())

    def usage(self) -> dict[str, Any]:
        """Return the tokens of each engine and the seconds since the start."""
        forward, reverse, start = self._begin
        tokens = {
            "forward_tokens": self._forward.usage.tokens - forward,
            "reverse_tokens": self._reverse.usage.tokens - reverse,
        }
        return {**tokens, "seconds": time.monotonic() - start}


def empty_answer(prompt: str, sampling: Sampling, salt: int = 0) -> PartialAnswer:
    """Return an answer to `prompt` without text; `salt`, the number of a record, gives equal prompts other random numbers."""
    return PartialAnswer(prompt, f"{sampling.seed or 0}/{salt}")

"""An `Engine` runs a model for Reverse Reward: it samples answers, scores spans and expands answers by one step.

`TransformersEngine` runs a model in this process; `completions_engine` and `vllm_engine` speak to other engines.
"""

import re
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Any

from megatron_ledom.direction import Direction
from megatron_ledom.errors import UsageError
from megatron_ledom.inference.generation import Sampling
from megatron_ledom.inference.scoring import SpanScore, TokenUsage


@dataclass(frozen=True, slots=True)
class StepDelimiter:
    """Where a step of an answer ends: after text that the pattern matches, or after one of the token ids.

    A delimiter counts only after a character that is no white space, so that no step is empty. The token that completes the
    delimiter belongs to the step with all its characters.
    """

    pattern: str | None = "\n"
    """A regular expression; None where only ids count."""
    token_ids: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        """Refuse a pattern that is no regular expression, or that matches nothing at all, and a delimiter of nothing."""
        if self.pattern is None and not self.token_ids:
            raise UsageError("a step delimiter needs a pattern or token ids")
        try:
            matches_nothing = self.pattern is not None and re.search(self.pattern, "") is not None
        except re.error as error:
            raise UsageError(f"the step delimiter {self.pattern!r} is no regular expression: {error}") from error
        if matches_nothing:
            raise UsageError(f"the step delimiter {self.pattern!r} matches the empty text, so it would end every step at once")

    @classmethod
    def parse(cls, text: str) -> "StepDelimiter":
        """`newline`, `regex:PATTERN` or `ids:13,198`."""
        kind, _, rest = text.partition(":")
        if text == "newline":
            return cls()
        if kind == "regex" and rest:
            return cls(pattern=rest)
        if kind == "ids" and re.fullmatch(r"\d+(,\d+)*", rest):
            return cls(pattern=None, token_ids=frozenset(map(int, rest.split(","))))
        raise UsageError(f"step delimiter {text!r}: expected newline, regex:PATTERN or ids:NUMBER,NUMBER")

    def end_of_step(self, text: str) -> int | None:
        """How many characters of `text`, which begins a step, the pattern closes; None where the step goes on."""
        if self.pattern is None:
            return None
        content = re.search(r"\S", text)
        found = re.compile(self.pattern).search(text, content.end()) if content else None
        return found.end() if found else None


@dataclass(frozen=True, slots=True)
class PartialAnswer:
    """An answer to a prompt as far as it is written.

    finished: the model ended it or the token limit cut it. num_tokens: written by the model. forward_logprob: the sum of
    log P_F of these tokens as they were sampled, without temperature; None where the engine does not tell. key: names the answer's
    own random numbers, which depend on nothing else in the batch. state: the engine's own.
    """

    prompt: str
    key: str
    text: str = ""
    finished: bool = False
    num_tokens: int = 0
    forward_logprob: float | None = 0.0
    state: Any = field(default=None, repr=False, compare=False)

    def child(self, number: int) -> "PartialAnswer":
        """Return this answer as its child `number`. The first goes on with the answer's own random numbers, so that an
        answer comes out the same whether it is written at once or step by step."""
        if not self.num_tokens:
            return replace(self, key=f"{self.key}/{number}")
        return replace(self, key=f"{self.key}.{self.num_tokens}:{number}") if number else self

    def draw(self, position: int) -> float:
        """The uniform number in [0, 1) with which the token at `position` of the answer is chosen."""
        digest = blake2b(f"{self.key}@{position}".encode(), digest_size=8).digest()
        return (int.from_bytes(digest, "big") >> 11) / 2**53


class Engine(ABC):
    """A language model of one direction. Texts are text order everywhere.

    spent: tokens that the model was fed, and seconds, since the engine was made; it grows with every call.
    """

    def __init__(self, direction: Direction) -> None:
        self.direction, self.usage = direction, TokenUsage()

    @abstractmethod
    def score(self, pairs: Sequence[tuple[str, str]], *, include_end: bool = False) -> list[SpanScore]:
        """Return, of each (preceding, following), log P(following | preceding) of a forward model, log P(preceding | following)
        of a reverse one. Both parts are tokenised as one text; a token that reaches over the boundary belongs to `following`.
        An empty given part stands for the start of a document. include_end adds log P(eod) at the scored part's far end.
        Equal pairs are computed once."""

    @abstractmethod
    def score_problem(self, pair: tuple[str, str], *, include_end: bool = False) -> str | None:
        """Return why `score` would refuse a pair as too long for the model, None where it fits. Costs no pass."""

    @abstractmethod
    def growth_problem(self, text: str, num_new_tokens: int) -> str | None:
        """Return why the model has no room for a text and `num_new_tokens` beside it, None where it has. Costs no pass."""

    @abstractmethod
    def _grow(
        self, answers: Sequence[PartialAnswer], num: int, delimiter: StepDelimiter | None, sampling: Sampling
    ) -> list[list[PartialAnswer]]:
        """Return `num` continuations of each answer, by one step or, without a delimiter, to its end; a finished answer is its own only
        one."""

    def sample(self, starts: Sequence[PartialAnswer], sampling: Sampling) -> list[list[PartialAnswer]]:
        """Return `sampling.num_return_sequences` whole answers for each of `starts` (a PartialAnswer without text)."""
        self._check_writes(sampling)
        return self._grow(starts, sampling.num_return_sequences, None, sampling)

    def expand(
        self, answers: Sequence[PartialAnswer], num: int, delimiter: StepDelimiter, sampling: Sampling
    ) -> list[list[PartialAnswer]]:
        """Return `num` continuations of each answer by one step, which ends at the delimiter, at eod or at `max_new_tokens` of the
        whole answer."""
        self._check_writes(sampling)
        return self._grow(answers, num, delimiter, sampling)

    def _check_writes(self, sampling: Sampling) -> None:
        """Refuse stop strings, since steps end at a StepDelimiter, and a reverse model."""
        if sampling.stop_strings:
            raise UsageError(f"engines take no stop_strings ({list(sampling.stop_strings)}); give a StepDelimiter to `expand`")
        if self.direction is not Direction.FORWARD:
            raise UsageError("a reverse model writes what precedes a text, not answers; give the forward model to sample from")


class UsageMeter:
    """Counts what a forward and a reverse engine spend from now on."""

    def __init__(self, forward: Engine, reverse: Engine) -> None:
        self._forward, self._reverse = forward, reverse
        self._begin = (forward.usage.tokens, reverse.usage.tokens, time.monotonic())

    def usage(self) -> dict[str, Any]:
        """Return the tokens of both, and seconds."""
        forward, reverse, start = self._begin
        tokens = {
            "forward_tokens": self._forward.usage.tokens - forward,
            "reverse_tokens": self._reverse.usage.tokens - reverse,
        }
        return {**tokens, "seconds": time.monotonic() - start}


def empty_answer(prompt: str, sampling: Sampling, salt: int = 0) -> PartialAnswer:
    """The PartialAnswer from which answers to `prompt` grow; `salt` (a record's number) sets equal prompts apart."""
    return PartialAnswer(prompt, f"{sampling.seed or 0}/{salt}")

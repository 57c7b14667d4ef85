"""Reverse Reward as one function, computed in this process or by a server.

The rewards are those of `ledom rerank` (`inference/reverse_reward/reward.py` has the formula). Some answers have none: an empty
answer, one that is too long for a model, and one to which a model gives the probability 0. A trainer would count a missing
reward as 0, which is better than every logarithm, so the caller chooses the number that such an answer gets.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import Protocol, Self

from megatron_ledom.direction import Direction
from megatron_ledom.errors import DataError, MismatchError, UsageError
from megatron_ledom.inference.engines.engine import Engine
from megatron_ledom.inference.engines.transformers_engine import TransformersEngine
from megatron_ledom.inference.language_model import ForwardLM, LanguageModel, ReverseLM
from megatron_ledom.inference.reverse_reward.reward import (
    Candidate,
    CandidateScore,
    RewardSettings,
    candidate_problems,
    score_questions,
)
from megatron_ledom.rewards.reward_server import RewardServer, Scored

Question = tuple[str, Sequence[str]]
"""A prompt, with the separator at its end, and answers to it."""
Model = Engine | LanguageModel | str | Path
"""A model: an engine, a loaded model, or its folder."""


class _Source(Protocol):
    """Computes rewards. `settings` are those of the rewards that it computes."""

    settings: RewardSettings

    def score(self, questions: Sequence[Question]) -> list[list[Scored]]:
        """Return the reward of each answer, or the reason why it has none."""


class ReverseRewardFunction:
    """Returns the Reverse Reward of answers. Threads may share it.

    forward, reverse: the two models. settings: those of the reward. unscored: the reward of an answer that has none; choose one
    below the rewards of all other answers. None: such an answer raises DataError. batch_size: largest number of sequences in one
    batch, unless the models are engines.
    """

    def __init__(
        self,
        forward: Model,
        reverse: Model,
        settings: RewardSettings | None = None,
        *,
        unscored: float | None = None,
        batch_size: int = 16,
    ) -> None:
        engines = (_engine(forward, Direction.FORWARD, batch_size), _engine(reverse, Direction.REVERSE, batch_size))
        self._source: _Source = _LocalModels(*engines, settings or RewardSettings())
        self.unscored = _checked_number(unscored)

    @classmethod
    def at(
        cls,
        url: str,
        settings: RewardSettings | None = None,
        *,
        unscored: float | None = None,
        timeout_seconds: float = 600.0,
        key_over_http: bool = False,
    ) -> Self:
        """Return the function of a server, such as http://localhost:8000, which has the models. It can be pickled.

        The API key of the server is read from the environment variable OPENAI_API_KEY. key_over_http: send it by plain http to
        another machine.
        """
        made = cls.__new__(cls)
        made._source = RewardServer(url, settings or RewardSettings(), timeout_seconds, key_over_http=key_over_http)
        made.unscored = _checked_number(unscored)
        return made

    @property
    def settings(self) -> RewardSettings:
        """The settings of the reward."""
        return self._source.settings

    def __call__(self, prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
        """Return the reward of each pair of a prompt and an answer. Pairs with the same prompt are scored together."""
        _check_texts(prompts, "prompts")
        _check_texts(answers, "answers")
        if len(prompts) != len(answers):
            raise DataError(f"{len(prompts)} prompts and {len(answers)} answers were given; pass one prompt for each answer")
        places: dict[str, list[int]] = {}
        for index, prompt in enumerate(prompts):
            places.setdefault(prompt, []).append(index)
        grouped = self.rewards([(prompt, [answers[index] for index in indices]) for prompt, indices in places.items()])
        rewards = [0.0] * len(prompts)
        for indices, found in zip(places.values(), grouped, strict=True):
            for index, reward in zip(indices, found, strict=True):
                rewards[index] = reward
        return rewards

    def rewards(self, questions: Sequence[Question]) -> list[list[float]]:
        """Return the rewards of the answers to each question, in the given order: finite numbers."""
        for prompt, answers in questions:
            _check_texts([prompt], "prompts")
            _check_texts(answers, "answers")
            if not prompt:
                raise DataError("a prompt is empty, expected a text; remove the question")
        asked = [(prompt, list(answers)) for prompt, answers in questions if answers]
        scored = iter(self._source.score(asked) if asked else [])
        found = [next(scored) if answers else [] for _, answers in questions]
        return [
            [self._number(one, answer) for one, answer in zip(row, answers, strict=True)]
            for row, (_, answers) in zip(found, questions, strict=True)
        ]

    def _number(self, scored: Scored, answer: str) -> float:
        reward, reason = scored
        if reward is not None and math.isfinite(reward):
            return reward
        if reward is not None and reward != -math.inf:
            raise DataError(
                f"the reward of the answer {answer[:60]!r} is {reward}; check that both models' weights are complete"
            )
        if self.unscored is None:
            raise DataError(
                f"the answer {answer[:60]!r} has no reward ({reason}); pass unscored=NUMBER, a reward for such answers below that of"
                " all others"
            )
        return self.unscored


class _LocalModels:
    """Two models in this process, used by one thread at a time."""

    def __init__(self, forward: Engine, reverse: Engine, settings: RewardSettings) -> None:
        self.settings = settings
        self._engines, self._lock = (forward, reverse), Lock()

    def score(self, questions: Sequence[Question]) -> list[list[Scored]]:
        """Score all answers in shared batches."""
        asked = [(prompt, [Candidate(answer) for answer in answers]) for prompt, answers in questions]
        with self._lock:
            problems = [
                candidate_problems(*self._engines, prompt, answers, self.settings, is_written=True) for prompt, answers in asked
            ]
            scores = score_questions(*self._engines, asked, self.settings, problems)
        return [[(score.reward, _reason(score)) for score in row] for row in scores]


def _reason(score: CandidateScore) -> str:
    """Return the reason why a score has no finite reward."""
    if score.skipped is not None:
        return score.skipped
    return "it is empty" if score.reverse_logprob is None else "a model gives it the probability 0"


def _engine(model: Model, direction: Direction, batch_size: int) -> Engine:
    """Return the engine of a model; raises MismatchError for a model of the other direction."""
    if isinstance(model, str | Path):
        loaded = ForwardLM if direction is Direction.FORWARD else ReverseLM
        model = loaded.from_pretrained(model)
    if not isinstance(model, Engine | LanguageModel):
        raise UsageError(f"the {direction} model is a {type(model).__name__}, expected an engine, a loaded model or a folder")
    if model.direction is not direction:
        raise MismatchError(
            f"the {direction} model that was passed reads {model.direction}; pass the forward model first, then the reverse model"
        )
    return model if isinstance(model, Engine) else TransformersEngine(model, batch_size)


def _check_texts(texts: Sequence[str], name: str) -> None:
    """Raise DataError unless these are texts; a single text would count as a list of characters."""
    if isinstance(texts, str):
        raise DataError(f"{name} is one text, expected a list of texts; put it into a list")
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise DataError(f"{name}[{index}] is a {type(text).__name__}, expected a text; convert it first")


def _checked_number(unscored: float | None) -> float | None:
    if unscored is not None and not math.isfinite(unscored):
        raise UsageError(
            f"unscored={unscored} is not a finite number; pass one below the rewards of all other answers, or None"
        )
    return unscored

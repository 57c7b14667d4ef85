"""Reverse Reward: rank a forward model's answers by how well a reverse model recovers the prompt from them.

`R(x, y) = P_F(y|x)^(1-lambda) * P_R(x|y)^lambda` (LEDOM, arXiv 2507.01335, section "Reverse Reward"), here in logs, with the
options that the paper leaves open; x the prompt, y a candidate answer:

    reward = [ (1 - lambda) * log P_F(y|x) / n_F + lambda * log P_R(x|y) / n_R + mu * log P_R(y) ] / T

What each term is:
- `x + y` is encoded once, as one text, by each model's own tokenizer; x ends with whatever separates it from y. A token that
  reaches over the boundary belongs to y: forward it is scored, in reverse it is given. A dummy prefix belongs to x.
- log P_F(y|x) sums over the tokens of y, log P_R(x|y) over the tokens of x alone. A BOS stands first in model order where the
  tokenizer of a stock model adds one, and is never scored. `include_ends` adds eod: the answer ends after y, the text begins with x.
- n is 1, the number of scored tokens (eod not counted), or the UTF-8 bytes of y (forward) and of x (reverse).
- log P_R(y) is the reverse model's likelihood of the answer as a document of its own. With mu = -lambda and lambda = 0 the
  reward is log P(y|x) - lambda log P(y), to which the first two terms amount if both models came from one joint distribution.
- T divides the whole: it changes no ranking, only how sharply rewards weigh the votes of a majority.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_ledom.errors import DataError, UsageError
from megatron_ledom.inference.engines.engine import Engine
from megatron_ledom.inference.scoring import SpanScore

NORMALIZATIONS = ("none", "token", "byte")


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardSettings:
    """How the terms of the reward are combined; see the top of this file."""

    weight: float = 0.5
    """lambda, the reverse model's share, in [0, 1]."""
    forward_normalization: str = "none"
    """The divisor of log P_F(y|x): none, token or byte."""
    reverse_normalization: str = "none"
    """The divisor of log P_R(x|y). The same prompt has nearly the same length for all of its candidates: it is the
    scale of lambda that changes, question by question."""
    language_model_weight: float = 0.0
    """mu of log P_R(y); negative values hold generic answers back. Not 0, it costs a reverse pass a distinct answer."""
    temperature: float = 1.0
    """T, positive."""
    include_ends: bool = False
    """Eod counts, on both sides."""

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        if not 0 <= self.weight <= 1:
            raise UsageError(
                f"weight={self.weight} is outside [0, 1]; 0 ranks by the forward model alone, 1 by the reverse model alone"
            )
        for name in ("forward_normalization", "reverse_normalization"):
            if getattr(self, name) not in NORMALIZATIONS:
                raise UsageError(f"{name}={getattr(self, name)!r} is unknown; it can be one of {', '.join(NORMALIZATIONS)}")
        if not math.isfinite(self.language_model_weight):
            raise UsageError(f"language_model_weight={self.language_model_weight} must be a finite number; 0 is off")
        if not 0 < self.temperature < math.inf:
            raise UsageError(f"the reward's temperature={self.temperature} must be a positive number; 1 is off")


@dataclass(frozen=True, slots=True)
class Candidate:
    """An answer in text order. forward_logprob: its natural log-probability, if whoever sampled it kept it, over
    forward_tokens tokens (needed only to divide by them)."""

    text: str
    forward_logprob: float | None = None
    forward_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class CandidateScore:
    """Natural logs, summed over tokens, not normalised. forward_tokens is None where forward_logprob was given without it.

    An empty answer has nothing to condition the reverse model on: its reverse_logprob and reward are None, and it ranks last.
    An answer that was skipped has the reason under `skipped`, no values at all, and ranks last too. An impossible one has -inf.
    language_model_logprob is None unless its term is on. The token values are text order; eod's, if asked for, apart.
    """

    forward_logprob: float | None
    reverse_logprob: float | None
    forward_tokens: int | None
    reverse_tokens: int | None
    reward: float | None
    language_model_logprob: float | None = None
    skipped: str | None = None
    forward_score: SpanScore | None = field(default=None, repr=False)
    reverse_score: SpanScore | None = field(default=None, repr=False)

    def as_fields(self, *, token_values: bool = False) -> dict[str, Any]:
        """Return the fields of a candidate in a reranking file; token_values adds the ids and log-probabilities of each token.

        JSON has no -inf: such a value is written as null, and its name stands under "minus_infinity".
        """
        names = ("forward_logprob", "reverse_logprob", "forward_tokens", "reverse_tokens", "reward")
        values: dict[str, float | None] = {name: getattr(self, name) for name in names}
        if self.language_model_logprob is not None:
            values["language_model_logprob"] = self.language_model_logprob
        infinite = [name for name, value in values.items() if value == -math.inf]
        fields: dict[str, Any] = {name: _or_null(value) for name, value in values.items()}
        if infinite:
            fields["minus_infinity"] = infinite
        if self.skipped is not None:
            fields["skipped"] = self.skipped
        if token_values:
            for side, score in (("forward", self.forward_score), ("reverse", self.reverse_score)):
                fields[f"{side}_token_ids"] = score.text_ids if score else None
                fields[f"{side}_token_logprobs"] = [_or_null(value) for value in score.token_logprobs] if score else None
        return fields


def _or_null(value: float | None) -> float | None:
    return None if value == -math.inf else value


def reverse_reward(forward_logprob: float, reverse_logprob: float, weight: float) -> float:
    """(1 - weight) * forward_logprob + weight * reverse_logprob; a term of weight 0 is left out, so 0 * -inf never is NaN."""
    return _weighted_sum((1 - weight, forward_logprob), (weight, reverse_logprob))


def reward_of(score: CandidateScore, prompt: str, answer: str, settings: RewardSettings) -> float | None:
    """The reward of scores that are known already, under any settings; None where there is no reverse score.

    None also where a negative language_model_weight meets an answer that the reverse model calls impossible: it would gain
    without limit. Raises DataError where the settings need what the scores lack: a token count, or the language-model term.
    """
    if score.forward_logprob is None or score.reverse_logprob is None:
        return None
    if settings.language_model_weight < 0 and score.language_model_logprob == -math.inf:
        return None
    if settings.forward_normalization == "token" and score.forward_tokens is None and settings.weight < 1:
        raise DataError("a given forward_logprob has no forward_tokens to divide it by; add them, or remove forward_logprob")
    if settings.language_model_weight and score.language_model_logprob is None:
        raise DataError("a language_model_weight needs language_model_logprob, which these scores lack; score them again")
    forward_length = _length(settings.forward_normalization, score.forward_tokens or 0, answer)
    reverse_length = _length(settings.reverse_normalization, score.reverse_tokens or 0, prompt)
    total = _weighted_sum(
        ((1 - settings.weight) / forward_length, score.forward_logprob),
        (settings.weight / reverse_length, score.reverse_logprob),
        (settings.language_model_weight, score.language_model_logprob or 0.0),
    )
    return total / settings.temperature


def candidate_problems(
    forward: Engine,
    reverse: Engine,
    prompt: str,
    candidates: Sequence[Candidate],
    settings: RewardSettings,
    *,
    is_written: bool = False,
) -> list[str | None]:
    """Return, of each candidate, why it is too long for a model that has to score it; None where it fits both.

    is_written: by the forward model, so that nobody can correct it: an answer that no model can take in has a problem, too, where
    a given one raises DataError.
    """

    def _problem(candidate: Candidate) -> str | None:
        pair, include_end = (prompt, candidate.text), settings.include_ends
        found = forward.score_problem(pair, include_end=include_end) if candidate.forward_logprob is None else None
        if found is None and candidate.text:
            found = reverse.score_problem(pair, include_end=include_end)
        if found is None and candidate.text and settings.language_model_weight:
            found = reverse.score_problem((candidate.text, ""))
        return found

    def _problem_of_written(candidate: Candidate) -> str | None:
        try:
            return _problem(candidate)
        except DataError as error:
            return str(error)

    return [_problem_of_written(candidate) if is_written else _problem(candidate) for candidate in candidates]


def score_questions(
    forward: Engine,
    reverse: Engine,
    questions: Sequence[tuple[str, Sequence[Candidate]]],
    settings: RewardSettings,
    problems: Sequence[Sequence[str | None]] | None = None,
) -> list[list[CandidateScore]]:
    """Score the candidates of several (prompt, candidates) together, in input order: the more at once, the fuller the batches.

    problems: of each candidate, why it is skipped, or None (`candidate_problems`); nothing is computed of a skipped one.
    """
    asked = [(prompt, candidate) for prompt, candidates in questions for candidate in candidates]
    skipped = [problem for row in problems for problem in row] if problems is not None else [None] * len(asked)
    wanted = [pair for pair, problem in zip(asked, skipped, strict=True) if problem is None]
    unscored = [(prompt, c.text) for prompt, c in wanted if c.forward_logprob is None]
    answered = [(prompt, c.text) for prompt, c in wanted if c.text]
    forward_scores = iter(forward.score(unscored, include_end=settings.include_ends))
    reverse_scores = iter(reverse.score(answered, include_end=settings.include_ends))
    alone = [(text, "") for _, text in answered] if settings.language_model_weight else []
    language_model_scores = iter(reverse.score(alone))
    scores = []
    for (prompt, candidate), problem in zip(asked, skipped, strict=True):
        if problem is not None:
            scores.append(CandidateScore(None, None, None, None, None, skipped=problem))
            continue
        forward_score = next(forward_scores) if candidate.forward_logprob is None else None
        reverse_score = next(reverse_scores) if candidate.text else None
        own_score = next(language_model_scores) if candidate.text and alone else None
        score = _joined(candidate, forward_score, reverse_score, own_score)
        scores.append(replace(score, reward=reward_of(score, prompt, candidate.text, settings)))
    rows = iter(scores)
    return [[next(rows) for _ in candidates] for _, candidates in questions]


def rank(rewards: list[float | None]) -> list[int]:
    """Indices, best first; equal rewards keep their order, -inf comes after all other numbers and None last.

    Raises DataError for NaN, which has no place in an order.
    """
    for index, reward in enumerate(rewards):
        if reward is not None and math.isnan(reward):
            raise DataError(
                f"the reward of candidate {index} is not a number, so nothing can be ranked; see that both models' weights are whole"
            )
    return sorted(range(len(rewards)), key=lambda i: (rewards[i] is None, -(rewards[i] or 0.0)))


def ranked_fields(candidates: Sequence[Candidate], scores: Sequence[CandidateScore], *, token_values: bool) -> dict[str, Any]:
    """Return what a reranking file says of scored candidates; "best" is None where there is none, or all were skipped."""
    ranking = rank([score.reward for score in scores])
    num_skipped = sum(score.skipped is not None for score in scores)
    return {
        "scores": [score.as_fields(token_values=token_values) for score in scores],
        "ranking": ranking,
        "best": candidates[ranking[0]].text if ranking and scores[ranking[0]].skipped is None else None,
        **({"num_skipped": num_skipped} if num_skipped else {}),
    }


def _weighted_sum(*terms: tuple[float, float]) -> float:
    """Return the sum of share * logprob. An answer that a model with a positive share finds impossible (-inf) stays so, whatever
    the other terms are; a term of share 0 is left out, so that 0 * -inf never is NaN."""
    if any(share > 0 and logprob == -math.inf for share, logprob in terms):
        return -math.inf
    return math.fsum(share * logprob for share, logprob in terms if share)


def _length(normalization: str, num_tokens: int, text: str) -> int:
    """Return the divisor of a side; a side without tokens sums to 0, whatever divides it."""
    if normalization == "byte":
        return max(1, len(text.encode("utf-8", "surrogatepass")))  # half of a surrogate pair counts 3 bytes
    return max(1, num_tokens) if normalization == "token" else 1


def _joined(
    candidate: Candidate, forward: SpanScore | None, reverse: SpanScore | None, own: SpanScore | None
) -> CandidateScore:
    return CandidateScore(
        forward_logprob=forward.logprob if forward else candidate.forward_logprob,
        reverse_logprob=reverse.logprob if reverse else None,
        forward_tokens=forward.num_tokens if forward else candidate.forward_tokens,
        reverse_tokens=reverse.num_tokens if reverse else 0,
        reward=None,
        language_model_logprob=own.logprob if own else None,
        forward_score=forward,
        reverse_score=reverse,
    )

"""Reverse Reward: rank answers of a forward model by how well a reverse model recovers the prompt from them.

The paper defines the reward of a candidate answer y to a prompt x, with a weight lambda in [0, 1], as

    R(x, y) = P_F(y|x)^(1-lambda) * P_R(x|y)^lambda          (LEDOM, arXiv 2507.01335, section "Reverse Reward")

P_F is the forward model, P_R the reverse model. This package computes the logarithm of R. The options n, mu and T are additions;
with n_F = n_R = T = 1 and mu = 0, the defaults, the reward is log R:

    reward = [ (1 - lambda) * log P_F(y|x) / n_F + lambda * log P_R(x|y) / n_R + mu * log P_R(y) ] / T

The terms:
- Each model's own tokenizer encodes `x + y` once, as one text; the separator between them is the end of x. A token that crosses
  the boundary belongs to y: the forward model scores it, the reverse model is given it. A dummy prefix belongs to x.
- log P_F(y|x) sums over the tokens of y, log P_R(x|y) over the tokens of x. The BOS that a stock tokenizer adds is first in
  model order and is never scored. `include_ends` adds eod to both: the answer ends after y, the text begins with x.
- n_F and n_R are 1, the number of scored tokens (without eod), or the number of UTF-8 bytes of y (n_F) and of x (n_R).
- log P_R(y) is the log-probability of the answer as a document of its own. If P_F and P_R were one joint distribution P, Bayes'
  rule would give log P_R(x|y) = log P(y|x) + log P(x) - log P(y). So, for one prompt, the reward with mu = 0 would rank as
  log P(y|x) - lambda log P(y). `weight=0` with a negative mu computes such a score directly.
- T divides the sum. It changes no ranking, only how much the best rewards outweigh others in a weighted majority vote.
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
    """Weights and divisors of the terms of the reward, defined at the top of this file."""

    weight: float = 0.5
    """lambda, the weight of the reverse model, in [0, 1]."""
    forward_normalization: str = "none"
    """n_F, the divisor of log P_F(y|x): none, token or byte."""
    reverse_normalization: str = "none"
    """n_R, the divisor of log P_R(x|y). It is nearly equal for all candidates of a prompt, so it scales lambda for each prompt."""
    language_model_weight: float = 0.0
    """mu, the weight of log P_R(y); negative values penalize generic answers. If not 0, it costs a reverse pass for each distinct answer."""
    temperature: float = 1.0
    """T, positive."""
    include_ends: bool = False
    """True: both log-probabilities include eod."""

    def __post_init__(self) -> None:
        """Raise UsageError for values outside their range."""
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
    """An answer in text order.

    forward_logprob: its log-probability in natural logs, if known from its sampling; else the forward model scores it.
    forward_tokens: the number of tokens of forward_logprob, needed only to divide by it.
    """

    text: str
    forward_logprob: float | None = None
    forward_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class CandidateScore:
    """The scores of a candidate: natural logs, summed over tokens, not normalized.

    An empty answer cannot condition the reverse model: its reverse_logprob and reward are None, and it ranks last. A skipped
    answer has the reason in `skipped`, no values, and also ranks last. An impossible answer has -inf. forward_tokens is None if
    forward_logprob was given without it, language_model_logprob is None if its term is off. Token values are in text order,
    without eod.
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

        JSON has no -inf: such a value is null, and its name is listed in "minus_infinity".
        """
        names = ("forward_logprob", "reverse_logprob", "forward_tokens", "reverse_tokens", "reward")
        values: dict[str, float | None] = {name: getattr(self, name) for name in names}
        if self.language_model_logprob is not None:
            values["language_model_logprob"] = self.language_model_logprob
        infinite = [name for name, value in values.items() if value == -math.inf]
        fields: dict[str, Any] = {name: or_null(value) for name, value in values.items()}
        if infinite:
            fields["minus_infinity"] = infinite
        if self.skipped is not None:
            fields["skipped"] = self.skipped
        if token_values:
            for side, score in (("forward", self.forward_score), ("reverse", self.reverse_score)):
                fields[f"{side}_token_ids"] = score.text_ids if score else None
                fields[f"{side}_token_logprobs"] = [or_null(value) for value in score.token_logprobs] if score else None
        return fields


def or_null(value: float | None) -> float | None:
    """Return None for -inf, which JSON lacks."""
    return None if value == -math.inf else value


def reverse_reward(forward_logprob: float, reverse_logprob: float, weight: float) -> float:
    """Return (1 - weight) * forward_logprob + weight * reverse_logprob, the log of the paper's R; 0 * -inf counts as 0."""
    return _weighted_sum((1 - weight, forward_logprob), (weight, reverse_logprob))


def reward_of(score: CandidateScore, prompt: str, answer: str, settings: RewardSettings) -> float | None:
    """Return the reward of known scores under the given settings; None without a reverse score.

    Also None if language_model_weight is negative and log P_R(y) is -inf, because the reward would be infinite. Raises DataError
    if the settings need a token count or a language-model term that the scores lack.
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
    """Return for each candidate the reason if it is too long for a model that must score it; None if it fits both models.

    is_written: the forward model wrote the candidates, so the user cannot correct them. Then an answer that cannot be encoded is
    also a problem; for a given candidate it raises DataError.
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
    """Score the candidates of several (prompt, candidates) together, so that batches are full; return scores in input order.

    problems: for each candidate the reason to skip it, or None (see `candidate_problems`). A skipped candidate is not scored.
    """
    pairs = [(prompt, candidate) for prompt, candidates in questions for candidate in candidates]
    skipped = [problem for row in problems for problem in row] if problems is not None else [None] * len(pairs)
    kept = [pair for pair, problem in zip(pairs, skipped, strict=True) if problem is None]
    unscored = [(prompt, c.text) for prompt, c in kept if c.forward_logprob is None]
    answered = [(prompt, c.text) for prompt, c in kept if c.text]
    alone = [(text, "") for _, text in answered] if settings.language_model_weight else []
    with (
        forward.scoring(unscored, include_end=settings.include_ends) as of_forward,
        reverse.scoring(answered, include_end=settings.include_ends) as of_reverse,
        reverse.scoring(alone) as of_language_model,
    ):
        forward_scores, reverse_scores, language_model_scores = map(iter, (of_forward(), of_reverse(), of_language_model()))
    scores = []
    for (prompt, candidate), problem in zip(pairs, skipped, strict=True):
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
    """Return the indices of the rewards, best first. Equal rewards keep their order, -inf is after all other numbers, None last.

    Raises DataError for NaN, which cannot be ordered.
    """
    for index, reward in enumerate(rewards):
        if reward is not None and math.isnan(reward):
            raise DataError(
                f"the reward of candidate {index} is not a number, so nothing can be ranked; check that both models' weights are complete"
            )
    return sorted(range(len(rewards)), key=lambda i: (rewards[i] is None, -(rewards[i] or 0.0)))


def ranked_fields(candidates: Sequence[Candidate], scores: Sequence[CandidateScore], *, token_values: bool) -> dict[str, Any]:
    """Return the fields of a reranking file for scored candidates; "best" is None without candidates, or if all were skipped."""
    ranking = rank([score.reward for score in scores])
    num_skipped = sum(score.skipped is not None for score in scores)
    return {
        "scores": [score.as_fields(token_values=token_values) for score in scores],
        "ranking": ranking,
        "best": candidates[ranking[0]].text if ranking and scores[ranking[0]].skipped is None else None,
        **({"num_skipped": num_skipped} if num_skipped else {}),
    }


def _weighted_sum(*terms: tuple[float, float]) -> float:
    """Return the sum of weight * logprob over (weight, logprob) terms.

    The sum is -inf if a term with a positive weight is -inf. A term with weight 0 is omitted, because 0 * -inf is NaN.
    """
    if any(weight > 0 and logprob == -math.inf for weight, logprob in terms):
        return -math.inf
    return math.fsum(weight * logprob for weight, logprob in terms if weight)


def _length(normalization: str, num_tokens: int, text: str) -> int:
    """Return n_F or n_R: the divisor of a log-probability, at least 1."""
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

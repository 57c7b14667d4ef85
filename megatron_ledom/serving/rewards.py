"""Scores and rewards of requests, computed by the library's own functions in the thread that owns the models."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_ledom.direction import Direction
from megatron_ledom.errors import DataError, UsageError
from megatron_ledom.inference.engines.engine import Engine
from megatron_ledom.inference.reverse_reward.input_lines import parse_candidate
from megatron_ledom.inference.reverse_reward.reward import (
    Candidate,
    CandidateScore,
    RewardSettings,
    candidate_problems,
    score_questions,
)
from megatron_ledom.inference.scoring import SpanScore
from megatron_ledom.serving.models import ServedModel, ServedModels
from megatron_ledom.serving.schemas import GivenCandidate, TextPair
from megatron_ledom.serving.work_queue import Job

NEEDS_FORWARD = "pass weight 1, or a forward_logprob for each candidate"
Question = tuple[str, list[Candidate]]


@dataclass(frozen=True, slots=True)
class RewardWork:
    """The questions of one request: prompts with their candidates. skip_too_long: a text that is too long gets no score."""

    questions: list[Question]
    skip_too_long: bool


def parse_candidates(given: Sequence[str | GivenCandidate]) -> list[Candidate]:
    """Return the candidates of a request, checked as those of a reranking file."""
    return [
        Candidate(one) if isinstance(one, str) else parse_candidate(one.model_dump(exclude_none=True), f"candidate {index}")
        for index, one in enumerate(given)
    ]


def reward_job(models: ServedModels, questions: list[Question], settings: RewardSettings, *, skip_too_long: bool) -> Job:
    """Return the job of a request for rewards; its result is a list of scores for each question."""
    lacks_forward = models.forward is None and any(c.forward_logprob is None for _, own in questions for c in own)
    if lacks_forward and settings.weight < 1:
        models.forward_or_refuse(NEEDS_FORWARD)
    num_rows = sum(len(own) for _, own in questions)
    work = RewardWork(questions, skip_too_long)
    return Job(("reward", settings), lambda works: _rewards(models, works, settings), work, num_rows, models.score_rows)


def _rewards(models: ServedModels, works: Sequence[RewardWork], settings: RewardSettings) -> list[list[list[CandidateScore]]]:
    """Return for each work, for each of its questions, the scores of its candidates."""
    reverse = models.reverse.engine
    forward: Engine = models.forward.engine if models.forward else reverse  # without a forward model nothing is left to score
    questions, problems = [], []
    for work in works:
        known = work.questions if models.forward else [(prompt, _all_known(own)) for prompt, own in work.questions]
        for prompt, own in known:
            questions.append((prompt, own))
            problems.append(_problems(forward, reverse, prompt, own, settings, work.skip_too_long))
    scored = score_questions(forward, reverse, questions, settings, problems)
    models.count_tokens()
    rows = iter(scored)
    found = [[next(rows) for _ in work.questions] for work in works]
    if models.forward:
        return found
    return [
        [_without_unknown(own, scores) for (_, own), scores in zip(work.questions, rows_of_work, strict=True)]
        for work, rows_of_work in zip(works, found, strict=True)
    ]


def _problems(
    forward: Engine, reverse: Engine, prompt: str, own: list[Candidate], settings: RewardSettings, skip: bool
) -> list[str | None]:
    problems = candidate_problems(forward, reverse, prompt, own, settings)
    first = next((f"candidate {i}: {problem}" for i, problem in enumerate(problems) if problem), None)
    if first is not None and not skip:
        raise DataError(f'{first}; shorten it, or send "too_long": "skip"')
    return problems


def _all_known(candidates: list[Candidate]) -> list[Candidate]:
    """Return candidates whose forward score is not needed, at weight 1, as if it were known."""
    return [c if c.forward_logprob is not None else replace(c, forward_logprob=0.0, forward_tokens=0) for c in candidates]


def _without_unknown(candidates: list[Candidate], scores: list[CandidateScore]) -> list[CandidateScore]:
    return [
        score if c.forward_logprob is not None else replace(score, forward_logprob=None, forward_tokens=None)
        for c, score in zip(candidates, scores, strict=True)
    ]


def score_job(model: ServedModel, models: ServedModels, pairs: Sequence[TextPair], *, include_ends: bool) -> Job:
    """Return the job of a request for log-probabilities by one model; its result is a score for each pair."""
    texts = [(pair.preceding, pair.following) for pair in pairs]

    def _compute(works: Sequence[list[tuple[str, str]]]) -> list[list[SpanScore]]:
        for work in works:
            for number, pair in enumerate(work):
                _check_pair(model, number, pair, include_ends)
        scores = iter(model.engine.score([pair for work in works for pair in work], include_end=include_ends))
        models.count_tokens()
        return [[next(scores) for _ in work] for work in works]

    return Job(("score", model.name, include_ends), _compute, texts, len(texts), models.score_rows)


def _check_pair(model: ServedModel, number: int, pair: tuple[str, str], include_ends: bool) -> None:
    if not any(pair):
        raise UsageError(f"pairs[{number}] has no text; give at least one character")
    if problem := model.engine.score_problem(pair, include_end=include_ends):
        raise DataError(f"pairs[{number}]: {problem}; shorten it")


def score_fields(model: ServedModel, score: SpanScore, pair: TextPair, *, token_values: bool) -> dict[str, Any]:
    """Return a score for a response. JSON has no -inf: such a value is null, and "minus_infinity" is true.

    token_offsets: the characters of each token within the pair's text, as positions of its first and after its last one.
    """
    fields: dict[str, Any] = {"logprob": or_null(score.logprob), "num_tokens": score.num_tokens}
    if score.logprob == -math.inf:
        fields["minus_infinity"] = True
    if score.eod_logprob is not None:
        fields["end_logprob"] = or_null(score.eod_logprob)
    if token_values:
        fields["tokens"] = [model.language_model.tokenizer.token_text(id_) for id_ in score.text_ids]
        fields["token_ids"] = score.text_ids
        fields["token_logprobs"] = [or_null(value) for value in score.token_logprobs]
        offsets = model.language_model.tokenizer.offsets(pair.preceding + pair.following)
        is_first = model.direction is Direction.REVERSE  # a reverse model scores the tokens that come first
        fields["token_offsets"] = offsets[: score.num_tokens] if is_first else offsets[len(offsets) - score.num_tokens :]
    return fields


def or_null(value: float | None) -> float | None:
    """Return None for -inf, which JSON lacks."""
    return None if value == -math.inf else value


def num_scored_tokens(scores: Sequence[CandidateScore]) -> int:
    """Return the number of tokens that both models scored."""
    return sum((score.forward_tokens or 0) + (score.reverse_tokens or 0) for score in scores)

"""Scores and rewards of requests, computed by the library's own functions in the thread that owns the models."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_ledom.direction import Direction
from megatron_ledom.errors import DataError, LedomError, UsageError
from megatron_ledom.inference.engines.engine import Engine
from megatron_ledom.inference.reverse_reward.input_lines import parse_candidate
from megatron_ledom.inference.reverse_reward.reward import (
    Candidate,
    CandidateScore,
    RewardSettings,
    candidate_problems,
    or_null,
    score_questions,
)
from megatron_ledom.inference.scoring import SpanScore
from megatron_ledom.serving.models import ServedModel, ServedModels
from megatron_ledom.serving.schemas import GivenCandidate, TextPair
from megatron_ledom.serving.work_queue import Job, Settle

NEEDS_FORWARD = "pass weight 1, or a forward_logprob for each candidate"
Question = tuple[str, list[Candidate]]


@dataclass(frozen=True, slots=True)
class LongTexts:
    """The treatment of texts that are too long: no score, or an error.

    place: the name of a candidate in errors, from the numbers of its question and of itself. remedy: how to ask for no score.
    """

    skip: bool
    place: Callable[[int, int], str]
    remedy: str = 'send "too_long": "skip"'


@dataclass(frozen=True, slots=True)
class Part:
    """Some candidates of a question: the number of the question in its request, that of the first candidate, prompt, candidates."""

    question: int
    first: int
    prompt: str
    candidates: list[Candidate]


@dataclass(frozen=True, slots=True)
class RewardWork:
    """The payload of a job for rewards."""

    parts: list[Part]
    long_texts: LongTexts


def parse_candidates(given: Sequence[str | GivenCandidate]) -> list[Candidate]:
    """Return the candidates of a request, checked as those of a reranking file."""
    return [
        Candidate(one) if isinstance(one, str) else parse_candidate(one.model_dump(exclude_none=True), f"candidate {index}")
        for index, one in enumerate(given)
    ]


def reward_jobs(models: ServedModels, questions: list[Question], settings: RewardSettings, long_texts: LongTexts) -> list[Job]:
    """Return the jobs of a request for rewards. A large request has several, between which others are computed.

    The result of a job is the scores of the candidates of each of its parts; `join_parts` joins them.
    """
    lacks_forward = models.forward is None and any(c.forward_logprob is None for _, own in questions for c in own)
    if lacks_forward and settings.weight < 1:
        models.forward_or_refuse(NEEDS_FORWARD)

    lane, shared_rows = models.lane("score", models.all), models.shared_rows(models.all)

    def _job(parts: list[Part]) -> Job:
        num_rows = sum(len(part.candidates) for part in parts)
        work = RewardWork(parts, long_texts)
        key = ("reward", settings)
        return Job(key, lambda works, settle: _score(models, works, settings, settle), work, num_rows, shared_rows, lane)

    return [_job(parts) for parts in divide(questions, models.score_rows)]


def divide(questions: list[Question], most: int) -> list[list[Part]]:
    """Return the candidates of questions in groups of at most `most`, in their order."""
    groups: list[list[Part]] = [[]]
    room = most
    for question, (prompt, candidates) in enumerate(questions):
        first = 0
        while first < len(candidates):
            if not room:
                groups.append([])
                room = most
            own = candidates[first : first + room]
            groups[-1].append(Part(question, first, prompt, own))
            first, room = first + len(own), room - len(own)
    return groups


def join_parts(num_questions: int, jobs: list[Job], results: list[list[list[CandidateScore]]]) -> list[list[CandidateScore]]:
    """Return the scores of each question from the results of its jobs."""
    scores: list[list[CandidateScore]] = [[] for _ in range(num_questions)]
    for job, rows in zip(jobs, results, strict=True):
        for part, row in zip(job.payload.parts, rows, strict=True):
            scores[part.question] += row
    return scores


def _score(models: ServedModels, works: Sequence[RewardWork], settings: RewardSettings, settle: Settle) -> None:
    """Score the candidates of all works together, and settle each work; one with a text that is too long fails alone."""
    reverse = models.reverse.engine
    forward: Engine = models.forward.engine if models.forward else reverse  # without a forward model nothing is left to score
    questions: list[Question] = []
    problems: list[list[str | None]] = []
    kept: list[tuple[int, RewardWork]] = []
    for number, work in enumerate(works):
        own = [(part.prompt, part.candidates if models.forward else _all_known(part.candidates)) for part in work.parts]
        try:
            found = [candidate_problems(forward, reverse, *question, settings) for question in own]
            _refuse(work, found)
        except LedomError as error:
            settle(number, error)
            continue
        questions += own
        problems += found
        kept.append((number, work))
    rows = iter(score_questions(forward, reverse, questions, settings, problems))
    models.count_tokens()
    for number, work in kept:
        scored = [next(rows) for _ in work.parts]
        if not models.forward:
            scored = [_without_unknown(part.candidates, row) for part, row in zip(work.parts, scored, strict=True)]
        settle(number, scored)


def _refuse(work: RewardWork, problems: list[list[str | None]]) -> None:
    """Raise DataError for the first text that is too long, unless such texts get no score."""
    for part, own in zip(work.parts, problems, strict=True):
        index = next((i for i, problem in enumerate(own) if problem), None)
        if index is not None and not work.long_texts.skip:
            place = work.long_texts.place(part.question, part.first + index)
            raise DataError(f"{place}: {own[index]}; shorten it, or {work.long_texts.remedy}")


def _all_known(candidates: list[Candidate]) -> list[Candidate]:
    """Return candidates whose forward score is not needed, at weight 1, as if it were known."""
    return [c if c.forward_logprob is not None else replace(c, forward_logprob=0.0, forward_tokens=0) for c in candidates]


def _without_unknown(candidates: list[Candidate], scores: list[CandidateScore]) -> list[CandidateScore]:
    return [
        score if c.forward_logprob is not None else replace(score, forward_logprob=None, forward_tokens=None)
        for c, score in zip(candidates, scores, strict=True)
    ]


@dataclass(frozen=True, slots=True)
class ScoreWork:
    """The payload of a job for log-probabilities: pairs, the number of the first in its request, and the wanted fields."""

    first: int
    pairs: list[TextPair]
    token_values: bool


def score_jobs(
    model: ServedModel, models: ServedModels, pairs: list[TextPair], *, include_ends: bool, token_values: bool
) -> list[Job]:
    """Return the jobs of a request for log-probabilities by one model; a result has the response's fields of each pair."""

    def _compute(works: Sequence[ScoreWork], settle: Settle) -> None:
        kept = []
        for number, work in enumerate(works):
            try:
                for index, pair in enumerate(work.pairs, work.first):
                    _check_pair(model, index, pair, include_ends)
                kept.append((number, work))
            except LedomError as error:
                settle(number, error)
        texts = [(pair.preceding, pair.following) for _, work in kept for pair in work.pairs]
        scores = iter(model.engine.score(texts, include_end=include_ends))
        models.count_tokens()
        for number, work in kept:
            settle(number, [score_fields(model, next(scores), pair, token_values=work.token_values) for pair in work.pairs])

    most = models.score_rows
    works = [ScoreWork(first, pairs[first : first + most], token_values) for first in range(0, len(pairs), most)]
    key = ("score", model.name, include_ends)
    lane, shared_rows = models.lane("score", [model]), models.shared_rows([model])
    return [Job(key, _compute, work, len(work.pairs), shared_rows, lane) for work in works]


def _check_pair(model: ServedModel, number: int, pair: TextPair, include_ends: bool) -> None:
    if not pair.preceding and not pair.following:
        raise UsageError(f"pairs[{number}] has no text; give at least one character")
    if problem := model.engine.score_problem((pair.preceding, pair.following), include_end=include_ends):
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
        fields["tokens"] = [model.rows.tokenizer.token_text(id_) for id_ in score.text_ids]
        fields["token_ids"] = score.text_ids
        fields["token_logprobs"] = [or_null(value) for value in score.token_logprobs]
        offsets = model.rows.tokenizer.offsets(pair.preceding + pair.following)
        is_first = model.direction is Direction.REVERSE  # a reverse model scores the tokens that come first
        fields["token_offsets"] = offsets[: score.num_tokens] if is_first else offsets[len(offsets) - score.num_tokens :]
    return fields


def num_scored_tokens(scores: Sequence[CandidateScore]) -> int:
    """Return the number of tokens that both models scored."""
    return sum((score.forward_tokens or 0) + (score.reverse_tokens or 0) for score in scores)

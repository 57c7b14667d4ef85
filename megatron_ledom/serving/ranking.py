"""The endpoints that score and rank texts: `/v1/score`, `/v1/reward`, the rerank endpoints and OpenRLHF's `/get_reward`."""

import secrets
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from pydantic import ConfigDict

from megatron_ledom.errors import DataError
from megatron_ledom.inference.reverse_reward.queries import answer_of
from megatron_ledom.inference.reverse_reward.reward import Candidate, CandidateScore, RewardSettings, or_null, ranked_fields
from megatron_ledom.serving.errors import RESPONSES, ApiError, JsonResponse, SafeRoute
from megatron_ledom.serving.models import ServedModels
from megatron_ledom.serving.rewards import (
    LongTexts,
    Question,
    join_parts,
    num_scored_tokens,
    parse_candidates,
    reward_jobs,
    score_jobs,
)
from megatron_ledom.serving.schemas import (
    MAX_ITEMS,
    Document,
    Finite,
    OpenRlhfRequest,
    RerankRequest,
    RewardOptions,
    RewardRequest,
    ScoreRequest,
)
from megatron_ledom.serving.settings import ServeSettings
from megatron_ledom.serving.waiting import results_of
from megatron_ledom.serving.work_queue import WorkQueue

LOWEST = -sys.float_info.max
"""The relevance of a document with the reward -inf, which JSON lacks."""
MISSING_REWARD = "?missing_reward=NUMBER to the address"


class OpenRlhfOptions(RewardOptions):
    """Options in the address of `/get_reward`, because OpenRLHF's body has no place for them."""

    model_config = ConfigDict(extra="forbid")
    missing_reward: Finite | None = None


def ranking_router(settings: ServeSettings, models: ServedModels, queue: WorkQueue) -> APIRouter:
    """Return the routes."""
    router = APIRouter(route_class=SafeRoute, responses=RESPONSES)

    async def rewards_of(
        questions: list[Question], options: RewardSettings, long_texts: LongTexts, request: Request
    ) -> list[list[CandidateScore]]:
        """Return the scores of each question's candidates, once the queue has computed all of them."""
        jobs = reward_jobs(models, questions, options, long_texts)
        results = await results_of(queue, jobs, request, settings.timeout_seconds)
        return join_parts(len(questions), jobs, results)

    @router.post("/v1/score")
    async def score(body: ScoreRequest, request: Request) -> Response:
        """Score pairs: log P(preceding | following) by the reverse model, log P(following | preceding) by the forward model."""
        chosen = models.all if body.model is None else [models.named_or_refuse(body.model)]
        results: list[dict[str, Any]] = [{} for _ in body.pairs]
        for model in chosen:
            jobs = score_jobs(model, models, body.pairs, include_ends=body.include_ends, token_values=body.token_values)
            parts = await results_of(queue, jobs, request, settings.timeout_seconds)
            for fields, found in zip(results, chain.from_iterable(parts), strict=True):
                fields[str(model.direction)] = found
        return JsonResponse({"object": "list", "models": [model.name for model in chosen], "data": results})

    @router.post("/v1/reward")
    async def reward(body: RewardRequest, request: Request) -> Response:
        """Rank candidates by Reverse Reward, with the scores of a reranking file."""
        questions = _questions(body)
        place = _candidate if body.items is None else _candidate_of_item
        scored = await rewards_of(questions, body.settings(), LongTexts(body.too_long == "skip", place), request)
        found = [
            _reward_fields(own, scores, token_values=body.token_values)
            for (_, own), scores in zip(questions, scored, strict=True)
        ]
        name = models.joined_name
        return JsonResponse({"model": name, **found[0]} if body.items is None else {"model": name, "items": found})

    async def rerank(body: RerankRequest, request: Request) -> Response:
        """Rank documents for a query; the relevance is the Reverse Reward, a logarithm, so it is usually negative."""
        documents = [one.text if isinstance(one, Document) else one for one in body.documents]
        question = (body.query + body.separator, [Candidate(text) for text in documents])
        long_texts = LongTexts(body.too_long == "skip", _document)
        (scores,) = await rewards_of([question], _rerank_settings(models, body), long_texts, request)
        return JsonResponse(_rerank_fields(models, body, documents, scores))

    for path in ("/rerank", "/v1/rerank", "/v2/rerank"):
        router.post(path)(rerank)

    @router.post("/get_reward")
    async def get_reward(body: OpenRlhfRequest, options: Annotated[OpenRlhfOptions, Query()], request: Request) -> Response:
        """Return the rewards of OpenRLHF's queries, each a prompt and its answer as one text."""
        questions = [(prompt, [Candidate(answer)]) for prompt, answer in _answers(models, body)]
        long_texts = LongTexts(options.missing_reward is not None, _query, f"add {MISSING_REWARD}")
        scored = await rewards_of(questions, options.settings(), long_texts, request)
        return JsonResponse(_open_rlhf_fields([scores[0] for scores in scored], options.missing_reward))

    return router


def _candidate(_: int, candidate: int) -> str:
    return f"candidate {candidate}"


def _candidate_of_item(item: int, candidate: int) -> str:
    return f"items[{item}].candidates[{candidate}]"


def _document(_: int, document: int) -> str:
    return f"documents[{document}]"


def _query(query: int, _: int) -> str:
    return f"the answer of query[{query}]"


def _questions(body: RewardRequest) -> list[tuple[str, list[Candidate]]]:
    """Return the prompts of a request with their candidates: its own, or those of `items`."""
    own = body.prompt is not None and body.candidates is not None
    given = [name for name in ("prompt", "candidates", "items") if getattr(body, name) is not None]
    if own == (body.items is not None) or (not own and given != ["items"]):
        raise ApiError(
            400,
            f"found {given or 'none'} of prompt, candidates and items; send prompt and candidates, or items alone",
            "prompt",
        )
    if body.items is None:
        return [(body.prompt or "", parse_candidates(body.candidates or []))]
    if sum(len(item.candidates) for item in body.items) > MAX_ITEMS:
        raise ApiError(400, f"the items have more than {MAX_ITEMS} candidates together; send fewer", "items")
    return [(item.prompt, parse_candidates(item.candidates)) for item in body.items]


def _reward_fields(candidates: list[Candidate], scores: list[CandidateScore], *, token_values: bool) -> dict[str, Any]:
    """Return the response for one prompt. JSON has no -inf: such a reward is null, and its result lists "minus_infinity"."""
    ranked = ranked_fields(candidates, scores, token_values=token_values)
    return {
        "rewards": [or_null(score.reward) for score in scores],
        "results": ranked.pop("scores"),
        "order": ranked.pop("ranking"),
        **ranked,
        "usage": _usage(scores),
    }


def _usage(scores: Sequence[CandidateScore]) -> dict[str, int]:
    num = num_scored_tokens(scores)
    return {"prompt_tokens": num, "total_tokens": num}


def _rerank_settings(models: ServedModels, body: RerankRequest) -> RewardSettings:
    names = ("forward_normalization", "reverse_normalization", "language_model_weight", "include_ends")
    settings = RewardSettings(**{name: getattr(body, name) for name in names})
    weight = body.weight if body.weight is not None else (settings.weight if models.forward else 1.0)
    return replace(settings, weight=weight)


def _rerank_fields(
    models: ServedModels, body: RerankRequest, documents: list[str], scores: list[CandidateScore]
) -> dict[str, Any]:
    """Return the response that clients of Jina, Cohere and vLLM read."""
    order = ranked_fields([Candidate(text) for text in documents], scores, token_values=False)["ranking"]
    results = []
    for index in order[: body.top_n or len(order)]:
        relevance = scores[index].reward
        result: dict[str, Any] = {"index": index, "relevance_score": LOWEST if or_null(relevance) is None else relevance}
        if body.return_documents is not False:
            result["document"] = {"text": documents[index]}
        results.append(result)
    return {
        "id": f"rerank-{secrets.token_hex(12)}",
        "model": models.joined_name,
        "results": results,
        "usage": _usage(scores),
    }


def _answers(models: ServedModels, body: OpenRlhfRequest) -> list[tuple[str, str]]:
    """Return prompt and answer of each query; special tokens of the served tokenizers at its end are removed."""
    if len(body.query) != len(body.prompts):
        raise ApiError(400, f"{len(body.query)} queries and {len(body.prompts)} prompts; send as many of each", "prompts")
    pairs = zip(body.query, body.prompts, strict=True)
    return [(prompt, answer_of(query, prompt, models.special_tokens)) for query, prompt in pairs]


def _open_rlhf_fields(scores: list[CandidateScore], missing: float | None) -> dict[str, Any]:
    """Return the response that OpenRLHF reads; an answer without a finite reward gets `missing`, in the logged values too."""
    rewards = []
    for number, score in enumerate(scores):
        value = or_null(score.reward)
        if value is None and missing is None:
            reason = score.skipped or "it is empty, or impossible for a model"
            raise DataError(f"the answer of query[{number}] has no finite reward ({reason}); add {MISSING_REWARD}")
        rewards.append(missing if value is None else value)
    logs = {}
    for name in ("forward_logprob", "reverse_logprob"):
        values = [or_null(getattr(score, name)) for score in scores]
        if values.count(None) < len(values) and (missing is not None or None not in values):
            logs[name] = [missing if value is None else value for value in values]
    return {"rewards": rewards, "scores": rewards, "extra_logs": logs}

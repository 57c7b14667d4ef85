"""Completions with `prompt` and `suffix`: the text between them, by both models of the server."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from threading import Event
from typing import Any

from megatron_ledom.errors import DataError
from megatron_ledom.inference.infilling.infiller import (
    DIRECTIONS,
    Filled,
    Gap,
    Infiller,
    Infilling,
    InfillModel,
    InfillSettings,
)
from megatron_ledom.serving.completions import check_fields, sampling_of, seed_of
from megatron_ledom.serving.errors import ApiError
from megatron_ledom.serving.models import ServedModel, ServedModels
from megatron_ledom.serving.schemas import MAX_CHOICES, CompletionRequest
from megatron_ledom.serving.work_queue import Job, Settle


@dataclass(frozen=True, slots=True)
class InfillWork:
    """The gaps of one request."""

    gaps: list[Gap]
    cancelled: Event


def asks_for_infilling(request: CompletionRequest) -> bool:
    """Return True if a request gives both the text that precedes and the text that follows."""
    return bool(request.prompt) and bool(request.suffix)


def gaps_of(models: ServedModels, request: CompletionRequest) -> list[Gap]:
    """Return the gaps of a request. Raises ApiError for wrong fields, and if the server has no forward model.

    Each model writes `best_of` texts, by default `n`. Numbers of gaps seed the random numbers, as in `ledom infill`.
    """
    if request.model is not None:
        models.named_or_refuse(request.model)
    if models.forward is None:
        remedy = "start it with --forward DIR, or send `suffix` alone"
        raise ApiError(
            400,
            f"prompt with suffix needs a forward and a reverse model, and this server has no forward model; {remedy}",
            "prompt",
        )
    num = request.n or 1
    num_samples = num if request.best_of is None else request.best_of
    check_fields(request, but=("best_of",))
    for name in ("stream", "logprobs"):
        if getattr(request, name) not in (None, False):
            raise ApiError(
                400, f"{name} is not supported with prompt and suffix, whose text is chosen as a whole; remove it", name
            )
    if not num <= num_samples <= MAX_CHOICES:
        raise ApiError(400, f"best_of={num_samples} must be from n={num} to {MAX_CHOICES}", "best_of")
    parts = [[text] if isinstance(text, str) else text or [] for text in (request.prompt, request.suffix)]
    if len(parts[0]) != len(parts[1]) or not all(map(all, parts)):
        found = f"{len(parts[0])} and {len(parts[1])} texts"
        raise ApiError(400, f"prompt and suffix have {found}; give as many of each, with at least one character", "suffix")
    if len(parts[0]) * num_samples > MAX_CHOICES:
        raise ApiError(
            400, f"{len(parts[0])} gaps with {num_samples} texts each are more than {MAX_CHOICES}; ask for fewer", "n"
        )
    settings, seed = InfillSettings(sampling=sampling_of(request, num_samples)), seed_of(request)
    return [Gap(prefix, suffix, f"{seed}/{index}", settings) for index, (prefix, suffix) in enumerate(zip(*parts, strict=True))]


def infill_job(models: ServedModels, gaps: list[Gap]) -> Job:
    """Return the job of a request; its result is a Filled for each gap."""
    cancelled, forward = Event(), models.forward_or_refuse("send `suffix` alone")
    used = [forward, models.reverse]
    return Job(
        ("write", *(model.name for model in used)),
        lambda works, settle: _fill(models, forward, works, settle),
        InfillWork(gaps, cancelled),
        sum(gap.settings.sampling.num_return_sequences for gap in gaps),
        min(model.shared_rows for model in used),
        models.lane("write", used),
        cancelled=cancelled,
    )


def _fill(models: ServedModels, forward: ServedModel, works: Sequence[InfillWork], settle: Settle) -> None:
    """Fill the gaps of several works together, and settle each."""
    infiller = Infiller(*(InfillModel(model.rows, model.engine) for model in (forward, models.reverse)))
    owners: list[tuple[int, Gap]] = []
    for number, work in enumerate(works):
        problem = next((found for gap in work.gaps if (found := infiller.problem(gap))), None)
        if problem is not None:
            settle(number, DataError(f"{problem}; shorten the texts or lower max_tokens"))
        else:
            owners += [(number, gap) for gap in work.gaps]
    filled_gaps = infiller.fill([gap for _, gap in owners], lambda index: not works[owners[index][0]].cancelled.is_set())
    models.count_tokens()
    by_work: list[list[Filled]] = [[] for _ in works]
    for (number, _), filled in zip(owners, filled_gaps, strict=True):
        by_work[number].append(filled)
        for direction in DIRECTIONS:
            models.count_written(direction, [filled.read[direction]], [filled.written[direction]])
    for number in dict(owners):
        settle(number, by_work[number])


def infill_fields(request: CompletionRequest, gaps: Sequence[Gap], found: Sequence[Filled]) -> dict[str, Any]:
    """Return choices and usage of the response: of each gap the best `n` different texts, or fewer if there are fewer.

    The text of rank k of gap g has the index g * n + k, so that a client finds the gap of each.
    """
    most = request.n or 1
    texts = [
        (number * most + rank, gap, one)
        for number, (gap, filled) in enumerate(zip(gaps, found, strict=True))
        for rank, one in enumerate(islice(_different(filled), most))
    ]
    read, written = (sum(sum(getattr(filled, name).values()) for filled in found) for name in ("read", "written"))
    return {
        "choices": [_choice(index, gap, one, request) for index, gap, one in texts],
        "usage": {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written},
    }


def _different(filled: Filled) -> Iterator[Infilling]:
    known = set[str]()
    for one in filled.infillings:
        if one.middle not in known:
            known.add(one.middle)
            yield one


def _choice(index: int, gap: Gap, one: Infilling, request: CompletionRequest) -> dict[str, Any]:
    fields = one.as_fields()
    del fields["middle"], fields["finished"]
    text = f"{gap.prefix}{one.middle}{gap.suffix}" if request.echo else one.middle
    reason = "stop" if one.finished else "length"
    return {"index": index, "text": text, "logprobs": None, "finish_reason": reason, **fields}

"""Completions: texts that a model continues, for several requests in one batch, whole or as a stream."""

import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from threading import Event
from typing import Any

from megatron_ledom.direction import Direction
from megatron_ledom.errors import DataError
from megatron_ledom.inference.generation import Generation, Sampling
from megatron_ledom.inference.growing_text import GrowingText
from megatron_ledom.inference.row_generation import RowRequest, RowResult, WrittenToken, row_problem, written_part
from megatron_ledom.serving.errors import ApiError
from megatron_ledom.serving.models import ServedModel, ServedModels
from megatron_ledom.serving.schemas import MAX_CHOICES, CompletionRequest
from megatron_ledom.serving.work_queue import Job, Settle

FIELD_OF = {Direction.REVERSE: "suffix", Direction.FORWARD: "prompt"}
"""The field of a request that gives the text, for a model's direction."""
UNUSED = {"best_of": 1, "frequency_penalty": 0, "presence_penalty": 0, "logit_bias": {}}
"""OpenAI's fields that are not supported, with the value that changes nothing."""
OnPiece = Callable[[int, str], None]
"""Gets the index of a choice and the next piece of its text, in the thread that owns the models."""


@dataclass(frozen=True, slots=True)
class CompletionWork:
    """The rows of one request: its texts, each with its choices. growing: the shown text of each row, for a stream."""

    rows: list[RowRequest]
    cancelled: Event
    on_piece: OnPiece | None = None
    growing: list[GrowingText] = field(default_factory=list)


def chosen_model(models: ServedModels, request: CompletionRequest) -> tuple[ServedModel, list[str]]:
    """Return the model of a request and its texts; refuse a field that the model's direction does not use."""
    if request.model is None:
        model = models.forward if request.prompt and not request.suffix and models.forward else models.reverse
    else:
        model = models.named_or_refuse(request.model)
    mine = FIELD_OF[model.direction]
    other = "prompt" if mine == "suffix" else "suffix"
    if getattr(request, other):
        place = {"suffix": "the text that follows", "prompt": "the text that precedes"}[mine]
        raise ApiError(400, f"{model.name} is a {model.direction} model, so it takes `{mine}` ({place}), not `{other}`", other)
    given = getattr(request, mine)
    texts = [given] if isinstance(given, str) else given or []
    if not texts or not all(texts):
        raise ApiError(
            400, f"{model.name} is a {model.direction} model: give the text in `{mine}`, at least one character", mine
        )
    return model, texts


def rows_of(request: CompletionRequest, texts: list[str]) -> list[RowRequest]:
    """Return a row for each choice of each text. Row numbers seed the random numbers, as `Engine.sample` does it."""
    check_fields(request)
    if request.echo and request.logprobs is not None:
        raise ApiError(400, "echo with logprobs is not supported; POST /v1/score gives the log-probabilities of a text", "echo")
    if request.stream and request.logprobs is not None:
        raise ApiError(400, "logprobs are not part of a stream; send one of the two", "logprobs")
    num = request.n or 1
    if len(texts) * num > MAX_CHOICES:
        raise ApiError(400, f"{len(texts)} texts with n={num} are more than {MAX_CHOICES} choices; ask for fewer", "n")
    sampling, seed = replace(sampling_of(request, num), num_return_sequences=1), seed_of(request)
    return [
        RowRequest(text, sampling, f"{seed}/{index}/{number}", request.logprobs or 0, is_shown=bool(request.stream))
        for index, text in enumerate(texts)
        for number in range(num)
    ]


def check_fields(request: CompletionRequest, but: Sequence[str] = ()) -> None:
    """Raise ApiError for a field of UNUSED with another value than its neutral one. but: fields that are used."""
    for name, neutral in UNUSED.items():
        if name not in but and getattr(request, name) not in (None, neutral):
            raise ApiError(400, f"{name} is not supported; remove it", name)


def sampling_of(request: CompletionRequest, num: int) -> Sampling:
    """Return the settings of `num` texts. Raises ApiError for several texts at temperature 0."""
    temperature = 1.0 if request.temperature is None else request.temperature
    if num > 1 and temperature == 0:
        raise ApiError(400, f"n={num} choices at temperature 0 would all be the same; set a temperature above 0", "n")
    return Sampling(
        max_new_tokens=request.max_tokens or 16,
        temperature=temperature,
        top_p=request.top_p or 1.0,
        num_return_sequences=num,
        stop_strings=[request.stop] if isinstance(request.stop, str) else request.stop or [],
    )


def seed_of(request: CompletionRequest) -> str:
    """Return the seed of a request; without one, a random one."""
    return secrets.token_hex(8) if request.seed is None else str(request.seed)


def completion_job(models: ServedModels, model: ServedModel, rows: list[RowRequest], on_piece: OnPiece | None = None) -> Job:
    """Return the job of a request for completions; its result is a RowResult for each row."""
    cancelled = Event()
    growing = [_growing(model, row) for row in rows] if on_piece else []
    work = CompletionWork(rows, cancelled, on_piece, growing)
    return Job(
        ("write", model.name),
        lambda works, settle: _Writing(models, model, works, settle).run(),
        work,
        len(rows),
        model.shared_rows,
        models.lane("write", [model]),
        cancelled=cancelled,
    )


def _growing(model: ServedModel, row: RowRequest) -> GrowingText:
    tokenizer = model.rows.tokenizer
    if tokenizer.surfaces is None:
        raise ApiError(400, f"the tokenizer of {model.name} gives text only as a whole, so it cannot be streamed", "stream")
    return GrowingText(model.direction, row.sampling.stop_strings, may_begin_with_prefix=tokenizer.has_dummy_prefix)


class _Writing:
    """The rows of several works in common batches. A work is settled when its last row is done, though others still grow."""

    def __init__(self, models: ServedModels, model: ServedModel, works: Sequence[CompletionWork], settle: Settle) -> None:
        self._models, self._model, self._works, self._settle = models, model, works, settle
        self._results: list[list[RowResult | None]] = [[None] * len(work.rows) for work in works]

    def run(self) -> None:
        """Write all rows; a row of a cancelled work ends at its next step."""
        model, owners = self._model.rows, []
        for number, work in enumerate(self._works):
            of_each_text = {row.text: row for row in work.rows}.values()
            problem = next((found for row in of_each_text if (found := row_problem(model, row))), None)
            if problem is not None:
                self._settle(number, DataError(f"{problem}; shorten the text or lower max_tokens"))
            else:
                owners += [(number, place) for place in range(len(work.rows))]
        rows = [self._works[number].rows[place] for number, place in owners]

        def _on_step(index: int, read: Callable[[], Generation]) -> bool:
            return self._show(*owners[index], read)

        def _is_wanted(index: int) -> bool:
            return not self._works[owners[index][0]].cancelled.is_set()

        model.write_rows(rows, _on_step, lambda index, result: self._end(*owners[index], result), _is_wanted)

    def _show(self, number: int, place: int, read: Callable[[], Generation]) -> bool:
        """Give the next piece of a row to a stream; return False if nobody wants the row any more."""
        work = self._works[number]
        if work.on_piece is not None and not work.cancelled.is_set():
            generation = read()
            if not generation.stopped and generation.stop_string is None:
                self._give_piece(number, place, work.growing[place].grow, generation)
        return not work.cancelled.is_set()

    def _end(self, number: int, place: int, result: RowResult) -> None:
        """Keep the first result of a row, and settle its work after the last one.

        A row may end twice: at its last token, and if its work is settled while the rest of an upstream's answer is read.
        """
        work, results = self._works[number], self._results[number]
        if results[place] is not None:
            return
        self._models.count_written(self._model.direction, [result.num_given], [result.num_new])
        if work.on_piece is not None and not work.cancelled.is_set():
            self._give_piece(number, place, work.growing[place].finish, result.generation)
        results[place] = result
        if None not in results:
            self._settle(number, results)

    def _give_piece(self, number: int, place: int, next_piece: Callable[[str], str], generation: Generation) -> None:
        """Give a piece to a stream; text that changes fails its own work alone."""
        work = self._works[number]
        try:
            piece = next_piece(written_part(generation, self._model.direction))
        except DataError as error:
            work.cancelled.set()
            self._settle(number, error)
            return
        if piece and work.on_piece is not None:
            work.on_piece(place, piece)


def finish_reason(result: RowResult) -> str:
    """Return `stop` for a text that eod or a stop string ended, `length` for one that the limit ended."""
    return "stop" if result.generation.stopped or result.generation.stop_string is not None else "length"


def choice_fields(model: ServedModel, index: int, result: RowResult, request: CompletionRequest) -> dict[str, Any]:
    """Return a choice of the response."""
    text = result.generation.text if request.echo else written_part(result.generation, model.direction)
    return {
        "index": index,
        "text": text,
        "logprobs": _logprobs(result.tokens, request.logprobs) if request.logprobs is not None else None,
        "finish_reason": finish_reason(result),
    }


def _logprobs(tokens: list[WrittenToken], num_likeliest: int) -> dict[str, Any]:
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [_by_text(token) for token in tokens] if num_likeliest else None,
        "text_offset": [token.offset for token in tokens],
    }


def _by_text(token: WrittenToken) -> dict[str, float]:
    """Return the likeliest tokens and the chosen one; of tokens with equal characters, the likeliest."""
    found: dict[str, float] = {}
    for text, logprob in [*token.likeliest, (token.text, token.logprob)]:
        found.setdefault(text, max(logprob, -1e30))
    return found


def usage_fields(results: Sequence[RowResult], num_choices: int) -> dict[str, int]:
    """Return the tokens of a response. A text is read once for all of its choices."""
    read = sum(result.num_given for result in results[::num_choices])
    written = sum(result.num_new for result in results)
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


def envelope(model_name: str) -> dict[str, Any]:
    """Return the fields that the response, or all events of a stream, share."""
    return {
        "id": f"cmpl-{secrets.token_hex(12)}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": model_name,
    }

"""Server-sent events of a completion that grows.

A piece of a reverse model's text stands before all earlier pieces of its choice, so a client puts each piece in front.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request

from megatron_ledom.direction import Direction
from megatron_ledom.inference.row_generation import RowRequest
from megatron_ledom.serving.completions import completion_job, envelope, finish_reason, usage_fields
from megatron_ledom.serving.errors import ApiError, error_body
from megatron_ledom.serving.models import ServedModel, ServedModels
from megatron_ledom.serving.schemas import CompletionRequest
from megatron_ledom.serving.waiting import timed_out, until_gone
from megatron_ledom.serving.work_queue import Job, WorkQueue

Piece = tuple[int, str]


class CompletionStream:
    """The events of one request. The job is in the queue when the object is made, so a full queue still gives 429."""

    def __init__(
        self,
        queue: WorkQueue,
        models: ServedModels,
        model: ServedModel,
        rows: list[RowRequest],
        request: CompletionRequest,
        timeout_seconds: float,
    ) -> None:
        self._queue, self._model, self._rows, self._request = queue, model, rows, request
        self._timeout, self._deadline = timeout_seconds, time.monotonic() + timeout_seconds
        self._first: Piece | None = None
        self._pieces: asyncio.Queue[Piece | None] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def on_piece(index: int, text: str) -> None:
            loop.call_soon_threadsafe(self._pieces.put_nowait, (index, text))

        self._job: Job = completion_job(models, model, rows, on_piece)
        self._envelope = envelope(model.name)
        queue.submit(self._job)
        self._job.future.add_done_callback(lambda _: loop.call_soon_threadsafe(self._pieces.put_nowait, None))

    async def start(self, request: Request) -> None:
        """Wait for the first piece, so that an error before it is a response of its own and not an event."""
        try:
            self._first = await until_gone(self._next(), request)
            if self._first is None and (error := self._job.future.exception()) is not None:
                raise error
        except BaseException:
            self._queue.cancel(self._job)
            raise

    async def events(self) -> AsyncIterator[bytes]:
        """Yield the events; free the place of the request when the client is gone or the time is over."""
        try:
            if self._request.echo:
                for index, row in enumerate(self._rows):
                    yield self._event([self._choice(index, row.text, None)])
            piece = self._first
            while piece is not None:
                yield self._event([self._choice(*piece, None)])
                piece = await self._next()
            for event in self._last_events():
                yield event
        except ApiError as error:  # the time is over
            yield _encoded(error_body(error)[1])
        finally:
            self._queue.cancel(self._job)
        yield b"data: [DONE]\n\n"

    async def _next(self) -> Piece | None:
        """Return the next piece; None after the last one."""
        try:
            return await asyncio.wait_for(self._pieces.get(), max(0.0, self._deadline - time.monotonic()))
        except TimeoutError:
            raise timed_out(self._timeout) from None

    def _last_events(self) -> list[bytes]:
        error = self._job.future.exception()
        if isinstance(error, Exception):
            return [_encoded(error_body(error)[1])]
        results = self._job.future.result()
        events = [self._event([self._choice(index, "", finish_reason(result))]) for index, result in enumerate(results)]
        options = self._request.stream_options
        if options is not None and options.include_usage:
            events.append(self._event([], usage=usage_fields(results, self._request.n or 1)))
        return events

    def _choice(self, index: int, text: str, reason: str | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": None, "finish_reason": reason}

    def _event(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        place = "before" if self._model.direction is Direction.REVERSE else "after"
        return _encoded({**self._envelope, "choices": choices, "text_stands": place, **more})


def _encoded(content: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(content, allow_nan=False)}\n\n".encode("ascii")

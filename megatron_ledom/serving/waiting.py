"""Wait for jobs of the thread: until their results, a time-out, or the client's disconnection."""

import asyncio
from collections.abc import Awaitable, Sequence
from typing import Any, TypeVar

from fastapi import Request

from megatron_ledom.serving.errors import ApiError
from megatron_ledom.serving.work_queue import Job, WorkQueue

Result = TypeVar("Result")
CLIENT_CLOSED = 499
"""Status, in metrics and log only, of a request whose client did not wait."""


async def results_of(queue: WorkQueue, jobs: Sequence[Job], request: Request, timeout_seconds: float) -> list[Any]:
    """Return the results of the jobs of a request; free their places if the client is gone, the time is over, or one fails."""
    try:
        for job in jobs:
            queue.submit(job)
        together = asyncio.gather(*(asyncio.wrap_future(job.future) for job in jobs))
        return await until_gone(asyncio.wait_for(together, timeout_seconds), request)
    except TimeoutError:
        raise timed_out(timeout_seconds) from None
    finally:
        for job in jobs:
            queue.cancel(job)


async def until_gone(awaitable: Awaitable[Result], request: Request) -> Result:
    """Return the result of an awaitable; raise ApiError if the client closes the connection before."""
    result = asyncio.ensure_future(awaitable)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({result, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not result.done():
            raise ApiError(CLIENT_CLOSED, "the client closed the connection")
        return result.result()
    finally:
        gone.cancel()
        result.cancel()


def timed_out(timeout_seconds: float) -> ApiError:
    """Return the error for a request without a result in time."""
    return ApiError(504, f"no result within {timeout_seconds:g} seconds; ask for less, or send it again later", code="timeout")


async def _disconnected(request: Request) -> None:
    """Return when the client closes the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass

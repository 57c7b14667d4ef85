"""The endpoints of the server."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import StreamingResponse

from megatron_ledom import __version__
from megatron_ledom.serving.completions import (
    choice_fields,
    chosen_model,
    completion_job,
    envelope,
    rows_of,
    usage_fields,
)
from megatron_ledom.serving.errors import RESPONSES, JsonResponse, SafeRoute, add_error_handlers
from megatron_ledom.serving.infilling import asks_for_infilling, gaps_of, infill_fields, infill_job
from megatron_ledom.serving.metrics import Metrics
from megatron_ledom.serving.middleware import Application, Gate
from megatron_ledom.serving.models import ServedModels
from megatron_ledom.serving.page_files import page_router, read_page
from megatron_ledom.serving.ranking import ranking_router
from megatron_ledom.serving.schemas import CompletionRequest
from megatron_ledom.serving.settings import ServeSettings
from megatron_ledom.serving.stream import CompletionStream
from megatron_ledom.serving.waiting import results_of
from megatron_ledom.serving.work_queue import WorkQueue


def build_app(settings: ServeSettings, models: ServedModels, metrics: Metrics) -> Application:
    """Return the application, whose lifespan starts and ends the threads that use the models."""
    queue = WorkQueue(
        max_jobs=settings.max_queue,
        window_seconds=settings.batch_window_seconds,
        metrics=metrics,
        num_threads=models.num_threads,
    )

    @asynccontextmanager
    async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
        queue.start()
        yield
        await asyncio.to_thread(queue.end)

    app = FastAPI(
        title="ledom serve",
        version=__version__,
        lifespan=_lifespan,
        docs_url=None,  # its page loads scripts from elsewhere
        redoc_url=None,
    )
    app.include_router(_state_router(models, metrics, queue))
    app.include_router(_completion_router(settings, models, queue))
    app.include_router(ranking_router(settings, models, queue))
    page = read_page()
    app.include_router(page_router(page))
    add_error_handlers(app)
    paths = {route.path for route in app.routes if hasattr(route, "path")} | set(app.openapi()["paths"])
    gate = Gate(app, settings, metrics, paths | set(page), open_paths={"/health", *page})
    if not settings.cors_origins:
        return gate
    return CORSMiddleware(  # outermost, so that a page can read the errors of Gate too
        gate,
        allow_origins=list(settings.cors_origins),
        allow_methods=["GET", "POST"],
        allow_headers=["Authorization", "Content-Type"],
    )


def _state_router(models: ServedModels, metrics: Metrics, queue: WorkQueue) -> APIRouter:
    router = APIRouter(route_class=SafeRoute)

    @router.get("/health")
    async def health() -> Response:
        """Return 200 while the server accepts requests, 503 while it ends."""
        ready = queue.is_ready
        return JsonResponse({"status": "ready" if ready else "ending"}, status_code=200 if ready else 503)

    @router.get("/metrics")
    async def prometheus() -> Response:
        """Return the metrics in the text format of Prometheus."""
        return Response(metrics.as_text(), media_type="text/plain; version=0.0.4")

    @router.get("/v1/models")
    async def list_models() -> Response:
        """Return the served models with direction, context and hash of the tokenizer."""
        return JsonResponse({"object": "list", "data": [model.as_fields() for model in models.all]})

    return router


def _completion_router(settings: ServeSettings, models: ServedModels, queue: WorkQueue) -> APIRouter:
    router = APIRouter(route_class=SafeRoute, responses=RESPONSES)

    @router.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue texts: before `suffix` with a reverse model, after `prompt` with a forward model, between both with both."""
        if asks_for_infilling(body):
            gaps = gaps_of(models, body)
            (filled,) = await results_of(queue, [infill_job(models, gaps)], request, settings.timeout_seconds)
            return JsonResponse({**envelope(models.joined_name), **infill_fields(body, gaps, filled)})
        model, texts = chosen_model(models, body)
        rows = rows_of(body, texts)
        if body.stream:
            stream = CompletionStream(queue, models, model, rows, body, settings.timeout_seconds)
            await stream.start(request)
            return StreamingResponse(stream.events(), media_type="text/event-stream")
        (results,) = await results_of(queue, [completion_job(models, model, rows)], request, settings.timeout_seconds)
        fields: dict[str, Any] = {
            **envelope(model.name),
            "choices": [choice_fields(model, index, result, body) for index, result in enumerate(results)],
            "usage": usage_fields(results, body.n or 1),
        }
        return JsonResponse(fields)

    return router

"""Errors of the server in OpenAI's form: {"error": {"message", "type", "param", "code"}}; no response contains a traceback."""

import json
import logging
import re
import traceback
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from megatron_ledom.errors import LedomError, NotFiniteError, RemoteAnswerError, TransientError
from megatron_ledom.serving.models import UnknownModel
from megatron_ledom.serving.work_queue import Ending, QueueFull

log = logging.getLogger(__name__)
RETRY_SECONDS = 1
TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
ADDRESS = re.compile(r"https?://[^\s'\"]+")
SHOWN_CHARACTERS = 500
"""Longest message of one wrong field."""


class ErrorDetail(BaseModel):
    """The error of a request, with the remedy."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """The body of every response that is not 200."""

    error: ErrorDetail


RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": text}
    for status, text in {
        400: "the request is wrong",
        401: "the API key is missing or wrong",
        404: "the model is not served here",
        408: "the body came too slowly",
        413: "the body is too large",
        429: "too many requests wait",
        500: "the model gave no finite number",
        502: "the upstream server gave an answer that cannot be used",
        503: "the server is shutting down, or its upstream server does not answer",
        504: "no result in time",
    }.items()
}
"""Responses of every endpoint, for its OpenAPI schema; 422, FastAPI's own status, never occurs."""


class ApiError(Exception):
    """An error with its HTTP status. param: the field of the request that is wrong."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code


class JsonResponse(Response):
    """A JSON response in ASCII, which also represents half of a surrogate pair."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """Return the JSON of the content; raises ValueError for NaN and infinity, which JSON lacks."""
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode("ascii")


def error_body(error: Exception) -> tuple[int, dict[str, Any]]:
    """Return the status and the body for an error. Messages of unforeseen errors are not sent."""
    status, message, param, code = _parts(error)
    kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return status, {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _parts(error: Exception) -> tuple[int, str, str | None, str | None]:
    if isinstance(error, ApiError):
        return error.status, error.message, error.param, error.code
    if isinstance(error, QueueFull):
        return 429, str(error), None, "queue_full"
    if isinstance(error, Ending):
        return 503, str(error), None, "shutting_down"
    if isinstance(error, RequestValidationError):
        return 400, *_validation_parts(error)
    if isinstance(error, HTTPException):
        return error.status_code, str(error.detail), None, None
    if isinstance(error, UnknownModel):
        return 404, str(error), "model", "model_not_found"
    if isinstance(error, NotFiniteError):  # the message names a text
        return 500, "the model gives values that are not finite (NaN or infinity); check its weights", None, "not_finite"
    if isinstance(error, RemoteAnswerError):
        return 502, _without_addresses(error), None, "upstream_refused"
    if isinstance(error, TransientError):
        return 503, _without_addresses(error), None, "upstream_unavailable"
    if isinstance(error, LedomError):
        return 400, str(error), None, None
    log_unforeseen(error)
    return 500, "an unforeseen error of the server; its log names the place", None, "internal_error"


def _without_addresses(error: Exception) -> str:
    """Return a message about an upstream server without its address, which is of no use to clients."""
    return ADDRESS.sub("the upstream server", str(error))


def _validation_parts(error: RequestValidationError) -> tuple[str, str | None, None]:
    found = error.errors()[0]
    place = [str(part) for part in found["loc"] if part not in ("body", "query")]
    param = ".".join(place) or None
    message = str(found["msg"])[:SHOWN_CHARACTERS]
    more = f" (and {len(error.errors()) - 1} more)" if len(error.errors()) > 1 else ""
    return f"{param or 'the body'}: {message}{more}", param, None


def log_unforeseen(error: BaseException) -> None:
    """Log the type of an error and the places in the code, without its message, which may contain text of a request."""
    places = "".join(traceback.format_tb(error.__traceback__))
    log.error("unforeseen %s at:\n%s", type(error).__name__, places.rstrip())


def error_response(error: Exception) -> JsonResponse:
    """Return the response for an error."""
    status, body = error_body(error)
    headers = {"Retry-After": str(RETRY_SECONDS)} if status in (429, 503) else {}
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, HTTPException) and error.headers:
        headers |= dict(error.headers)
    return JsonResponse(body, status_code=status, headers=headers)


def add_error_handlers(app: FastAPI) -> None:
    """Let an app answer in OpenAI's form for unknown paths and methods, too; `SafeRoute` does it for errors of its endpoints."""

    async def handle(request: Request, error: Exception) -> Response:
        return error_response(error)

    app.add_exception_handler(HTTPException, handle)


class SafeRoute(APIRoute):
    """A route whose every error becomes a response in OpenAI's form, and never a traceback in the log of the web server."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the handler of the route."""
        handler = super().get_route_handler()

        async def _safe(request: Request) -> Response:
            try:
                return await handler(request)
            except Exception as error:
                return error_response(error)

        return _safe

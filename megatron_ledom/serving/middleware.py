"""The steps before every endpoint: the API key, the limit of the body, metrics and the log."""

import asyncio
import hmac
import logging
import time
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

from megatron_ledom.errors import visible
from megatron_ledom.serving.errors import ApiError, error_response
from megatron_ledom.serving.host_names import other_name
from megatron_ledom.serving.metrics import Metrics
from megatron_ledom.serving.settings import ServeSettings

log = logging.getLogger(__name__)
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Message, Receive, Send], Awaitable[None]]
UNKNOWN = "(unknown)"
SHOWN_BYTES = 2000
"""Longest part of a body in the log, with `log_text`."""


class Gate:
    """An ASGI application around another: refuses requests without the key or with a large body, and measures the others.

    open_paths: those that need no API key.
    """

    def __init__(
        self, app: Application, settings: ServeSettings, metrics: Metrics, paths: set[str], open_paths: set[str]
    ) -> None:
        self._app, self._settings, self._metrics, self._paths = app, settings, metrics, paths
        self._open_paths = open_paths
        self._num_open, self._most_open = 0, 2 * settings.max_queue + settings.batch_size

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status = time.monotonic(), 499

        async def _noting_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            self._check_host(scope)
            self._check_key(scope)
            with self._place(scope):
                body = await self._body(scope, receive)
                self._log_body(scope, body)
                await self._app(scope, _replaying(body, receive), _noting_send)
        except ApiError as error:
            await error_response(error)(scope, receive, _noting_send)
        finally:
            self._note(scope, status, time.monotonic() - start)

    @contextmanager
    def _place(self, scope: Message) -> Iterator[None]:
        """Count a request with a body; refuse one above the limit, because the bodies of all are in memory."""
        has_body = scope["method"] == "POST"
        if has_body and self._num_open >= self._most_open:
            raise ApiError(429, f"{self._num_open} requests are open already; send this one again later", code="queue_full")
        self._num_open += has_body
        try:
            yield
        finally:
            self._num_open -= has_body

    def _check_host(self, scope: Message) -> None:
        """Refuse other names of a server that only this machine reaches, without a key: a web page can give its own name this address."""
        if self._settings.api_key is not None:
            return
        given = other_name(scope, self._settings.host)
        if given is not None:
            raise ApiError(
                400, f"this server answers to localhost, found the host {given}; use --api-key if another name is right"
            )

    def _check_key(self, scope: Message) -> None:
        expected = self._settings.api_key
        if expected is None or scope["path"] in self._open_paths or scope["method"] == "OPTIONS":
            return
        headers = [value for name, value in scope["headers"] if name == b"authorization"]
        given = headers[0] if headers else b""
        if not hmac.compare_digest(given, b"Bearer " + expected.encode()):
            found = "a wrong one" if given else "none"
            raise ApiError(
                401, f"this server needs an API key, found {found}; send `Authorization: Bearer KEY`", code="invalid_api_key"
            )

    async def _body(self, scope: Message, receive: Receive) -> bytes:
        """Return the whole body; refuse one that is too large, or that comes too slowly."""
        limit = self._settings.max_body_bytes
        length = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if length.isdigit() and int(length[:20]) > limit:
            raise _too_large(limit)
        try:
            async with asyncio.timeout(self._settings.timeout_seconds):
                return await _read(receive, limit)
        except TimeoutError:
            raise ApiError(
                408, f"the body did not come within {self._settings.timeout_seconds:g} seconds; send it again"
            ) from None

    def _log_body(self, scope: Message, body: bytes) -> None:
        if self._settings.log_text and body:
            log.info("%s %s", self._path(scope), visible(body[:SHOWN_BYTES].decode("utf-8", "replace")))

    def _path(self, scope: Message) -> str:
        """Return the path if it is one of the server's; others could contain anything."""
        return scope["path"] if scope["path"] in self._paths else UNKNOWN

    def _note(self, scope: Message, status: int, seconds: float) -> None:
        path = self._path(scope)
        self._metrics.requests.labels(path, str(status)).inc()
        self._metrics.request_seconds.labels(path).observe(seconds)
        log.info("%s %s %d %.0f ms", scope["method"], path, status, 1000 * seconds)


async def _read(receive: Receive, limit: int) -> bytes:
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ApiError(499, "the client closed the connection")
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > limit:
            raise _too_large(limit)
        if not message.get("more_body"):
            return b"".join(parts)


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"the body has more than {limit} bytes; send less, or start the server with a larger --max-body-bytes")


def _replaying(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives the body once, and then what the connection gives."""
    is_given = False

    async def _replay() -> Message:
        nonlocal is_given
        if is_given:
            return await receive()
        is_given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return _replay

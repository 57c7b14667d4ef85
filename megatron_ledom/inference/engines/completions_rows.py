"""Write rows on a server that streams token ids, such as vLLM's `/v1/completions`.

Every row is a request of its own, all at the same time: the server makes the batches. The server gets and gives ids only; this
package joins them to texts, finds stop strings in reading order, and closes the stream of a row that is done or that nobody wants,
which ends its work on the server.

Token healing needs another set of allowed ids at each token (`allowed_token_ids`), so each id that spells the edge of the given text
is a request; usually there are one or two. Fields that are vLLM's own: `allowed_token_ids`, `ignore_eos`, `stop_token_ids`,
`return_token_ids`, `return_tokens_as_token_ids`, `top_k`, `min_p` and `repetition_penalty`. The last three are sent because vLLM would
otherwise take them from the folder's generation_config.json.
"""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from threading import Thread
from typing import Any

import httpx

from megatron_ledom.errors import RemoteAnswerError, TransientError
from megatron_ledom.inference.engines.completions_client import ATTEMPTS, is_transient
from megatron_ledom.inference.engines.completions_engine import FAILED, IDS_AS_TOKENS, CompletionsEngine
from megatron_ledom.inference.engines.remote_engine import RemoteRows
from megatron_ledom.inference.row_choice import WrittenIds, uniform_draw
from megatron_ledom.inference.row_generation import (
    IsWanted,
    OnEnd,
    OnStep,
    Row,
    RowObserver,
    RowRequest,
    RowResult,
    healed_rows,
)
from megatron_ledom.inference.scoring import Span

POLL_SECONDS = 0.1
"""Time between two questions if a row is still wanted, while the server gives no token."""
FIRST_PAUSE_SECONDS = 1.0
"""Pause before the second attempt; each further one is twice as long."""
NEVER = -100.0
"""The bias of ids that no tokenizer has: the lowest that OpenAI's protocol allows."""
NAMED_ID = "token_id:"
"""vLLM's prefix of a token that is named by its id."""
STREAMED = {"stream": True, "n": 1, "return_token_ids": True, IDS_AS_TOKENS: True, "ignore_eos": True}
UNCHANGED = {"min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}


@dataclass(frozen=True, slots=True)
class _Token:
    """A written id with its log-probability, and the likeliest ids there with theirs, the likeliest first."""

    id: int
    logprob: float
    likeliest: list[tuple[int, float]]


@dataclass(slots=True)
class _Progress:
    """The tokens that a request may still write; has_begun: it wrote one; is_over: it wrote its last one."""

    num_left: int
    has_begun: bool = False
    is_over: bool = False


class CompletionsRows(RemoteRows):
    """Writes rows on the server of a `CompletionsEngine`; at most `most` at once, others wait. A `RowWriter`.

    An event loop in a thread of its own reads all streams, and calls the functions of `write_rows`.
    """

    def __init__(self, engine: CompletionsEngine, most: int) -> None:
        super().__init__(engine)
        self._engine, self._client, self._checks = engine, engine.client, engine.checks
        unwritable = set(range(engine.vocab_size)) - {*engine.tokenizer.vocab.values(), *engine.stop_ids}
        self._bias = {str(id_): NEVER for id_ in sorted(unwritable)}
        self._slots = asyncio.Semaphore(most)
        self._http = self._client.open_async()
        self._loop = asyncio.new_event_loop()
        Thread(target=self._loop.run_forever, name="completions-rows", daemon=True).start()

    def write_rows(
        self,
        requests: Sequence[RowRequest],
        on_step: OnStep | None = None,
        on_end: OnEnd | None = None,
        is_wanted: IsWanted = lambda _: True,
    ) -> list[RowResult]:
        """See `RowWriter.write_rows`. An error of one row ends all."""
        rows, observer = healed_rows(self, requests), RowObserver(self, on_step, on_end)
        return asyncio.run_coroutine_threadsafe(self._write_all(rows, observer, is_wanted), self._loop).result()

    def written_span(self, request: RowRequest) -> tuple[Span, list[float]]:
        """Write one row; return its ids, of which those of the new text are to be scored, and their log-probabilities."""
        (row,), written = healed_rows(self, [request]), WrittenIds()
        asyncio.run_coroutine_threadsafe(self._write(row, written, RowObserver(self, None, None)), self._loop).result()
        tokens = [*self.leading_ids, *row.healed.tokens, *written.ids]
        return Span(tokens, len(tokens) - len(written.logprobs)), written.logprobs

    async def _write_all(self, rows: list[Row], observer: RowObserver, is_wanted: IsWanted) -> list[RowResult]:
        tasks = [asyncio.create_task(self._write_while_wanted(row, observer, is_wanted)) for row in rows]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _write_while_wanted(self, row: Row, observer: RowObserver, is_wanted: IsWanted) -> RowResult:
        """Write a row; end it with what it has if nobody wants it any more, even if the server gives no token."""
        written = WrittenIds()
        writing = asyncio.create_task(self._write(row, written, observer))
        try:
            while not writing.done() and is_wanted(row.index):
                await asyncio.wait({writing}, timeout=POLL_SECONDS)
            if writing.done():
                return await writing
        finally:
            writing.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await writing
        return observer.end(row, written)

    async def _write(self, row: Row, written: WrittenIds, observer: RowObserver) -> RowResult:
        async with self._slots:
            return await self._write_now(row, written, observer)

    async def _write_now(self, row: Row, written: WrittenIds, observer: RowObserver) -> RowResult:
        trimmed, result = row.healed.trimmed, None
        while result is None:
            async with aclosing(self._tokens(self._fields(row, written, trimmed))) as tokens:
                async for token, is_last in tokens:
                    self._add(row, written, token)
                    trimmed = self.writer.healer.rest(trimmed, token.id)
                    result = observer.after_token(row, written)
                    if result is not None and not is_last:
                        break
        return result

    def _fields(self, row: Row, written: WrittenIds, trimmed: bytes) -> dict[str, Any]:
        """Return the fields of the next request: one id while there are trimmed bytes, else all that is left."""
        sampling = row.request.sampling
        limits: dict[str, Any] = {"max_tokens": sampling.max_new_tokens - len(written.logprobs)}
        if trimmed:
            limits = {"max_tokens": 1, "allowed_token_ids": self.writer.healer.allowed(trimmed)}
        elif self._bias:
            limits["logit_bias"] = self._bias
        return {
            **STREAMED,
            **UNCHANGED,
            "model": self._engine.served_as,
            "prompt": [*self.leading_ids, *row.healed.tokens, *written.ids],
            "logprobs": row.request.num_likeliest,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "seed": int(uniform_draw(row.request.key, len(written.ids)) * 2**31),
            "stop_token_ids": self.writer.stop_ids,
            **limits,
        }

    def _add(self, row: Row, written: WrittenIds, token: _Token) -> None:
        written.ids.append(token.id)
        if self.writer.counts_as_new(written.ids, row.healed.trimmed):
            written.logprobs.append(token.logprob)
            if row.request.num_likeliest:
                written.likeliest.append(token.likeliest[: row.request.num_likeliest])

    async def _tokens(self, fields: dict[str, Any]) -> AsyncGenerator[tuple[_Token, bool], None]:
        """Yield the tokens of a request, and True with its last one. Read its end too, so that the connection serves the next request.

        Raises RemoteAnswerError for a stream that has not as many tokens as it should.
        """
        progress, reason = _Progress(fields["max_tokens"]), None
        async with aclosing(self._events(fields, progress)) as events:
            async for event in events:
                choice = self._choice(event, fields["prompt"])
                for token in self._tokens_of(choice, fields):
                    if progress.is_over:
                        raise self._checks.refusal("with a token after the last one", "use another server")
                    progress.num_left -= 1
                    progress.has_begun = True
                    progress.is_over = progress.num_left == 0 or token.id in self.writer.stop_ids
                    yield token, progress.is_over
                reason = choice.get("finish_reason") or reason
        if not progress.is_over and reason is None:
            raise self._broken("the stream ended early")
        if not progress.is_over and reason in FAILED:
            raise self._broken(f"it ended by {reason}")
        if not progress.is_over:
            raise self._checks.refusal(
                f"that ended by {self._client.shown(str(reason), 40)} without an end token, {progress.num_left} tokens before the limit",
                "raise the server's own limit of tokens, or start it without one",
            )

    async def _events(self, fields: dict[str, Any], progress: _Progress) -> AsyncGenerator[dict[str, Any], None]:
        """Yield the events of a request; closing the iterator closes the connection, so the server ends its work."""
        response = await self._opened(fields)
        try:
            async for line in _lines(response):
                if line.startswith(b"data:") and (data := line[5:].strip()) != b"[DONE]":
                    yield self._read(data, progress)
        except httpx.TransportError as error:
            if not progress.is_over:
                raise self._broken(f"{type(error).__name__}: {error}") from None
        except httpx.HTTPError as error:
            raise self._unreadable(error) from None
        finally:
            await response.aclose()

    async def _opened(self, fields: dict[str, Any]) -> httpx.Response:
        """Return the response to a request before its events; repeat it while the server is busy or away."""
        body = json.dumps(fields, allow_nan=False).encode()
        reason = ""
        for attempt in range(ATTEMPTS):
            try:
                response = await self._http.send(self._http.build_request("POST", self._client.url, content=body), stream=True)
                if response.status_code == 200:
                    return response
                try:
                    await response.aread()
                finally:
                    await response.aclose()
                error = self._client.refusal(response)
                if not isinstance(error, TransientError):
                    raise error
                reason = self._client.shown(f"{response.status_code}")
            except httpx.ReadTimeout:
                raise self._client.too_slow(self._client.url) from None
            except httpx.TransportError as error:
                reason = self._client.shown(f"{type(error).__name__}: {error}")
            except httpx.HTTPError as error:
                raise self._unreadable(error) from None
            if attempt + 1 < ATTEMPTS:
                await asyncio.sleep(FIRST_PAUSE_SECONDS * 2**attempt)
        raise self._client.away(self._client.url, reason)

    def _read(self, data: bytes, progress: _Progress) -> dict[str, Any]:
        """Return an event; raise the error that it reports.

        vLLM reports every error of a stream with the code 400. After the first token it is no refusal: the request was accepted.
        """
        try:
            event = json.loads(data)
        except (ValueError, RecursionError):
            event = None
        if not isinstance(event, dict):
            raise self._checks.refusal("with an event that is not a JSON object", "is it /v1/completions?")
        if (error := event.get("error")) is None:
            return event
        said = self._client.shown(str(error))
        code = error.get("code") if isinstance(error, dict) else None
        if type(code) is int and code < 500 and not is_transient(code) and not progress.has_begun:
            raise RemoteAnswerError(f"{self._client.url} refuses the request: {said}")
        raise self._broken(said)

    def _unreadable(self, error: httpx.HTTPError) -> RemoteAnswerError:
        said = self._client.shown(f"{type(error).__name__}: {error}")
        return self._checks.refusal(f"that cannot be read ({said})", "check the server, and any proxy before it")

    def _broken(self, reason: str) -> TransientError:
        return TransientError(f"{self._client.url} broke its answer off ({self._client.shown(reason)}); send the request again")

    def _choice(self, event: dict[str, Any], prompt: list[int]) -> dict[str, Any]:
        """Return the only choice of an event; an empty one for an event that reports usage. Refuse another model or prompt."""
        self._checks.model(event)
        choices = event.get("choices")
        if choices == []:
            return {}
        if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
            raise self._checks.refusal("with an event that has not one choice", "is it /v1/completions?")
        self._checks.prompt_ids(choices[0], prompt)
        return choices[0]

    def _tokens_of(self, choice: dict[str, Any], fields: dict[str, Any]) -> Iterator[_Token]:
        """Yield the tokens of an event, checked against what was asked for."""
        found = _dict_or_empty(choice.get("logprobs"))
        names, ids = _list_or_empty(found.get("tokens")), choice.get("token_ids")
        ids = [_id_of(name) for name in names] if ids is None else _list_or_empty(ids)
        values, likeliest = (
            _list_or_empty(found.get("token_logprobs")),
            _list_or_empty(found.get("top_logprobs")) or [{}] * len(ids),
        )
        if not len(ids) == len(values) == len(likeliest):
            raise self._checks.refusal(
                f"with {len(ids)} ids and {len(values)} log-probabilities in an event",
                "use a server that streams ids with their log-probabilities, such as vLLM 0.10.2 or later",
            )
        allowed = fields.get("allowed_token_ids")
        for id_, value, others in zip(ids, values, likeliest, strict=True):
            if type(id_) is not int or not 0 <= id_ < self._engine.vocab_size or (allowed and id_ not in allowed):
                raise self._checks.refusal(
                    f"with the id {self._client.shown(str(id_), 40)}, which was not allowed",
                    "use a server that names ids and obeys allowed_token_ids, such as vLLM",
                )
            named = [(_id_of(name), number) for name, number in _dict_or_empty(others).items()]
            ordered = [(other, self._checks.logprob(number, "a likely token")) for other, number in named if other is not None]
            ordered.sort(key=lambda one: -one[1])
            yield _Token(id_, self._checks.logprob(value, "a written token"), ordered)


def _id_of(name: Any) -> Any:
    """Return the id in the name of a token; None if it is named otherwise."""
    number = name.removeprefix(NAMED_ID) if isinstance(name, str) and name.startswith(NAMED_ID) else ""
    return int(number) if number.isdecimal() else None


def _dict_or_empty(value: Any) -> dict[Any, Any]:
    return value if isinstance(value, dict) else {}


def _list_or_empty(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


async def _lines(response: httpx.Response) -> AsyncIterator[bytes]:
    """Yield the lines of a response. httpx's own also end at U+2028, which JSON may contain."""
    rest = b""
    async for chunk in response.aiter_bytes():
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            yield line
    if rest:
        yield rest

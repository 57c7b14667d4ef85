"""A real HTTP server on this machine that runs a tiny model, and functions that make its responses wrong."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch

from megatron_ledom.inference import ForwardLM, ReverseLM
from megatron_ledom.inference.engines.completions_engine import CompletionsEngine


class Server(ThreadingHTTPServer):
    """Serves `/v1/completions` for one model: one prompt of ids per request, log-probabilities with echo, and seeded samples."""

    def __init__(self, lm: ForwardLM | ReverseLM) -> None:
        self.lm, self.requests, self.failures = lm, [], []
        self.names_ids = True
        self.change: Callable[[dict[str, Any]], Any] = lambda answer: answer
        self.reply: Callable[[BaseHTTPRequestHandler], None] | None = None
        self.lock = threading.Lock()
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def names(self, ids: list[int]) -> list[str]:
        return [self.lm.tokenizer.decode([id_]) for id_ in ids]

    @torch.inference_mode()
    def complete(self, request: dict[str, Any]) -> dict[str, Any]:
        ids, new_ids, reason = request["prompt"], [], "length"
        generator = torch.Generator().manual_seed(request.get("seed") or 0)
        values: list[float | None] = [None]
        logprobs = torch.log_softmax(self.lm.model(torch.tensor([ids])).logits[0].float(), -1)
        values += [float(logprobs[i, ids[i + 1]]) for i in range(len(ids) - 1)]
        while len(new_ids) < request["max_tokens"]:
            last = self.lm.model(torch.tensor([ids + new_ids])).logits[0, -1]
            greedy = request["temperature"] == 0
            probabilities = torch.softmax(last / (request["temperature"] or 1), -1)
            chosen = int(last.argmax() if greedy else torch.multinomial(probabilities, 1, generator=generator))
            if chosen in self.lm.stop_ids:
                reason = "stop"
                break
            new_ids.append(chosen)
        choice: dict[str, Any] = {"index": 0, "text": self.lm.tokenizer.decode(new_ids), "finish_reason": reason}
        if request.get("echo") and request.get("logprobs"):
            names = (
                [f"token_id:{id_}" for id_ in ids]
                if request.get("return_tokens_as_token_ids") and self.names_ids
                else self.names(ids)
            )
            choice["logprobs"] = {"token_logprobs": values, "tokens": names}
        return {"choices": [choice], "usage": {"prompt_tokens": len(ids), "completion_tokens": len(new_ids)}}


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            failure = self.server.failures.pop(0) if self.server.failures else None
            self.server.requests.append((self.path, self.headers.get("Authorization"), request))
        if self.server.reply is not None:
            self.server.reply(self)
            return
        answer = {"error": "busy"} if failure else self.server.change(self.server.complete(request))
        body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(failure or 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Print nothing to stderr."""


@contextmanager
def serving(lm: ForwardLM | ReverseLM) -> Iterator[Server]:
    server = Server(lm)
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def engine_of(served: tuple[Server, Path, Any], batch_size: int = 2, **options: Any) -> CompletionsEngine:
    server, folder, lm = served
    server.requests.clear()
    server.change, server.reply = lambda answer: answer, None
    return CompletionsEngine(server.url, "tiny", folder, lm.direction, batch_size=batch_size, **options)


def first_choice(answer: dict[str, Any]) -> dict[str, Any]:
    return dict(answer["choices"][0])


def with_logprobs(
    answer: dict[str, Any], change: Callable[[list[Any]], list[Any]], field: str = "token_logprobs"
) -> dict[str, Any]:
    logprobs = first_choice(answer)["logprobs"]
    return with_choice(answer, logprobs={**logprobs, field: change(logprobs[field])})


def with_choice(answer: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {**answer, "choices": [{**first_choice(answer), **fields}]}


def with_usage(answer: dict[str, Any], more: int) -> dict[str, Any]:
    return {**answer, "usage": {**answer["usage"], "prompt_tokens": answer["usage"]["prompt_tokens"] + more}}


def send(handler: BaseHTTPRequestHandler, status: int, body: bytes, **headers: str) -> None:
    handler.send_response(status)
    for name, value in {"Content-Length": str(len(body)), **headers}.items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(body)


def cut_body(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "5000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')


def broken_chunk(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nabc")


def no_http(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"NOT HTTP AT ALL\r\n\r\n")


def hang_up(handler: BaseHTTPRequestHandler) -> None:
    """Close the connection without a response."""

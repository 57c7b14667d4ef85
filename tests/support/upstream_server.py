"""A real upstream, in a process or a thread of its own: a small completions server of token ids, in the shapes that vLLM documents.

It runs a stock transformers model on ids as they come, and knows nothing of directions. Requests of all clients are computed at the same
time, a token at a time. `GET /test/state` tells how many requests run, ended and were left by their client; `POST /test/next` sets what
the next requests meet: a status, a stream that breaks, is garbled or reports an error after some events, or a wait before each token,
before the end of a stream or before a score.
"""

import argparse
import asyncio
import json
import os
import re
import subprocess
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from tests.support.paths import ROOT
from tests.support.warm_python import shared_python


class Model:
    """A stock model with its tokenizer; `log_softmax` of the last position, and of all positions."""

    def __init__(self, folder: str) -> None:
        import torch
        from tokenizers import Tokenizer
        from transformers import AutoModelForCausalLM

        self._torch, self._lock = torch, threading.Lock()
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
        self.num_positions = self._model.config.max_position_embeddings
        self.vocab_size = self._model.config.vocab_size

    def logits(self, ids: list[int]) -> Any:
        with self._lock, self._torch.inference_mode():
            return self._model(self._torch.tensor([ids])).logits[0].float()

    def chosen(self, logits: Any, request: dict[str, Any], position: int) -> int:
        """Return the next id: allowed ids, bias, temperature and top_p, in vLLM's order."""
        torch = self._torch
        if request.get("allowed_token_ids"):
            allowed = torch.tensor(request["allowed_token_ids"])
            masked = torch.full_like(logits, -torch.inf)
            masked[allowed] = logits[allowed]
            logits = masked
        for id_, bias in (request.get("logit_bias") or {}).items():
            logits = logits.clone()
            logits[int(id_)] += bias
        if request["temperature"] == 0:
            return int(logits.argmax())
        probabilities = torch.softmax(logits / request["temperature"], -1)
        ordered, ids = probabilities.sort(descending=True)
        kept = ordered.cumsum(-1) - ordered < request["top_p"]
        generator = torch.Generator().manual_seed(request["seed"] + position)
        return int(ids[torch.multinomial(ordered * kept, 1, generator=generator)])

    def logprobs(self, logits: Any) -> Any:
        return self._torch.log_softmax(logits, -1)

    def fields(self, id_: int, values: Any, num: int, *, by_id: bool) -> tuple[str, float, dict[str, float]]:
        """Return name and log-probability of an id, and the likeliest with it, as vLLM orders them."""
        name = (lambda one: f"token_id:{one}") if by_id else (lambda one: self.tokenizer.decode([one]))
        likeliest = [id_, *[one for one in values.topk(num).indices.tolist() if one != id_]] if num else [id_]
        value = max(float(values[id_]), -9999.0)
        return name(id_), value, {name(one): max(float(values[one]), -9999.0) for one in likeliest}


class Application:
    """The endpoints; change: makes an answer, or the event of a stream, wrong.

    refused: a field that is refused. processed: written tokens have log-probabilities after the temperature.
    """

    def __init__(
        self,
        model: Model,
        name: str = "served",
        max_model_len: int | None = None,
        *,
        key: str | None = None,
        refused: str = "",
        processed: bool = False,
        change: Callable[[dict[str, Any]], dict[str, Any]] = lambda answer: answer,
    ) -> None:
        self.model, self.name, self.key, self.change = model, name, key, change
        self.refused, self.processed = refused, processed
        self.max_model_len = max_model_len or model.num_positions
        self.state: dict[str, Any] = {"running": 0, "ended": 0, "left": 0, "most": 0, "requests": []}
        self.following: dict[str, Any] = {}

    def models(self) -> Any:
        card = {"id": self.name, "object": "model", "owned_by": "vllm", "root": "/models", "parent": None}
        adapter = {**card, "id": "an-adapter", "parent": self.name}
        return {"object": "list", "data": [{**card, "max_model_len": self.max_model_len}, adapter]}

    def tokenize(self, body: dict[str, Any]) -> Any:
        ids = self.model.tokenizer.encode(body["prompt"], add_special_tokens=body.get("add_special_tokens", True)).ids
        return {"count": len(ids), "max_model_len": self.max_model_len, "tokens": ids, "token_strs": None}

    def meet(self, following: dict[str, Any]) -> Any:
        self.following, self.state["most"] = following, 0
        return {}

    def refusal(self, body: dict[str, Any]) -> tuple[int, str] | None:
        """Return status and message for a request that is refused."""
        shown = {name: value for name, value in body.items() if name not in ("allowed_token_ids", "logit_bias")}
        self.state["requests"].append(shown)
        if self.following.get("times", 0) > 0:
            self.following["times"] -= 1
            return self.following["status"], "made for a test"
        prompt, most = body["prompt"], body["max_tokens"]
        if self.refused in body:
            return 400, f"{self.refused}: Extra inputs are not permitted"
        if body["model"] not in (self.name, "an-adapter"):
            return 404, f"The model `{body['model']}` does not exist."
        if max(prompt) >= self.model.vocab_size:
            return 400, f"Token id {max(prompt)} is out of vocabulary"
        if len(prompt) + max(1, most) > self.max_model_len:
            return 400, f"This model's maximum context length is {self.max_model_len} tokens."
        return None

    def answer(self, body: dict[str, Any], choice: dict[str, Any], **more: Any) -> dict[str, Any]:
        fields = {"id": "cmpl-1", "object": "text_completion", "created": 0, "model": body["model"]}
        return self.change({**fields, "choices": [{"index": 0, **choice}], **more})

    def scored(self, body: dict[str, Any]) -> Any:
        time.sleep(self.following.get("score_seconds", 0))
        prompt, model = body["prompt"], self.model
        values = model.logprobs(model.logits(prompt))
        by_id = bool(body.get("return_tokens_as_token_ids"))
        rows = [model.fields(id_, values[place], body["logprobs"], by_id=by_id) for place, id_ in enumerate(prompt[1:])]
        first = f"token_id:{prompt[0]}" if by_id else model.tokenizer.decode([prompt[0]])
        logprobs = {
            "tokens": [first, *[row[0] for row in rows]],
            "token_logprobs": [None, *[row[1] for row in rows]],
            "top_logprobs": [None, *[row[2] for row in rows]],
            "text_offset": [0] * len(prompt),
        }
        usage = {"prompt_tokens": len(prompt), "completion_tokens": 1, "total_tokens": len(prompt) + 1}
        choice = {"text": model.tokenizer.decode(prompt), "logprobs": logprobs, "finish_reason": "length"}
        return self.answer(body, choice, usage=usage)

    async def counted(self, body: dict[str, Any]) -> AsyncIterator[str]:
        """Yield the events of a stream, and count if its client reads all of them."""
        state, is_whole = self.state, False
        state["running"] += 1
        state["most"] = max(state["most"], state["running"])
        try:
            async for event in self.events(body):
                yield f"data: {json.dumps(event, ensure_ascii=False)}\n\n"
            await asyncio.sleep(self.following.get("end_seconds", 0))
            yield "data: [DONE]\n\n"
            is_whole = True
        finally:
            state["running"] -= 1
            state["ended" if is_whole else "left"] += 1

    async def events(self, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        ids: list[int] = []
        reason = None
        while reason is None:
            await asyncio.sleep(self.following.get("seconds", 0))
            if len(ids) == self.following.get("break_after", -1):
                raise RuntimeError("the connection breaks, for a test")
            if len(ids) == self.following.get("error_after", -1):
                code = self.following.get("code", 500)
                yield {"error": {"message": "engine died", "type": "InternalServerError", "param": None, "code": code}}
                return
            logits = (await asyncio.to_thread(self.model.logits, [*body["prompt"], *ids]))[-1]
            ids.append(self.model.chosen(logits, body, len(ids)))
            if ids[-1] in body["stop_token_ids"]:
                reason = "stop"
            elif len(ids) == body["max_tokens"]:
                reason = "length"
            values = self.model.logprobs(logits / (body["temperature"] or 1.0) if self.processed else logits)
            by_id = body["return_tokens_as_token_ids"]
            token, value, likeliest = self.model.fields(ids[-1], values, body["logprobs"], by_id=by_id)
            logprobs = {"tokens": [token], "token_logprobs": [value], "top_logprobs": [likeliest], "text_offset": [0]}
            choice = {
                "text": "a\u2028b",  # a line break for str.splitlines, but not for server-sent events
                "logprobs": logprobs,
                "finish_reason": reason,
                "token_ids": ids[-1:],
                "prompt_token_ids": body["prompt"] if len(ids) == 1 else None,
            }
            yield self.answer(body, choice)


def build_app(model: Model, *, tokenizes: bool = True, tokenized: Any = None, **options: Any) -> Any:
    """Return the application; tokenized: the response to every text at `/tokenize`; options: those of `Application`."""
    from fastapi import Depends, FastAPI, HTTPException, Request
    from fastapi.responses import JSONResponse, StreamingResponse

    own = Application(model, **options)

    def check_key(request: Request) -> None:
        header = request.headers.get("authorization")
        if own.key and request.url.path.startswith("/v1") and header != f"Bearer {own.key}":
            raise HTTPException(401, "Unauthorized")

    def completions(body: dict[str, Any]) -> Any:
        if refused := own.refusal(body):
            kind = "BadRequestError" if refused[0] < 500 else "InternalServerError"
            error = {"message": refused[1], "type": kind, "param": None, "code": refused[0]}
            return JSONResponse({"error": error}, status_code=refused[0])
        if body.get("echo"):
            return own.scored(body)
        headers = {"Content-Encoding": "gzip"} if own.following.get("garbled") else {}
        return StreamingResponse(own.counted(body), media_type="text/event-stream", headers=headers)

    app = FastAPI(dependencies=[Depends(check_key)])
    app.get("/v1/models")(own.models)
    app.get("/test/state")(lambda: own.state)
    app.post("/test/next")(own.meet)
    app.post("/v1/completions")(completions)
    if tokenizes:
        app.post("/tokenize")(own.tokenize if tokenized is None else lambda: tokenized)
    return app


class Upstream:
    """The running server: its address, its state, and what its next requests meet."""

    def __init__(self, url: str) -> None:
        self.url = url

    @property
    def state(self) -> dict[str, Any]:
        return dict(httpx.get(f"{self.url}/test/state", timeout=60).json())

    def meet(self, **following: Any) -> None:
        """Set what the next requests meet; without arguments nothing special."""
        httpx.post(f"{self.url}/test/next", json=following, timeout=60).raise_for_status()


@contextmanager
def upstream_of(folder: Path, **environment: str) -> Iterator[Upstream]:
    """Run an upstream of a folder for the block."""
    command = [str(shared_python()), "-m", "tests.support.upstream_server", "--folder", str(folder)]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=variables)
    try:
        assert process.stderr is not None
        lines = []
        for line in process.stderr:
            lines.append(line)
            if found := re.search(r"running on (http://\S+)", line):
                threading.Thread(target=process.stderr.read, daemon=True).start()
                yield Upstream(found[1])
                return
        raise AssertionError("".join(lines))
    finally:
        process.kill()
        process.wait()


@contextmanager
def upstream_in_thread(folder: Path, **options: Any) -> Iterator[Upstream]:
    """Run an upstream of a folder in a thread for the block; options: those of `build_app`."""
    import uvicorn

    config = uvicorn.Config(build_app(Model(str(folder)), **options), port=0, log_level="critical")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield Upstream(f"http://127.0.0.1:{port}")
    finally:
        server.should_exit = True
        thread.join(20)


def main() -> None:
    """Run the server."""
    import uvicorn

    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", required=True)
    args = parser.parse_args()
    uvicorn.run(build_app(Model(args.folder), key=os.environ.get("TEST_UPSTREAM_KEY")), port=0, log_level="info")


if __name__ == "__main__":
    main()

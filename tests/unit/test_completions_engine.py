"""The OpenAI-compatible engine against a real HTTP server here, which runs a tiny model; results equal the transformers engine's."""

import json
import runpy
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ledom.direction import Direction
from megatron_ledom.errors import DataError, MismatchError, TransientError, UsageError
from megatron_ledom.inference import ForwardLM, ReverseLM, completions_engine
from megatron_ledom.inference.completions_engine import CompletionsEngine
from megatron_ledom.inference.engine import StepDelimiter, root
from megatron_ledom.inference.generation import Sampling
from megatron_ledom.inference.transformers_engine import TransformersEngine
from tests.tiny_models import random_model_folder

ROOT = Path(__file__).parents[2]
PROMPT = "The capital of France is Paris. "
PAIRS = [(PROMPT, "The cat"), ("The capital of Par", "is"), (PROMPT, "The cat"), ("漢字 ", "🙂 x")]


class Server(ThreadingHTTPServer):
    """`/v1/completions` of one model: one prompt of ids a request, log-probabilities of it with echo, seeded samples."""

    def __init__(self, lm: ForwardLM | ReverseLM) -> None:
        self.lm, self.requests, self.failures = lm, [], []
        self.lock = threading.Lock()
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    @torch.inference_mode()
    def complete(self, asked: dict[str, Any]) -> dict[str, Any]:
        ids, new_ids, reason = asked["prompt"], [], "length"
        generator = torch.Generator().manual_seed(asked.get("seed") or 0)
        values: list[float | None] = [None]
        logprobs = torch.log_softmax(self.lm.model(torch.tensor([ids])).logits[0].float(), -1)
        values += [float(logprobs[i, ids[i + 1]]) for i in range(len(ids) - 1)]
        while len(new_ids) < asked["max_tokens"]:
            last = self.lm.model(torch.tensor([ids + new_ids])).logits[0, -1]
            greedy = asked["temperature"] == 0
            probabilities = torch.softmax(last / (asked["temperature"] or 1), -1)
            chosen = int(last.argmax() if greedy else torch.multinomial(probabilities, 1, generator=generator))
            if chosen in self.lm.stop_ids:
                reason = "stop"
                break
            new_ids.append(chosen)
        choice: dict[str, Any] = {"index": 0, "text": self.lm.tokenizer.decode(new_ids), "finish_reason": reason}
        if asked.get("echo") and asked.get("logprobs"):
            choice["logprobs"] = {"token_logprobs": values}
        return {"choices": [choice], "usage": {"prompt_tokens": len(ids), "completion_tokens": len(new_ids)}}


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            failure = self.server.failures.pop(0) if self.server.failures else None
            self.server.requests.append((self.path, self.headers.get("Authorization"), asked))
        body = json.dumps({"error": "busy"} if failure else self.server.complete(asked)).encode()
        self.send_response(failure or 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """No lines on stderr."""


@pytest.fixture(scope="module", params=["forward", "reverse"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Path, Any]]:
    folder = random_model_folder(tmp_path_factory.mktemp("models") / request.param, "byte_level", request.param)
    lm = (ForwardLM if request.param == "forward" else ReverseLM).from_pretrained(folder, device="cpu")
    server = Server(lm)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server, folder, lm
    server.shutdown()
    server.server_close()


def engine_of(served: tuple[Server, Path, Any]) -> CompletionsEngine:
    server, folder, lm = served
    server.requests.clear()
    return CompletionsEngine(server.url, "tiny", folder, lm.direction, batch_size=2)


@pytest.mark.parametrize("include_end", [False, True])
def test_scores_equal_those_of_the_model_in_this_process(include_end: bool, served: tuple[Server, Path, Any]) -> None:
    engine = engine_of(served)
    expected = TransformersEngine(served[2]).score(PAIRS, include_end=include_end)
    for ours, theirs in zip(engine.score(PAIRS, include_end=include_end), expected, strict=True):
        assert ours.text_ids == theirs.text_ids
        assert ours.token_logprobs == pytest.approx(theirs.token_logprobs, abs=1e-4)
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-3)
    assert len(served[0].requests) == 3  # equal pairs are asked for once
    assert engine.spent.tokens == sum(len(asked["prompt"]) for _, _, asked in served[0].requests)


def test_samples_and_steps(served: tuple[Server, Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    engine, lm = engine_of(served), served[2]
    sampling = Sampling(num_return_sequences=4, temperature=1.0, max_new_tokens=20, seed=3)
    if lm.direction is Direction.REVERSE:
        with pytest.raises(UsageError, match="give the forward model"):
            engine.sample([root(PROMPT, sampling)], sampling)
        return
    (first,), (again,) = (engine.sample([root(PROMPT, sampling)], sampling) for _ in range(2))
    assert [path.text for path in first] == [path.text for path in again]
    assert len({path.text for path in first}) == 4
    assert all(path.finished and path.forward_logprob is None for path in first)
    assert {path for path, _, _ in served[0].requests} == {"/v1/completions"}
    assert {key for _, key, _ in served[0].requests} == {"Bearer secret"}
    delimiter = StepDelimiter("[aeo]")
    (steps,) = engine.expand([root(PROMPT, sampling)], 4, delimiter, sampling)
    for step, whole in zip(steps, first, strict=True):
        assert step.text == whole.text[: delimiter.end_of_step(whole.text)]
        assert step.finished == (step.text == whole.text)
    unfinished = [path for path in steps if not path.finished]
    assert unfinished
    (further,) = engine.expand(unfinished[:1], 1, delimiter, sampling)
    assert further[0].text.startswith(unfinished[0].text)
    assert served[0].requests[-1][2]["max_tokens"] == 20 - unfinished[0].num_tokens


def test_a_busy_server_is_asked_again_and_a_refusal_is_told(
    served: tuple[Server, Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(served)
    pauses: list[float] = []
    monkeypatch.setattr(completions_engine.time, "sleep", pauses.append)
    served[0].failures += [503, 429]
    assert engine.score(PAIRS[:1])[0].num_tokens
    assert pauses == [1, 2]
    served[0].failures += [503] * 4
    with pytest.raises(TransientError, match="did not answer 4 times"):
        engine.score(PAIRS[:1])
    served[0].failures += [400]
    with pytest.raises(DataError, match=r"refuses the request: 400 .*busy"):
        engine.score(PAIRS[:1])


def test_a_server_without_echo_is_named(served: tuple[Server, Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Server.complete
    monkeypatch.setattr(Server, "complete", lambda self, asked: plain(self, {**asked, "echo": False}))
    with pytest.raises(DataError, match="supports echo with logprobs"):
        engine_of(served).score(PAIRS[:1])


def test_what_cannot_work_is_refused_before_a_request(served: tuple[Server, Path, Any]) -> None:
    server, folder, lm = served
    other = Direction.FORWARD if lm.direction is Direction.REVERSE else Direction.REVERSE
    with pytest.raises(MismatchError, match="records the direction"):
        CompletionsEngine(server.url, "tiny", folder, other)
    with pytest.raises(UsageError, match="no address of a server"):
        CompletionsEngine("localhost:8000", "tiny", folder, lm.direction)
    with pytest.raises(UsageError, match="ends at a pattern"):
        engine_of(served).expand([], 1, StepDelimiter(None, frozenset({3})), Sampling())
    with pytest.raises(UsageError, match="engines take no stop_strings"):
        engine_of(served).sample([], Sampling(stop_strings=["the"]))


def test_the_tool_ranks_with_a_served_model(
    served: tuple[Server, Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One side behind the server, the other in this process: the same scores as with both in this process."""
    server, folder, lm = served
    other = "reverse" if lm.direction is Direction.FORWARD else "forward"
    second = random_model_folder(tmp_path / other, "sentencepiece", other)
    (tmp_path / "in.jsonl").write_text(json.dumps({"prompt": PROMPT, "candidates": ["The cat", "漢字"]}) + "\n")
    common = [f"--{lm.direction}", str(folder), f"--{other}", str(second), "--input", str(tmp_path / "in.jsonl")]
    scores = []
    server.requests.clear()
    for name, more in (
        ("here", []),
        ("there", [f"--{lm.direction}-server", server.url, f"--{lm.direction}-served-as", "tiny"]),
    ):
        monkeypatch.setattr(sys, "argv", ["rerank.py", *common, "--output", str(tmp_path / name), *more])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / "tools/rerank.py"), run_name="__main__")
        assert not ended.value.code
        scores.append(json.loads((tmp_path / name).read_text(encoding="utf-8"))["scores"])
    for ours, theirs in zip(*scores, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-3)
    assert {asked["model"] for _, _, asked in server.requests} == {"tiny"}

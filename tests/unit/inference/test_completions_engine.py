"""The completions engine with a real HTTP server that runs a tiny model: results equal those of the transformers engine."""

import json
import os
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from megatron_ledom.direction import Direction
from megatron_ledom.errors import DataError, MismatchError, TransientError, UsageError
from megatron_ledom.inference import ForwardLM, ReverseLM
from megatron_ledom.inference.engines import completions_engine
from megatron_ledom.inference.engines.completions_engine import CompletionsEngine
from megatron_ledom.inference.engines.engine import StepDelimiter, empty_answer
from megatron_ledom.inference.engines.transformers_engine import TransformersEngine
from megatron_ledom.inference.generation import Sampling
from tests.support.completions_server import (
    Server,
    broken_chunk,
    cut_body,
    engine_of,
    first_choice,
    hang_up,
    no_http,
    send,
    serving,
    with_choice,
    with_logprobs,
    with_usage,
)
from tests.support.tiny_models import random_model_folder
from tests.support.tool_runs import run_tool

PROMPT = "The capital of France is Paris. "
PAIRS = [(PROMPT, "The cat"), ("The capital of Par", "is"), (PROMPT, "The cat"), ("漢字 ", "🙂 x")]


@pytest.fixture(scope="module", params=["forward", "reverse"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Path, Any]]:
    folder = random_model_folder(tmp_path_factory.mktemp("models") / request.param, "byte_level", request.param)
    lm = (ForwardLM if request.param == "forward" else ReverseLM).from_pretrained(folder, device="cpu")
    with serving(lm) as server:
        yield server, folder, lm


@pytest.mark.parametrize("include_end", [False, True])
def test_scores_equal_those_of_the_model_in_this_process(include_end: bool, served: tuple[Server, Path, Any]) -> None:
    engine = engine_of(served)
    expected = TransformersEngine(served[2]).score(PAIRS, include_end=include_end)
    for ours, theirs in zip(engine.score(PAIRS, include_end=include_end), expected, strict=True):
        assert ours.text_ids == theirs.text_ids
        assert ours.token_logprobs == pytest.approx(theirs.token_logprobs, abs=1e-4)
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-3)
    assert len(served[0].requests) == 3  # equal pairs are requested once
    assert engine.usage.tokens == sum(len(asked["prompt"]) for _, _, asked in served[0].requests)


def test_samples_and_steps(served: tuple[Server, Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    engine, lm = engine_of(served), served[2]
    sampling = Sampling(num_return_sequences=4, temperature=1.0, max_new_tokens=20, seed=3)
    if lm.direction is Direction.REVERSE:
        with pytest.raises(UsageError, match="sample from the forward model"):
            engine.sample([empty_answer(PROMPT, sampling)], sampling)
        return
    (first,), (again,) = (engine.sample([empty_answer(PROMPT, sampling)], sampling) for _ in range(2))
    assert [path.text for path in first] == [path.text for path in again]
    assert len({path.text for path in first}) == 4
    assert all(path.finished and path.forward_logprob is None for path in first)
    assert {path for path, _, _ in served[0].requests} == {"/v1/completions"}
    assert {key for _, key, _ in served[0].requests} == {"Bearer secret"}
    delimiter = StepDelimiter("[aeo]")
    (steps,) = engine.expand([empty_answer(PROMPT, sampling)], 4, delimiter, sampling)
    for step, whole in zip(steps, first, strict=True):
        assert step.text == whole.text[: delimiter.end_of_step(whole.text)]
        assert step.finished == (step.text == whole.text)
    unfinished = [path for path in steps if not path.finished]
    assert unfinished
    (further,) = engine.expand(unfinished[:1], 1, delimiter, sampling)
    assert further[0].text.startswith(unfinished[0].text)
    assert served[0].requests[-1][2]["max_tokens"] == 20 - unfinished[0].num_tokens


def test_a_busy_server_is_asked_again_and_a_refusal_is_reported(
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


def test_impossible_settings_are_refused_before_a_request(served: tuple[Server, Path, Any]) -> None:
    server, folder, lm = served
    other = Direction.FORWARD if lm.direction is Direction.REVERSE else Direction.REVERSE
    with pytest.raises(MismatchError, match="records the direction"):
        CompletionsEngine(server.url, "tiny", folder, other)
    with pytest.raises(UsageError, match="not the address of a server"):
        CompletionsEngine("localhost:8000", "tiny", folder, lm.direction)
    with pytest.raises(UsageError, match="ends at a pattern"):
        engine_of(served).expand([], 1, StepDelimiter(None, frozenset({3})), Sampling())
    with pytest.raises(UsageError, match="engines accept no stop_strings"):
        engine_of(served).sample([], Sampling(stop_strings=["the"]))


WRONG_SCORES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "BOS in front, counted": (
        lambda a: with_usage(with_logprobs(a, lambda v: [None, -9.0, *v[1:]]), 1),
        "usage.prompt_tokens=",
    ),
    "BOS in front, not counted": (lambda a: with_logprobs(a, lambda v: [None, -9.0, *v[1:]]), "expected 4, the first null"),
    "BOS in front, cut to the count": (
        lambda a: with_logprobs(a, lambda v: ["<s>", *v[:-1]], "tokens"),
        "token 0 of the prompt is",
    ),
    "without BOS's null": (lambda a: with_logprobs(a, lambda v: [-9.0, *v[1:]]), "the first -9.0"),
    "other prompt ids": (lambda a: with_choice(a, prompt_token_ids=[1, 2, 3, 4]), "for the prompt ids"),
    "reordered tokens": (lambda a: with_logprobs(a, lambda v: v[::-1], "tokens"), "of the prompt is"),
    "fewer token names": (lambda a: with_logprobs(a, lambda v: v[:-1], "tokens"), "3 tokens for a prompt of 4"),
    "cut": (lambda a: with_logprobs(a, lambda v: v[:-1]), "with 3 log-probabilities"),
    "generated values": (lambda a: with_logprobs(a, lambda v: [-0.1] * len(v)), "the first -0.1"),
    "NaN": (lambda a: with_logprobs(a, lambda v: [None] + [float("nan")] * 3), "log-probability nan for token 1"),
    "minus infinity": (lambda a: with_logprobs(a, lambda v: [*v[:-1], float("-inf")]), "log-probability -inf for token 3"),
    "null": (lambda a: with_logprobs(a, lambda v: [*v[:-1], None]), "log-probability None for token 3"),
    "text": (lambda a: with_logprobs(a, lambda v: [None, "-1", "-1", "-1"]), "log-probability -1 for token 1"),
    "huge": (lambda a: with_logprobs(a, lambda v: [*v[:-1], -(10**400)]), "log-probability -1000"),
    "probabilities": (lambda a: with_logprobs(a, lambda v: [None, 0.5, 0.5, 0.5]), "log-probability 0.5"),
    "no logprobs": (lambda a: with_choice(a, logprobs=None), "supports echo with logprobs"),
    "logprobs of chat": (lambda a: with_choice(a, logprobs={"content": []}), "supports echo with logprobs"),
    "another model": (lambda a: {**a, "model": "large"}, "for the model 'large', expected 'tiny'"),
    "second choice only": (lambda a: with_choice(a, index=1), "index 0"),
    "two choices": (lambda a: {**a, "choices": a["choices"] * 2}, "choices [0, 0]"),
    "choices of texts": (lambda a: {**a, "choices": ["x"]}, "choices ['x']"),
    "no usage": (lambda a: {**a, "usage": None}, "without choices and usage"),
    "usage without counts": (lambda a: {**a, "usage": {}}, "usage.prompt_tokens=None"),
    "error with 200": (lambda a: {"error": "no model"}, "without choices and usage"),
    "list": (lambda a: [a], "a list, expected an object"),
    "HTML": (lambda a: b"<html>sign\nin</html>", "not JSON: '<html>sign in</html>'"),
    "nothing": (lambda a: b"", "not JSON"),
    "brackets": (lambda a: b"[" * 100_000, "not JSON"),
}


@pytest.mark.parametrize("case", WRONG_SCORES)
def test_scores_that_are_not_those_of_the_prompt_are_refused(case: str, served: tuple[Server, Path, Any]) -> None:
    engine = engine_of(served)
    pair = next(
        p for p in ((PROMPT[:n], PROMPT[n : n + m]) for n in range(1, 20) for m in (1, 2, 3)) if num_ids(engine, p) == 4
    )
    assert engine.score([pair])[0].num_tokens
    served[0].change, message = WRONG_SCORES[case]
    with pytest.raises(DataError) as caught:
        engine.score([pair])
    assert message in str(caught.value)
    assert str(caught.value).startswith(served[0].url)
    assert "\n" not in str(caught.value)


def num_ids(engine: CompletionsEngine, pair: tuple[str, str]) -> int:
    span = engine._span(pair, False)
    return len(span.tokens) if span.num_context < len(span.tokens) == len(set(span.tokens)) else 0


def test_a_server_that_puts_bos_in_front_is_refused_although_its_answer_is_consistent(served: tuple[Server, Path, Any]) -> None:
    """The server's model reads BOS before the prompt, so scores are shifted; no value is missing and none looks wrong."""
    engine = engine_of(served)
    plain = served[0].complete

    def with_bos(asked: dict[str, Any]) -> dict[str, Any]:
        return plain({**asked, "prompt": [1, *asked["prompt"]]})

    served[0].complete = with_bos  # type: ignore[method-assign]
    try:
        with pytest.raises(DataError, match=r"usage\.prompt_tokens=\d+ for a prompt of \d+ ids; the server adds a BOS"):
            engine.score(PAIRS[:1])
        if served[2].direction is Direction.FORWARD:
            with pytest.raises(DataError, match="the server adds a BOS"):
                engine.sample([empty_answer(PROMPT, Sampling())], Sampling())
    finally:
        del served[0].complete


WRONG_TEXTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "null": (lambda a: with_choice(a, text=None), "with the text None"),
    "chat": (lambda a: {**a, "choices": [{"message": {"content": "x"}}]}, "not a chat endpoint"),
    "surrogate": (lambda a: with_choice(a, text="x\ud83d"), "surrogate"),
    "no count": (lambda a: {**a, "usage": {"prompt_tokens": a["usage"]["prompt_tokens"]}}, "usage.completion_tokens=None"),
    "more than asked": (lambda a: {**a, "usage": {**a["usage"], "completion_tokens": 99}}, "at most 20"),
    "cut": (
        lambda a: {**with_choice(a, finish_reason="length"), "usage": {**a["usage"], "completion_tokens": 3}},
        "3 of 20 tokens",
    ),
    "stopped by a filter": (lambda a: with_choice(a, finish_reason="content_filter"), "'content_filter'"),
    "end token": (lambda a: with_choice(a, text="Paris<EOD>"), "the token '<EOD>' as text"),
    "echo": (lambda a: with_choice(a, text=PROMPT * 4 + first_choice(a)["text"]), "repeats the prompt"),
}


@pytest.mark.parametrize("case", WRONG_TEXTS)
def test_samples_that_are_no_answers_are_refused(case: str, served: tuple[Server, Path, Any]) -> None:
    if served[2].direction is Direction.REVERSE:
        return
    engine, sampling = engine_of(served), Sampling(temperature=1.0, max_new_tokens=20, seed=3)
    prompt = PROMPT * 4
    assert engine.sample([empty_answer(prompt, sampling)], sampling)[0][0].finished
    served[0].change, message = WRONG_TEXTS[case]
    with pytest.raises(DataError) as caught:
        engine.sample([empty_answer(prompt, sampling)], sampling)
    assert message in str(caught.value)


def test_tokens_named_by_text_are_compared_and_a_server_that_names_none_is_named(
    served: tuple[Server, Path, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    engine, expected = engine_of(served), TransformersEngine(served[2]).score(PAIRS)
    served[0].names_ids = False
    assert [score.logprob for score in engine.score(PAIRS)] == pytest.approx([score.logprob for score in expected], abs=1e-3)
    assert capsys.readouterr().err == ""
    served[0].change = lambda a: with_logprobs(a, lambda v: ["x"] * len(v), "tokens")
    with pytest.raises(DataError, match=r"does not name the tokens of the prompt, .*--trust-token-counts"):
        engine.score(PAIRS)
    trusting = CompletionsEngine(served[0].url, "tiny", served[1], served[2].direction, trust_token_counts=True)
    trusting.score(PAIRS)
    assert capsys.readouterr().err.count("does not name the tokens of the prompts") == 1
    served[0].names_ids = True


def test_a_server_that_refuses_the_field_for_token_ids_is_asked_without_it(served: tuple[Server, Path, Any]) -> None:
    engine = engine_of(served, batch_size=1)

    def reply(handler: BaseHTTPRequestHandler) -> None:
        asked = served[0].requests[-1][2]
        is_strict = "return_tokens_as_token_ids" in asked
        body = json.dumps(
            {"error": "Extra inputs are not permitted: return_tokens_as_token_ids"} if is_strict else served[0].complete(asked)
        ).encode()
        send(handler, 400 if is_strict else 200, body)

    served[0].reply = reply
    assert all(score.num_tokens for score in engine.score(PAIRS))
    assert len(served[0].requests) == 4  # three pairs, one of them twice


@pytest.mark.parametrize("broken", [cut_body, broken_chunk, no_http, hang_up])
def test_a_broken_connection_is_tried_again_like_a_busy_server(
    broken: Callable[[BaseHTTPRequestHandler], None], served: tuple[Server, Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(served)
    monkeypatch.setattr(completions_engine.time, "sleep", lambda _: None)
    right = engine.score(PAIRS[:1])
    served[0].requests.clear()

    def once(handler: BaseHTTPRequestHandler) -> None:
        served[0].reply = None
        broken(handler)

    served[0].reply = once
    assert engine.score(PAIRS[:1]) == right
    assert len(served[0].requests) == 2
    served[0].reply = broken
    with pytest.raises(TransientError, match="did not answer 4 times") as caught:
        engine.score(PAIRS[:1])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("status", [302, 307])
def test_neither_the_key_nor_the_prompt_follows_a_redirect(
    status: int, served: tuple[Server, Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    engine, other = engine_of(served), Server(served[2])
    threading.Thread(target=other.serve_forever, args=[0.01], daemon=True).start()
    served[0].reply = lambda handler: send(handler, status, b"", Location=other.url + "/completions")
    with pytest.raises(UsageError, match=rf"redirects \({status}\) to {other.url}/completions"):
        engine.score(PAIRS[:1])
    assert other.requests == []
    assert len(served[0].requests) == 1
    other.shutdown()
    other.server_close()


@pytest.mark.parametrize("key", ["sk-secret\n", "sk-secret\r", " sk-secret "])
def test_white_space_around_the_key_is_stripped(
    key: str, served: tuple[Server, Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key)
    engine_of(served).score(PAIRS[:1])
    assert served[0].requests[0][1] == "Bearer sk-secret"


@pytest.mark.parametrize("key", ["sk-secret\nx", "sk-sécret", "sk secret", "sk-secret\x00x"])
def test_a_key_that_no_header_carries_is_refused_and_not_shown(
    key: str, served: tuple[Server, Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if "\x00" in key:
        monkeypatch.setattr(os, "environ", {**os.environ, "OPENAI_API_KEY": key})
    else:
        monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(UsageError, match="OPENAI_API_KEY contains") as caught:
        engine_of(served)
    assert "cret" not in str(caught.value)


def test_a_key_that_the_server_repeats_is_not_shown(served: tuple[Server, Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    engine = engine_of(served)
    served[0].reply = lambda handler: send(handler, 401, b"wrong key:\n\x1b[31m sk-secret")
    with pytest.raises(DataError, match=r"401 wrong key: \?\[31m \[key\]"):
        engine.score(PAIRS[:1])


def test_the_key_goes_over_http_to_this_machine_only(served: tuple[Server, Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    _, folder, lm = served
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    for host in ("node7", "10.0.0.7", "localhost.example.org", "127.0.0.1.example.org", "0.0.0.0", "[2001:db8::1]"):
        with pytest.raises(UsageError, match="plain http to another machine") as caught:
            CompletionsEngine(f"http://{host}:8000/v1", "tiny", folder, lm.direction)
        assert "--key-over-http" in str(caught.value)
    for url in ("https://node7/v1", "http://127.0.0.1:1/v1", "http://[::1]:1/v1", "http://localhost:1/v1"):
        CompletionsEngine(url, "tiny", folder, lm.direction)
    CompletionsEngine("http://node7:8000/v1", "tiny", folder, lm.direction, key_over_http=True)
    monkeypatch.delenv("OPENAI_API_KEY")
    CompletionsEngine("http://node7:8000/v1", "tiny", folder, lm.direction)


def test_an_unusable_proxy_gives_one_sentence(served: tuple[Server, Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY", "all_proxy", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("all_proxy", "gopher://node:1")
    with pytest.raises(UsageError, match="the environment's proxy or certificates"):
        CompletionsEngine("https://node7/v1", "tiny", served[1], served[2].direction)


def test_no_proxy_is_asked_for_a_server_on_this_machine(
    served: tuple[Server, Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    assert engine_of(served).score(PAIRS[:1])[0].num_tokens


@pytest.mark.parametrize(
    "url",
    [
        "http://local host/v1",
        "http://localhost:99999/v1",
        "http://localhost:port/v1",
        "http://",
        "http://node\n/v1",
        "file:///etc/passwd",
        "http://user:password@node/v1",
        "http://node/v1?key=password",
        "http://node/v1/chat/completions",
    ],
)
def test_an_invalid_address_is_refused_in_one_line(url: str, served: tuple[Server, Path, Any]) -> None:
    with pytest.raises(UsageError, match=r"not the address of a server|chat endpoint|a user, a query") as caught:
        CompletionsEngine(url, "tiny", served[1], served[2].direction)
    assert "\n" not in str(caught.value)
    assert "password" not in str(caught.value)


def test_the_whole_address_of_the_completions_is_accepted_too(served: tuple[Server, Path, Any]) -> None:
    engine_of(served)
    engine = CompletionsEngine(served[0].url + "/completions/", "tiny", served[1], served[2].direction)
    assert engine.score(PAIRS[:1])[0].num_tokens
    assert served[0].requests[0][0] == "/v1/completions"


def test_the_tool_ranks_with_a_served_model(
    served: tuple[Server, Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One model on the server, the other in this process: the same scores as with both in this process."""
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
        assert run_tool(monkeypatch, "rerank", *common, "--output", tmp_path / name, *more) == 0
        scores.append(json.loads((tmp_path / name).read_text(encoding="utf-8"))["scores"])
    for ours, theirs in zip(*scores, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-3)
    assert {asked["model"] for _, _, asked in server.requests} == {"tiny"}

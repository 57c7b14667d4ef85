"""A server whose models run on upstreams: the answers of a server that runs them itself, checks at the start, errors, and clients that leave."""

import json
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi.responses import HTMLResponse, JSONResponse
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from megatron_ledom.direction import Direction, to_model_order
from megatron_ledom.errors import MismatchError, RemoteAnswerError, TransientError, UsageError
from megatron_ledom.inference.joint_tokenizer import JointTokenizer
from megatron_ledom.inference.scoring import Span
from megatron_ledom.serving.settings import ServeSettings
from megatron_ledom.serving.upstream import PROBES, connect, key_variable
from tests.support.closeness import close
from tests.support.served import Served, events_of, serving, until
from tests.support.tiny_models import (
    TOKENIZERS,
    chain_model,
    divided_characters_folder,
    random_model_folder,
    save_model_folder,
    tiny_config,
)
from tests.support.upstream_server import Upstream, upstream_in_thread, upstream_of

KEY = "sk-upstream-42-Zx9q7LmT"
SECRET = "a text that nobody may log"
FOLLOWING = ["Paris is nice, of course.", "hedral, 漢字 and a café", " of the cat.\n"]
PRECEDING = ["The capital of France", "The cat sat on the mat. 漢", "Once upon a t"]
PAIRS = [("The capital", " of France is Paris"), ("Once upon", " a time 漢字"), ("", "two"), ("one\n", "two")]


@pytest.fixture(scope="module")
def upstreams(folders: tuple[Path, Path]) -> Iterator[tuple[Upstream, Upstream]]:
    """The upstreams of the forward and the reverse model; they need a key."""
    with upstream_of(folders[0], TEST_UPSTREAM_KEY=KEY) as forward, upstream_of(folders[1], TEST_UPSTREAM_KEY=KEY) as reverse:
        yield forward, reverse


@pytest.fixture(scope="module")
def thin(folders: tuple[Path, Path], upstreams: tuple[Upstream, Upstream]) -> Iterator[Served]:
    """A server before both upstreams."""
    options: list[object] = ["--forward", folders[0], "--forward-upstream", f"{upstreams[0].url}/v1"]
    options += ["--reverse", folders[1], "--upstream", upstreams[1].url, "--upstream-requests", 8]
    with serving(*options, LEDOM_UPSTREAM_API_KEY=KEY) as server:
        yield server


@pytest.mark.parametrize("body", [{"suffix": FOLLOWING}, {"model": "forward", "prompt": PRECEDING}], ids=["before", "after"])
@pytest.mark.parametrize("more", [{}, {"logprobs": 3}, {"stop": ["e", "th"], "echo": True}], ids=str)
def test_greedy_texts_are_those_of_a_server_that_runs_the_models(
    thin: Served, served: Served, body: dict[str, Any], more: dict[str, Any]
) -> None:
    request = {**body, "temperature": 0, "max_tokens": 24, **more}
    found, expected = (server.post("/v1/completions", request).json() for server in (thin, served))
    assert close(found["choices"], expected["choices"])
    assert found["usage"] == expected["usage"]
    assert len({choice["text"] for choice in found["choices"]}) == 3


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/score", {"pairs": [{"preceding": a, "following": b} for a, b in PAIRS], "include_ends": True}),
        (
            "/v1/reward",
            {"prompt": "The capital is", "candidates": [" Paris", "", " 漢字"], "weight": 0.3, "token_values": True},
        ),
        ("/v1/reward", {"prompt": "The capital is", "candidates": [f" {n}" for n in range(300)], "include_ends": True}),
        ("/v2/rerank", {"query": "What?", "documents": ["Paris", "Berlin", "漢字"], "top_n": 2}),
        ("/get_reward?weight=0.25", {"query": ["<s>The cat sat</s>"], "prompts": ["The cat"]}),
    ],
)
def test_scores_and_rewards_are_those_of_a_server_that_runs_the_models(
    thin: Served, served: Served, path: str, body: dict[str, Any]
) -> None:
    found, expected = (server.post(path, body).json() for server in (thin, served))
    for answer in (found, expected):
        answer.pop("id", None)
    assert close(found, expected), found


def test_one_model_may_run_on_an_upstream_and_the_other_in_the_server(
    folders: tuple[Path, Path], upstreams: tuple[Upstream, Upstream], served: Served
) -> None:
    options: list[object] = ["--forward", folders[0], "--reverse", folders[1], "--upstream", upstreams[1].url]
    bodies = [{"prompt": f"The capital {number}", "candidates": [" Paris", " x"]} for number in range(6)]
    with serving(*options, LEDOM_UPSTREAM_API_KEY=KEY) as mixed, ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda body: mixed.post("/v1/reward", body).json(), bodies))
        text = {"model": "forward", "prompt": "The capital", "temperature": 0}
        written = mixed.post("/v1/completions", text).json()["choices"]
        assert written == served.post("/v1/completions", text).json()["choices"]
    assert close(found, [served.post("/v1/reward", body).json() for body in bodies])


@pytest.mark.parametrize(
    "body", [{"suffix": FOLLOWING[0]}, {"model": "forward", "prompt": PRECEDING[0]}], ids=["before", "after"]
)
def test_a_stream_joins_to_the_text_and_a_seed_repeats_it(thin: Served, body: dict[str, Any]) -> None:
    request = {**body, "max_tokens": 16, "n": 3, "seed": 5, "stop": ["th"]}
    whole = [choice["text"] for choice in thin.post("/v1/completions", request).json()["choices"]]
    events = events_of(thin.post("/v1/completions", {**request, "stream": True}).text)
    texts = [""] * 3
    for event in events:
        for choice in event["choices"]:
            place, piece = choice["index"], choice["text"]
            texts[place] = piece + texts[place] if event["text_stands"] == "before" else texts[place] + piece
    assert texts == whole
    assert len(set(whole)) == 3


def test_no_event_of_a_stream_divides_a_character(tmp_path: Path) -> None:
    folder = tmp_path / "chain"
    following, pieces = divided_characters_folder(folder)
    with upstream_in_thread(folder) as upstream, serving("--reverse", folder, "--upstream", upstream.url) as server:
        body = {"suffix": following, "temperature": 0, "max_tokens": 12, "stream": True}
        *events, last = events_of(server.post("/v1/completions", body).text)
    assert [event["choices"][0]["text"] for event in events] == pieces
    assert last["choices"][0]["finish_reason"] == "stop"


def test_requests_run_together_on_the_upstream_up_to_the_limit(thin: Served, upstreams: tuple[Upstream, Upstream]) -> None:
    body = {"suffix": FOLLOWING[0], "temperature": 0, "max_tokens": 6}
    expected = thin.post("/v1/completions", body).json()["choices"]
    upstreams[1].meet(seconds=0.05)
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda _: thin.post("/v1/completions", body).json()["choices"], range(12)))
    assert answers == [expected] * 12
    assert 4 <= upstreams[1].state["most"] <= 8
    upstreams[1].meet()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("seconds", [0.05, 60])
def test_a_client_that_leaves_ends_the_request_on_the_upstream(
    thin: Served, upstreams: tuple[Upstream, Upstream], stream: bool, seconds: float
) -> None:
    upstream = upstreams[1]
    upstream.meet(seconds=seconds)
    body = json.dumps({"suffix": " is nice", "max_tokens": 480, "stream": stream}).encode()  # no token healing
    host, port = thin.url.removeprefix("http://").split(":")
    before = upstream.state["left"]
    with socket.create_connection((host, int(port)), 60) as connection:
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        until(lambda: upstream.state["running"] == 1)
    until(lambda: upstream.state["running"] == 0)
    assert upstream.state["left"] > before
    upstream.meet()


def test_failures_of_the_upstream_are_502_and_503(thin: Served, upstreams: tuple[Upstream, Upstream]) -> None:
    body = {"suffix": FOLLOWING[0], "max_tokens": 8, "temperature": 0}
    reward = {"prompt": "The capital", "candidates": [" Paris"], "weight": 1.0}
    expected = thin.post("/v1/completions", body).json()["choices"]
    cases: list[tuple[dict[str, Any], str, dict[str, Any], int, str]] = [
        ({"status": 400, "times": 1}, "/v1/completions", body, 502, "upstream_refused"),
        ({"status": 400, "times": 1}, "/v1/reward", reward, 502, "upstream_refused"),
        ({"break_after": 0}, "/v1/completions", body, 503, "upstream_unavailable"),
        ({"error_after": 0}, "/v1/completions", {**body, "stream": True}, 503, "upstream_unavailable"),
    ]
    for following, path, request, status, code in cases:
        upstreams[1].meet(**following)
        answer = thin.post(path, request)
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code), answer.text
        assert upstreams[1].url.removeprefix("http://") not in answer.text
        assert ("retry-after" in answer.headers) == (status == 503)
    upstreams[1].meet(error_after=2)
    *_, last = events_of(thin.post("/v1/completions", {**body, "stream": True}).text)
    assert last["error"]["code"] == "upstream_unavailable"
    upstreams[1].meet(status=503, times=1)
    assert thin.post("/v1/completions", body).json()["choices"] == expected


def test_tokens_count_once_if_the_upstream_ends_its_answer_late(thin: Served, upstreams: tuple[Upstream, Upstream]) -> None:
    before = thin.metric("ledom_tokens_total")
    body = {"suffix": " is nice", "max_tokens": 3, "temperature": 0}
    used = thin.post("/v1/completions", body).json()["usage"]["total_tokens"]
    assert thin.metric("ledom_tokens_total") == before + used
    upstreams[1].meet(end_seconds=60)
    assert thin.post("/v1/completions", body).status_code == 200
    until(lambda: upstreams[1].state["running"] == 0)
    assert thin.metric("ledom_tokens_total") == before + 2 * used
    upstreams[1].meet()


def test_no_text_and_no_key_is_in_the_log(thin: Served, upstreams: tuple[Upstream, Upstream]) -> None:
    upstreams[1].meet(status=400, times=1)
    assert thin.post("/v1/completions", {"suffix": SECRET, "max_tokens": 2}).status_code == 502
    assert thin.post("/v1/completions", {"suffix": SECRET, "max_tokens": 2}).status_code == 200
    assert thin.post("/v1/reward", {"prompt": SECRET, "candidates": [SECRET]}).status_code == 200
    assert SECRET not in thin.log
    assert KEY not in thin.log
    assert upstreams[1].url not in thin.log.partition("running on")[2]


def settings(reverse: Path, upstream: Upstream | str, **more: Any) -> ServeSettings:
    """Return the settings of a server with one model on an upstream."""
    url = upstream if isinstance(upstream, str) else upstream.url
    return ServeSettings(reverse=reverse, upstream=url, timeout_seconds=20, **more)


@pytest.fixture(scope="module")
def lone_upstream(folders: tuple[Path, Path]) -> Iterator[Upstream]:
    """An upstream of the reverse model, with a short context."""
    with upstream_in_thread(folders[1], max_model_len=64) as upstream:
        yield upstream


@pytest.fixture(scope="module")
def short(lone_upstream: Upstream, folders: tuple[Path, Path]) -> Iterator[Served]:
    """A server before the upstream with a short context."""
    with serving("--reverse", folders[1], "--upstream", lone_upstream.url) as server:
        yield server


def test_the_context_of_the_upstream_counts(short: Served, lone_upstream: Upstream, folders: tuple[Path, Path]) -> None:
    for pair, status in ((("x " * 20, "y"), 200), (("x " * 80, "y"), 400)):
        pairs = [{"preceding": pair[0], "following": pair[1]}]
        assert short.post("/v1/score", {"pairs": pairs}).status_code == status
    assert short.post("/v1/completions", {"suffix": "y", "max_tokens": 62, "temperature": 0}).status_code == 200
    refused = short.post("/v1/completions", {"suffix": "y", "max_tokens": 64})
    assert "exceed the 64 positions" in refused.json()["error"]["message"]
    engine = connect(settings(folders[1], lone_upstream), Direction.REVERSE, folders[1])
    tokens = engine.tokenizer.encode("a b c d e f g h i j k l m n o p q r s t u v w x y z " * 2)
    assert len(engine.logprobs([Span(tokens[:63], 1)])[0]) == 62
    with pytest.raises(RemoteAnswerError, match="maximum context length"):
        engine.logprobs([Span(tokens[:64], 1)])


def test_a_server_that_does_not_answer_is_named(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(TransientError, match=f"{url}/v1/models did not answer 4 times .*check that it runs"):
            connect(settings(folders[1], url), Direction.REVERSE, folders[1])


def test_a_missing_key_is_named(folders: tuple[Path, Path], upstreams: tuple[Upstream, Upstream]) -> None:
    with pytest.raises(RemoteAnswerError, match=r"401 .*LEDOM_UPSTREAM_API_KEY"):
        connect(settings(folders[1], upstreams[1]), Direction.REVERSE, folders[1])


def test_no_key_goes_to_two_hosts(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def variables(reverse_url: str, forward_url: str) -> list[str]:
        made = settings(folders[1], reverse_url, forward=folders[0], forward_upstream=forward_url)
        return [key_variable(made, direction) for direction in (Direction.REVERSE, Direction.FORWARD)]

    reverse, forward = "LEDOM_UPSTREAM_API_KEY", "LEDOM_FORWARD_UPSTREAM_API_KEY"
    one, two = ("https://a.example/v1", "https://a.example:81/v1"), ("https://a.example/v1", "https://b.example/v1")
    assert variables(*two) == [reverse, forward]
    monkeypatch.setenv(reverse, KEY)
    assert variables(*one) == variables("http://localhost:1", "http://127.0.0.1:2/v1") == [reverse, reverse]
    made = settings(folders[1], two[0], forward=folders[0], forward_upstream=two[1])
    with pytest.raises(UsageError, match=f"two hosts, a.example and b.example, and only one key is set; set {forward}"):
        connect(made, Direction.REVERSE, folders[1])
    monkeypatch.setenv(forward, "")
    assert variables(*two) == variables(*one) == [reverse, forward]
    monkeypatch.delenv(reverse)
    with pytest.raises(UsageError, match=f"set {reverse}"):
        variables(*two)


def test_a_name_that_the_upstream_has_not_is_refused(lone_upstream: Upstream, folders: tuple[Path, Path]) -> None:
    with pytest.raises(UsageError, match=r"has no model 'other'; pass --upstream-model NAME .*: served, an-adapter"):
        connect(settings(folders[1], lone_upstream, upstream_model="other"), Direction.REVERSE, folders[1])
    connect(settings(folders[1], lone_upstream, upstream_model="served"), Direction.REVERSE, folders[1])
    with pytest.raises(UsageError, match="--forward-upstream needs --forward"):
        settings(folders[1], lone_upstream, forward_upstream="http://localhost:1")


def test_an_adapter_has_the_context_of_its_model(lone_upstream: Upstream, folders: tuple[Path, Path]) -> None:
    for name in ("served", "an-adapter"):
        assert (
            connect(settings(folders[1], lone_upstream, upstream_model=name), Direction.REVERSE, folders[1]).num_positions == 64
        )


@pytest.mark.parametrize(
    "tokenized",
    [
        JSONResponse({"detail": "no"}, 401),
        JSONResponse({"detail": "no"}, 403),
        JSONResponse({"detail": "broken"}, 500),
        HTMLResponse("<p>a proxy's page</p>"),
        {"tokens": []},
        {"ids": [1]},
        [{"id": 1}],
    ],
    ids=lambda one: str(getattr(one, "status_code", one)),
)
def test_without_a_usable_tokenize_the_names_of_tokens_are_compared(
    tmp_path: Path, folders: tuple[Path, Path], tokenized: Any
) -> None:
    other = random_model_folder(tmp_path / "other", "byte_level", "reverse", num_extra_rows=200)
    with upstream_in_thread(other, tokenized=tokenized) as upstream:
        with pytest.raises(MismatchError, match="or has another tokenizer"):
            connect(settings(folders[1], upstream), Direction.REVERSE, folders[1])
        connect(settings(other, upstream), Direction.REVERSE, other)


@pytest.mark.parametrize("tokenizes", [True, False], ids=["tokenize", "names"])
def test_an_upstream_with_another_tokenizer_is_refused(tmp_path: Path, folders: tuple[Path, Path], tokenizes: bool) -> None:
    other = random_model_folder(tmp_path / "other", "byte_level", "reverse", num_extra_rows=200)
    says = "tokenizer of .* other ids than that of" if tokenizes else "or has another tokenizer"
    with upstream_in_thread(other, tokenizes=tokenizes) as upstream:
        with pytest.raises(MismatchError, match=says):
            connect(settings(folders[1], upstream), Direction.REVERSE, folders[1])
        connect(settings(other, upstream), Direction.REVERSE, other)


def test_an_upstream_with_a_smaller_vocabulary_is_refused(tmp_path: Path, folders: tuple[Path, Path]) -> None:
    tokenizer = Tokenizer.from_str(TOKENIZERS["sentencepiece"]())
    small = tmp_path / "small"
    LlamaForCausalLM(tiny_config(tokenizer.get_vocab_size() - 1)).save_pretrained(small)
    (small / "tokenizer.json").write_text(TOKENIZERS["sentencepiece"]())
    with upstream_in_thread(small) as upstream, pytest.raises(RemoteAnswerError, match="out of vocabulary"):
        connect(settings(folders[1], upstream), Direction.REVERSE, folders[1])


def test_an_upstream_with_other_weights_is_refused(tmp_path: Path, folders: tuple[Path, Path]) -> None:
    torch.manual_seed(8)
    tokenizer_json = TOKENIZERS["sentencepiece"]()
    model = LlamaForCausalLM(tiny_config(Tokenizer.from_str(tokenizer_json).get_vocab_size()))
    other = save_model_folder(tmp_path / "other", model, tokenizer_json, "reverse")
    with upstream_in_thread(other) as upstream:
        with pytest.raises(MismatchError, match="has other weights than"):
            connect(settings(folders[1], upstream), Direction.REVERSE, folders[1])
        connect(settings(other, upstream), Direction.REVERSE, other)


def test_an_upstream_that_does_not_write_as_it_should_is_refused(folders: tuple[Path, Path]) -> None:
    for field in ("allowed_token_ids", "return_token_ids"):
        says = f"refuses the request: 400 .*{field}: Extra inputs"
        with upstream_in_thread(folders[1], refused=field) as upstream, pytest.raises(RemoteAnswerError, match=says):
            connect(settings(folders[1], upstream), Direction.REVERSE, folders[1])
    with (
        upstream_in_thread(folders[1], processed=True) as upstream,
        pytest.raises(MismatchError, match="without --logprobs-mode"),
    ):
        connect(settings(folders[1], upstream), Direction.REVERSE, folders[1])


def order_model(direction: Direction) -> LlamaForCausalLM:
    """Return a model that knows the order of the probe texts: it prefers the token that most often follows another in it."""
    tokenizer = Tokenizer.from_str(TOKENIZERS["sentencepiece"]())
    joint = JointTokenizer(tokenizer)
    following: dict[int, int] = {}
    for text in PROBES:
        for token, next_token in pairwise(to_model_order(joint.encode(text), direction)):
            following.setdefault(token, next_token)
    return chain_model(tokenizer.get_vocab_size(), following)


def test_the_twin_of_the_other_direction_is_refused_without_reading_large_weights(
    tmp_path: Path, folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    twins = {
        direction: save_model_folder(
            tmp_path / direction, order_model(direction), TOKENIZERS["sentencepiece"](), str(direction)
        )
        for direction in Direction
    }
    monkeypatch.setattr("megatron_ledom.serving.upstream.SMALL_BYTES", 0)
    reverse = twins[Direction.REVERSE]
    with upstream_in_thread(twins[Direction.FORWARD]) as upstream:
        with pytest.raises(MismatchError, match=f"serves a forward model, {reverse} is a reverse model: ordinary texts"):
            connect(settings(reverse, upstream), Direction.REVERSE, reverse)
        with pytest.raises(MismatchError, match="has other weights than"):
            connect(settings(reverse, upstream, check_upstream_weights=True), Direction.REVERSE, reverse)
    with upstream_in_thread(reverse) as upstream:
        connect(settings(reverse, upstream), Direction.REVERSE, reverse)
        assert not caplog.records
        with pytest.raises(MismatchError, match="records the direction 'forward', expected 'reverse'"):
            connect(settings(twins[Direction.FORWARD], upstream), Direction.REVERSE, twins[Direction.FORWARD])
    with upstream_in_thread(folders[1]) as upstream:
        connect(settings(folders[1], upstream), Direction.REVERSE, folders[1])
    assert "the direction of the upstream is unclear" in caplog.text


def test_the_end_of_the_server_waits_for_the_upstream(short: Served, lone_upstream: Upstream) -> None:
    answers: list[int] = []
    lone_upstream.meet(seconds=0.05)
    body = {"suffix": " is nice", "max_tokens": 20}
    threads = [
        threading.Thread(target=lambda: answers.append(short.post("/v1/completions", body).status_code)) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    until(lambda: lone_upstream.state["running"] == 3)
    assert short.end() == 0
    for thread in threads:
        thread.join()
    lone_upstream.meet()
    assert answers == [200] * 3

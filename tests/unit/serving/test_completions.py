"""Completions of the running server: texts of the library, seeds, wrong fields, log-probabilities, streams."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from openai import BadRequestError, NotFoundError, OpenAI

from megatron_ledom.inference import ForwardLM, ReverseLM, TransformersEngine
from megatron_ledom.inference.engines.engine import empty_answer
from megatron_ledom.inference.generation import Sampling
from tests.support.served import Served, events_of, serving
from tests.support.tiny_models import SPECIALS, divided_characters_folder

FOLLOWING = "Paris is nice, of course."
PRECEDING = "The capital of France"


@pytest.fixture(scope="module")
def client(served: Served) -> OpenAI:
    """The stock client."""
    return OpenAI(base_url=f"{served.url}/v1", api_key="unused", max_retries=0)


@pytest.fixture(scope="module")
def models(folders: tuple[Path, Path]) -> tuple[ForwardLM, ReverseLM]:
    """The models of the server, in this process."""
    return ForwardLM.from_pretrained(folders[0]), ReverseLM.from_pretrained(folders[1])


def test_the_stock_client_lists_the_models(client: OpenAI) -> None:
    found = {model.id: model.model_dump() for model in client.models.list()}
    assert sorted(found) == ["forward", "reverse"]
    assert found["reverse"]["direction"] == "reverse"
    assert (found["reverse"]["max_model_len"], len(found["reverse"]["tokenizer_sha256"])) == (512, 64)


def test_greedy_texts_are_those_of_the_library(client: OpenAI, models: tuple[ForwardLM, ReverseLM]) -> None:
    (expected,) = models[1].generate_preceding(FOLLOWING, max_new_tokens=12)
    answer = client.completions.create(model="reverse", prompt=None, suffix=FOLLOWING, temperature=0, max_tokens=12)
    assert answer.choices[0].text == expected.preceding
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 12
    echoed = client.completions.create(model="reverse", prompt="", suffix=FOLLOWING, temperature=0, max_tokens=12, echo=True)
    assert echoed.choices[0].text == expected.text
    (onward,) = models[0].generate_following(PRECEDING, max_new_tokens=12)
    answer = client.completions.create(model="forward", prompt=PRECEDING, temperature=0, max_tokens=12)
    assert answer.choices[0].text == onward.following
    assert answer.choices[0].finish_reason == "length"


def test_seeded_samples_of_the_forward_model_are_those_of_the_library(
    client: OpenAI, models: tuple[ForwardLM, ReverseLM]
) -> None:
    sampling = Sampling(max_new_tokens=10, temperature=0.9, top_p=0.8, num_return_sequences=3, seed=5)
    (expected,) = TransformersEngine(models[0]).sample([empty_answer(PRECEDING, sampling)], sampling)
    answer = client.completions.create(
        model="forward", prompt=PRECEDING, temperature=0.9, top_p=0.8, n=3, seed=5, max_tokens=10
    )
    assert [choice.text for choice in answer.choices] == [one.text for one in expected]
    assert len({choice.text for choice in answer.choices}) == 3


def test_a_seed_gives_the_same_text_whatever_else_is_in_the_batch(served: Served) -> None:
    def body(number: int) -> dict[str, Any]:
        more = {"n": 1 + number % 3, "temperature": 0.5 + number % 2, "top_p": 0.9 if number % 2 else 1.0}
        return {"suffix": FOLLOWING[number % 4 :], "seed": number, "max_tokens": 4 + number, **more}

    def texts(number: int) -> list[str]:
        return [choice["text"] for choice in served.post("/v1/completions", body(number)).json()["choices"]]

    alone = [texts(number) for number in range(10)]
    before = served.metric("ledom_batch_sequences_count")
    with ThreadPoolExecutor(10) as pool:
        together = list(pool.map(texts, range(10)))
    assert together == alone
    assert served.metric("ledom_batch_sequences_count") - before < 10


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"model": "reverse", "prompt": "a"}, "takes `suffix` (the text that follows), not `prompt`"),
        ({"model": "forward", "prompt": None, "suffix": "a"}, "takes `prompt` (the text that precedes), not `suffix`"),
        ({"model": "reverse", "prompt": None}, "give the text in `suffix`"),
        ({"model": "reverse", "prompt": None, "suffix": "a", "echo": True, "logprobs": 1}, "POST /v1/score"),
        ({"model": "reverse", "prompt": None, "suffix": "a", "best_of": 3}, "best_of is not supported"),
        ({"model": "reverse", "prompt": None, "suffix": "a", "stream": True, "logprobs": 1}, "not part of a stream"),
        ({"model": "reverse", "prompt": None, "suffix": "a", "n": 2, "temperature": 0}, "would all be the same"),
        ({"model": "reverse", "prompt": None, "suffix": "a", "max_tokens": 512}, "lower max_tokens"),
        ({"model": "reverse", "prompt": None, "suffix": "a", "max_tokens": 600, "stream": True}, "lower max_tokens"),
        ({"model": "reverse", "prompt": None, "suffix": "a", "extra_body": {"top_k": 3}}, "top_k"),
    ],
)
def test_a_wrong_request_is_told_the_remedy(client: OpenAI, fields: dict[str, Any], says: str) -> None:
    with pytest.raises(BadRequestError) as refused:
        client.completions.create(**fields)
    assert says in refused.value.message


def test_an_unknown_model_is_404(client: OpenAI) -> None:
    with pytest.raises(NotFoundError, match="use one of: reverse, forward"):
        client.completions.create(model="gpt-4", prompt="a")


@pytest.mark.parametrize("model", ["reverse", "forward"])
def test_logprobs_are_those_of_scoring_and_offsets_point_at_the_tokens(served: Served, model: str) -> None:
    given = {"suffix": FOLLOWING} if model == "reverse" else {"prompt": PRECEDING + "."}
    body = {"model": model, **given, "max_tokens": 9, "seed": 3, "logprobs": 2}
    choice = served.post("/v1/completions", body).json()["choices"][0]
    found = choice["logprobs"]
    assert len(found["tokens"]) == len(found["token_logprobs"]) == len(found["text_offset"]) == 9
    for token, offset in zip(found["tokens"], found["text_offset"], strict=True):
        shown = choice["text"][offset:]
        assert "\ufffd" in token or token in SPECIALS or shown.startswith(token.lstrip() if offset == 0 else token)
    assert found["text_offset"] == sorted(found["text_offset"])
    for token, value, likeliest in zip(found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True):
        assert "\ufffd" in token or likeliest[token] == value
        assert max(likeliest.values()) >= value


@pytest.mark.parametrize("model", ["reverse", "forward"])
@pytest.mark.parametrize("stop", [None, ["e"], ["th", " c", "漢"]], ids=str)
def test_a_stream_grows_into_the_whole_text(served: Served, model: str, stop: list[str] | None) -> None:
    given = {"suffix": FOLLOWING} if model == "reverse" else {"prompt": PRECEDING}
    for seed in range(3):
        body = {"model": model, **given, "max_tokens": 24, "seed": seed, "stop": stop, "temperature": 1.5}
        whole = served.post("/v1/completions", body).json()["choices"][0]
        options = {"stream": True, "stream_options": {"include_usage": True}}
        *pieces, last, usage = events_of(served.post("/v1/completions", {**body, **options}).text)
        text = ""
        for event in pieces:
            piece = event["choices"][0]["text"]
            assert piece
            text = piece + text if model == "reverse" else text + piece
        assert text == whole["text"]
        assert last["choices"][0]["finish_reason"] == whole["finish_reason"]
        assert usage["usage"]["completion_tokens"] > 0


def test_the_stock_client_reads_a_stream_of_several_choices(client: OpenAI) -> None:
    options = {"model": "reverse", "prompt": "", "suffix": FOLLOWING, "max_tokens": 8, "n": 2, "seed": 1}
    whole = [choice.text for choice in client.completions.create(**options).choices]  # type: ignore[call-overload]
    texts = {0: "", 1: ""}
    for event in client.completions.create(**options, stream=True):  # type: ignore[call-overload]
        for choice in event.choices:
            texts[choice.index] = choice.text + texts[choice.index]
    assert [texts[0], texts[1]] == whole


def test_no_event_of_a_stream_divides_a_character(tmp_path: Path) -> None:
    folder = tmp_path / "chain"
    following, pieces = divided_characters_folder(folder)
    with serving("--reverse", folder) as server:
        body = {"suffix": following, "temperature": 0, "max_tokens": 12, "stream": True}
        *events, last = events_of(server.post("/v1/completions", body).text)
        texts = [event["choices"][0]["text"] for event in events]
        assert texts == pieces
        assert last["choices"][0]["finish_reason"] == "stop"
        refused = server.post("/v1/reward", {"prompt": "a", "candidates": ["b"]})
        assert "no forward model; pass weight 1" in refused.json()["error"]["message"]
        alone = server.post("/v1/reward", {"prompt": "a", "candidates": ["b"], "weight": 1}).json()
        assert alone["results"][0]["forward_logprob"] is None
        assert alone["rewards"] == [alone["results"][0]["reverse_logprob"]]
        assert server.post("/rerank", {"query": "a", "documents": ["b"]}).json()["results"][0]["index"] == 0

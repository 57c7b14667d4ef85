"""Completions with `prompt` and `suffix` of the running server: the texts of the library, samples, and wrong requests."""

from pathlib import Path

import pytest
from openai import BadRequestError, OpenAI

from megatron_ledom.inference.generation import Sampling
from megatron_ledom.inference.infilling.command import load_models
from megatron_ledom.inference.infilling.infiller import Filled, Gap, Infiller, Infilling, InfillSettings
from megatron_ledom.serving.infilling import infill_fields
from megatron_ledom.serving.schemas import CompletionRequest
from tests.support.served import Served, serving
from tests.support.upstream_server import upstream_in_thread

PREFIX, SUFFIX = "The capital of France", " is nice, of course."


@pytest.fixture(scope="module")
def client(served: Served) -> OpenAI:
    """The stock client."""
    return OpenAI(base_url=f"{served.url}/v1", api_key="unused", max_retries=0)


def test_texts_between_prompt_and_suffix_are_those_of_the_library(client: OpenAI, folders: tuple[Path, Path]) -> None:
    settings = InfillSettings(sampling=Sampling(max_new_tokens=8, temperature=0.9, num_return_sequences=6))
    (expected,) = Infiller(*load_models(*folders, 16)).fill([Gap(PREFIX, SUFFIX, "5/0", settings)])
    options = {"temperature": 0.9, "n": 3, "best_of": 6, "seed": 5, "max_tokens": 8}
    answer = client.completions.create(model="reverse", prompt=PREFIX, suffix=SUFFIX, **options)
    best = list(dict.fromkeys(one.middle for one in expected.infillings))[:3]
    assert [choice.text for choice in answer.choices] == best
    first = answer.choices[0].model_dump()
    assert first["met"] is expected.infillings[0].met
    assert first["score"] == pytest.approx(expected.infillings[0].score, abs=1e-3)
    assert answer.model == "reverse+forward"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == sum(expected.written.values())


def test_several_gaps_and_echo(served: Served) -> None:
    body = {"prompt": [PREFIX, "Paris"], "suffix": [SUFFIX, "Berlin"], "temperature": 0, "max_tokens": 5, "echo": True}
    choices = served.post("/v1/completions", body).json()["choices"]
    assert [choice["text"].startswith(text) for choice, text in zip(choices, body["prompt"], strict=True)] == [True, True]
    assert [choice["text"].endswith(text) for choice, text in zip(choices, body["suffix"], strict=True)] == [True, True]
    assert [choice["index"] for choice in choices] == [0, 1]
    assert {choice["finish_reason"] for choice in choices} <= {"stop", "length"}


def test_the_index_of_a_text_tells_its_gap() -> None:
    few, many = (Filled([Infilling(text, "both", 1, finished=True) for text in texts], {}, {}) for texts in ("a", "bc"))
    request = CompletionRequest(prompt=["p", "q"], suffix=["s", "t"], n=2)
    gaps = [Gap(PREFIX, SUFFIX, "0", InfillSettings()), Gap(PREFIX, SUFFIX, "1", InfillSettings())]
    choices = infill_fields(request, gaps, [few, many])["choices"]
    assert [(choice["index"], choice["text"]) for choice in choices] == [(0, "a"), (2, "b"), (3, "c")]


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"stream": True}, "stream is not supported with prompt and suffix"),
        ({"logprobs": 1}, "logprobs is not supported with prompt and suffix"),
        ({"n": 3, "best_of": 2}, "best_of=2 must be from n=3"),
        ({"n": 2, "temperature": 0}, "would all be the same"),
        ({"frequency_penalty": 1}, "frequency_penalty is not supported"),
        ({"prompt": ["a", "b"]}, "2 and 1 texts; give as many of each"),
        ({"max_tokens": 300}, "shorten the texts or lower max_tokens"),
    ],
)
def test_a_wrong_request_is_told_the_remedy(client: OpenAI, fields: dict[str, object], says: str) -> None:
    with pytest.raises(BadRequestError) as refused:
        client.completions.create(**{"model": "forward", "prompt": PREFIX, "suffix": SUFFIX, **fields})  # type: ignore[call-overload]
    assert says in refused.value.message


def test_a_server_without_a_forward_model_refuses_to_infill(lone: Served) -> None:
    answer = lone.post("/v1/completions", {"prompt": "a", "suffix": "b"}, headers={"Authorization": "Bearer right key"})
    assert answer.status_code == 400
    assert "needs a forward and a reverse model" in answer.json()["error"]["message"]


def test_a_model_on_an_upstream_fills_gaps_with_one_of_this_process(folders: tuple[Path, Path], served: Served) -> None:
    body = {"prompt": PREFIX, "suffix": SUFFIX, "temperature": 0, "max_tokens": 6}
    local = served.post("/v1/completions", body).json()["choices"][0]
    with (
        upstream_in_thread(folders[1]) as upstream,
        serving("--forward", folders[0], "--reverse", folders[1], "--upstream", f"{upstream.url}/v1") as server,
    ):
        answer = server.post("/v1/completions", body).json()
    assert answer["choices"][0]["text"] == local["text"]
    assert answer["choices"][0]["score"] == pytest.approx(local["score"], abs=1e-2)

"""Rows that a completions server writes: the results of the same model here, streams that are closed, and wrong answers."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_ledom.errors import RemoteAnswerError, TransientError
from megatron_ledom.inference import ForwardLM, ReverseLM
from megatron_ledom.inference.engines.completions_engine import CompletionsEngine
from megatron_ledom.inference.engines.completions_rows import CompletionsRows
from megatron_ledom.inference.generation import Sampling
from megatron_ledom.inference.language_model import LanguageModel
from megatron_ledom.inference.row_generation import RowRequest, RowResult, write_rows
from tests.support.served import until
from tests.support.tiny_models import TOKENIZERS, random_model_folder
from tests.support.upstream_server import Upstream, upstream_in_thread

TEXTS = ["The cat, sat on the mat.", "aris is nice", "漢字 and\n", "x"]
Served = tuple[LanguageModel, Upstream, CompletionsRows]


def rows_of(folder: Path, upstream: Upstream, direction: Any, most: int = 4) -> CompletionsRows:
    return CompletionsRows(CompletionsEngine(f"{upstream.url}/v1", "served", folder, direction, batch_size=2), most)


@pytest.fixture(scope="module", params=[(kind, name) for kind in (ReverseLM, ForwardLM) for name in TOKENIZERS], ids=str)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A model with rows of padding in its embedding, here and on a server."""
    kind, tokenizer = request.param
    folder = random_model_folder(tmp_path_factory.mktemp("rows") / "m", tokenizer, str(kind.direction), num_extra_rows=64)
    with upstream_in_thread(folder) as upstream:
        yield kind.from_pretrained(folder, device="cpu"), upstream, rows_of(folder, upstream, kind.direction)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Upstream, dict[str, Any]]]:
    """A reverse model on a server whose events `changes["event"]` makes wrong."""
    folder = random_model_folder(tmp_path_factory.mktemp("one") / "m", "sentencepiece", "reverse")
    changes: dict[str, Any] = {}
    with upstream_in_thread(folder, change=lambda event: changes.get("event", lambda same: same)(event)) as upstream:
        yield folder, upstream, changes


def same(found: RowResult, expected: RowResult) -> bool:
    """Return True for equal results; log-probabilities may differ by rounding."""
    assert found.generation == expected.generation
    assert (found.num_given, found.num_new) == (expected.num_given, expected.num_new)
    assert [(token.text, token.offset) for token in found.tokens] == [(token.text, token.offset) for token in expected.tokens]
    for mine, other in zip(found.tokens, expected.tokens, strict=True):
        assert mine.logprob == pytest.approx(other.logprob, abs=1e-5)
        assert [name for name, _ in mine.likeliest] == [name for name, _ in other.likeliest]
        assert [value for _, value in mine.likeliest] == pytest.approx([value for _, value in other.likeliest], abs=1e-5)
    return True


def test_rows_of_a_server_are_those_of_the_same_model_here(served: Served) -> None:
    model, _, rows = served
    stops: list[list[str]] = [[], ["e"], ["th", "."]]
    requests = [
        RowRequest(text, Sampling(max_new_tokens=3 + 4 * number, stop_strings=stop), f"{text}{number}", num_likeliest=number)
        for text in TEXTS
        for number, stop in enumerate(stops)
    ]
    ended: dict[int, RowResult] = {}
    found = rows.write_rows(requests, None, lambda index, result: ended.update({index: result}))
    assert all(map(same, found, write_rows(model, requests, batch_size=4)))
    assert [ended[index] for index in range(len(requests))] == found
    text, limit = "The cat sat on the mat", model.num_positions
    assert rows.growth_problem(text, 16) is None
    assert rows.growth_problem(text, limit or 0) == model.growth_problem(text, limit or 0)


def test_samples_are_repeatable_and_differ_by_their_keys(one: tuple[Path, Upstream, dict[str, Any]]) -> None:
    rows = rows_of(*one[:2], ReverseLM.direction)
    sampling = Sampling(max_new_tokens=8, temperature=1.0, top_p=0.9)
    requests = [RowRequest("The cat sat on", sampling, f"7/0/{number}") for number in range(4)]
    once = [result.generation for result in rows.write_rows(requests)]
    assert once == [rows.write_rows([request])[0].generation for request in requests]
    assert len({generation.text for generation in once}) == 4


def test_at_most_as_many_rows_as_wished_are_written_at_once(one: tuple[Path, Upstream, dict[str, Any]]) -> None:
    folder, upstream, _ = one
    requests = [RowRequest("The cat sat on", Sampling(max_new_tokens=3), str(number)) for number in range(7)]
    upstream.meet(seconds=0.01)
    rows_of(folder, upstream, ReverseLM.direction, most=3).write_rows(requests)
    assert upstream.state["most"] == 3
    upstream.meet()


def test_a_row_that_nobody_wants_ends_its_request_on_the_server(one: tuple[Path, Upstream, dict[str, Any]]) -> None:
    folder, upstream, _ = one
    rows = rows_of(folder, upstream, ReverseLM.direction)
    request, before = RowRequest("The cat sat on", Sampling(max_new_tokens=400, temperature=1.0), "1"), upstream.state
    (found,) = rows.write_rows([request], lambda *_: False)
    assert found.num_new <= 1
    wanted, results = threading.Event(), list[RowResult]()
    wanted.set()
    upstream.meet(seconds=30)
    writing = threading.Thread(target=lambda: results.extend(rows.write_rows([request], is_wanted=lambda _: wanted.is_set())))
    writing.start()
    until(lambda: upstream.state["running"] == 1)
    wanted.clear()
    writing.join(10)
    upstream.meet()
    assert [result.num_new for result in results] == [0]
    until(lambda: upstream.state["running"] == 0)
    assert upstream.state["left"] == before["left"] + 1


def change_choice(**fields: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda event: {**event, "choices": [{**event["choices"][0], **fields}]}


FIVE: dict[str, list[Any]] = {"tokens": ["token_id:5"] * 5, "token_logprobs": [-1.0] * 5, "top_logprobs": [None] * 5}
WRONG: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], str]] = {
    "other prompt": (change_choice(prompt_token_ids=[1, 2]), "for the prompt ids"),
    "other model": (lambda event: {**event, "model": "gpt"}, "for the model 'gpt', expected 'served'"),
    "no ids": (change_choice(token_ids=None, logprobs=None), "ended by"),
    "no log-probabilities": (change_choice(logprobs=None), "1 ids and 0 log-probabilities"),
    "an id beyond the vocabulary": (change_choice(token_ids=[100000]), "with the id 100000, which was not allowed"),
    "a text for an id": (change_choice(token_ids=["a"]), "with the id a, which was not allowed"),
    "two choices": (lambda event: {**event, "choices": event["choices"] * 2}, "has not one choice"),
    "too many": (change_choice(token_ids=[5] * 5, logprobs=FIVE), "with a token after the last one"),
    "positive": (
        change_choice(logprobs={"tokens": ["token_id:5"], "token_logprobs": [3.5], "top_logprobs": [None]}),
        "the log-probability 3.5 for a written token",
    ),
    "log-probabilities as a list": (change_choice(logprobs=[-1.0]), "1 ids and 0 log-probabilities"),
    "a number for the ids": (change_choice(token_ids=5), "0 ids and 1 log-probabilities"),
    "a likely token without a number": (
        change_choice(logprobs={**{name: FIVE[name][:1] for name in FIVE}, "top_logprobs": [{"token_id:5": None}]}),
        "the log-probability None for a likely token",
    ),
    "a refusal": (lambda _: {"error": {"message": "no", "code": 400}}, "refuses the request"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_answer_is_refused(one: tuple[Path, Upstream, dict[str, Any]], kind: str) -> None:
    folder, upstream, changes = one
    change, says = WRONG[kind]
    rows = rows_of(folder, upstream, ReverseLM.direction)
    request = RowRequest(" is nice", Sampling(max_new_tokens=4), "1")
    changes["event"] = change
    try:
        with pytest.raises(RemoteAnswerError, match=says):
            rows.write_rows([request])
    finally:
        changes.clear()
    assert rows.write_rows([request])[0].num_new == 4


def test_a_text_that_the_server_aborts_may_be_sent_again(one: tuple[Path, Upstream, dict[str, Any]]) -> None:
    folder, upstream, changes = one
    changes["event"] = change_choice(token_ids=[], logprobs=None, finish_reason="abort")
    with pytest.raises(TransientError, match=r"broke its answer off \(it ended by abort\)"):
        rows_of(folder, upstream, ReverseLM.direction).write_rows([RowRequest(" is nice", Sampling(max_new_tokens=4), "1")])
    changes.clear()


def test_a_request_that_takes_too_long_is_not_repeated(one: tuple[Path, Upstream, dict[str, Any]]) -> None:
    folder, upstream, _ = one
    engine = CompletionsEngine(f"{upstream.url}/v1", "served", folder, ReverseLM.direction, timeout=0.5)
    upstream.meet(score_seconds=2)
    num_requests = len(upstream.state["requests"])
    with pytest.raises(TransientError, match=r"did not answer within 0\.5 seconds"):
        engine.score([("The cat", " sat")])
    assert len(upstream.state["requests"]) == num_requests + 1
    upstream.meet()


def test_a_server_that_names_ids_only_by_their_log_probabilities_suffices(
    one: tuple[Path, Upstream, dict[str, Any]],
) -> None:
    folder, upstream, changes = one
    rows = rows_of(folder, upstream, ReverseLM.direction)
    request = RowRequest(" is nice", Sampling(max_new_tokens=6), "1", num_likeliest=2)
    expected = rows.write_rows([request])
    changes["event"] = change_choice(token_ids=None, prompt_token_ids=None)
    found = rows.write_rows([request])
    changes.clear()
    assert found == expected


def test_requests_are_repeated_until_the_first_event_and_not_later(
    one: tuple[Path, Upstream, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, upstream, _ = one
    monkeypatch.setattr("megatron_ledom.inference.engines.completions_rows.FIRST_PAUSE_SECONDS", 0.01)
    rows = rows_of(folder, upstream, ReverseLM.direction)
    request = RowRequest(" is nice", Sampling(max_new_tokens=4), "1")
    expected = rows.write_rows([request])
    upstream.meet(status=503, times=3)
    assert rows.write_rows([request]) == expected
    for following, error, says in (
        ({"status": 503, "times": 4}, TransientError, "did not answer 4 times \\(503\\)"),
        ({"status": 400, "times": 1}, RemoteAnswerError, "refuses the request: 400 .*made for a test"),
        ({"break_after": 2}, TransientError, "broke its answer off"),
        ({"error_after": 2}, TransientError, "engine died"),
        ({"error_after": 2, "code": 400}, TransientError, "engine died"),  # the code of vLLM's streams for every error
        ({"error_after": 0, "code": 400}, RemoteAnswerError, "refuses the request: .*engine died"),
        ({"error_after": 0, "code": 429}, TransientError, "engine died"),
        ({"garbled": True}, RemoteAnswerError, "that cannot be read \\(DecodingError"),
    ):
        upstream.meet(**following)
        num_requests = len(upstream.state["requests"])
        with pytest.raises(error, match=says):
            rows.write_rows([request])
        assert len(upstream.state["requests"]) - num_requests <= following.get("times", 3)
    upstream.meet()
    assert rows.write_rows([request]) == expected

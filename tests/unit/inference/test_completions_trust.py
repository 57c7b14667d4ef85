"""A completions server that shifts the prompt unnoticed, writes placeholders for numbers, or repeats the API key."""

import base64
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_ledom.errors import DataError
from megatron_ledom.inference import ForwardLM
from megatron_ledom.inference.engines.engine import empty_answer
from megatron_ledom.inference.generation import Sampling
from tests.support.completions_server import Server, engine_of, serving, with_choice, with_logprobs
from tests.support.tiny_models import random_model_folder

PROMPT = "The capital of France is Paris. "
PAIRS = [(PROMPT, "The cat")]
Change = Callable[[dict[str, Any], Any], Any]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Path, ForwardLM]]:
    folder = random_model_folder(tmp_path_factory.mktemp("models") / "forward", "byte_level", "forward")
    lm = ForwardLM.from_pretrained(folder, device="cpu")
    with serving(lm) as server:
        yield server, folder, lm


UNNAMED: dict[str, Callable[[list[Any]], Any]] = {
    "null": lambda names: None,
    "nulls": lambda names: [None] * len(names),
    "empty": lambda names: [""] * len(names),
    "no entry": lambda names: [],
    "numbers": list,
    "first alone": lambda names: [names[0], *[None] * (len(names) - 1)],
    "all but the last": lambda names: [*names[:-1], ""],
}


@pytest.mark.parametrize("case", UNNAMED)
def test_a_server_that_shifts_the_prompt_and_names_no_tokens_is_refused(
    case: str, served: tuple[Server, Path, ForwardLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An added BOS and a cut end: counts and first value are right, but every score is that of another token."""
    engine, plain = engine_of(served), served[0].complete

    def shifted(asked: dict[str, Any]) -> dict[str, Any]:
        answer = plain({**asked, "prompt": [1, *asked["prompt"][:-1]]})
        names = asked["prompt"] if case == "numbers" else served[0].names(asked["prompt"])
        return with_logprobs(answer, lambda _: UNNAMED[case](names), "tokens")

    monkeypatch.setattr(served[0], "complete", shifted)
    with pytest.raises(DataError, match="does not name the tokens of the prompt"):
        engine.score(PAIRS)
    assert engine_of(served, trust_token_counts=True).score(PAIRS)[0].num_tokens


def test_ids_of_the_prompt_stand_for_names_only_where_they_are_equal(served: tuple[Server, Path, ForwardLM]) -> None:
    engine = engine_of(served)
    prompt = engine._span(PAIRS[0], False).tokens

    def unnamed(answer: dict[str, Any], ids: Any) -> dict[str, Any]:
        return with_choice(with_logprobs(answer, lambda v: [None] * len(v), "tokens"), prompt_token_ids=ids)

    served[0].change = lambda a: unnamed(a, prompt)
    assert engine.score(PAIRS)[0].num_tokens
    served[0].change = lambda a: unnamed(a, "yes")
    with pytest.raises(DataError, match="for the prompt ids 'yes'"):
        engine.score(PAIRS)


def test_the_placeholder_of_the_api_is_minus_infinity_and_no_other_one_is_a_number(
    served: tuple[Server, Path, ForwardLM],
) -> None:
    engine = engine_of(served)
    served[0].change = lambda a: with_logprobs(a, lambda v: [None, *[-9999.0] * (len(v) - 1)])
    assert engine.score(PAIRS)[0].logprob == float("-inf")
    for placeholder in (-1e29, -1e5, -10000, -9999.5):
        served[0].change = lambda a, value=placeholder: with_logprobs(a, lambda v: [None, *[value] * (len(v) - 1)])  # type: ignore[misc]
        with pytest.raises(DataError, match=r"log-probability .* expected a number up to 0 and above -9999"):
            engine.score(PAIRS)


KEY = "sk-secret-42-Zx9q7LmT"
BEARER = f"Bearer {KEY}"
ECHOES: dict[str, Change] = {
    "model": lambda a, said: {**a, "model": said},
    "finish reason": lambda a, said: with_choice(a, finish_reason=said, logprobs=said),
    "no choices": lambda a, said: {"error": {"headers": {"Authorization": said}}},
    "choices": lambda a, said: {**a, "choices": [said, said]},
    "index": lambda a, said: with_choice(a, index=said),
    "prompt tokens": lambda a, said: {**a, "usage": {"prompt_tokens": said}},
    "prompt ids": lambda a, said: with_choice(a, prompt_token_ids=[said]),
    "first value": lambda a, said: with_logprobs(a, lambda v: [said, *v[1:]]),
    "value": lambda a, said: with_logprobs(a, lambda v: [None, said, *v[2:]]),
    "token": lambda a, said: with_logprobs(a, lambda v: [said, *v[1:]], "tokens"),
    "list": lambda a, said: [said],
    "HTML": lambda a, said: f"<p>{said}".encode(),
}
FORMS = {
    "plain": BEARER,
    "after the cut": "x" * 70 + BEARER,
    "after a later cut": "x" * 190 + BEARER,
    "base64": base64.b64encode(BEARER.encode()).decode(),
    "base64 of the header": base64.b64encode(f"Authorization: {BEARER}".encode()).decode(),
    "cut": BEARER[:-4] + "...",
    "front cut": "..." + KEY[5:],
    "upper case": BEARER.upper(),
    "hex": KEY.encode().hex(),
    "percent": "".join(f"%{ord(c):02X}" for c in KEY),
    "twice": BEARER + KEY,
}


@pytest.mark.parametrize("place", ECHOES)
def test_an_answer_that_repeats_the_key_is_refused_without_showing_a_part_of_it(
    place: str, served: tuple[Server, Path, ForwardLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    engine = engine_of(served)
    for said in FORMS.values():
        served[0].change = lambda a, said=said: ECHOES[place](a, said)  # type: ignore[misc]
        with pytest.raises(DataError) as caught:
            engine.score(PAIRS)
        message = str(caught.value).lower()
        assert not [part for part in parts_of_key() if part in message], (said, message)


def parts_of_key() -> set[str]:
    """Six consecutive characters of the key and of its encodings are masked, at every position in the encoded text."""
    encoded = [base64.b64encode(b"\0" * before + KEY.encode()).decode()[4:-4] for before in range(3)]
    forms = [form.lower() for form in (KEY, KEY.encode().hex(), FORMS["percent"], *encoded)]
    return {form[i : i + 6] for form in forms for i in range(len(form) - 5)}


def test_an_answer_text_that_contains_the_key_is_not_written(
    served: tuple[Server, Path, ForwardLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    engine, sampling = engine_of(served), Sampling(max_new_tokens=20, seed=3)
    for fields in (
        {"text": f"x {BEARER}"},
        {"text": f"\ud83d {BEARER}"},
        {"text": [BEARER]},
        {"finish_reason": BEARER, "text": None},
    ):
        served[0].change = lambda a, fields=fields: with_choice(a, **fields)  # type: ignore[misc]
        with pytest.raises(DataError) as caught:
            engine.sample([empty_answer(PROMPT, sampling)], sampling)
        assert "secret" not in str(caught.value)

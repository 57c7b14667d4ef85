"""Builds models with Transformer Engine's layers and with torch's, as ranks of a GPU run would, and describes both.

`python -m tests.support.te_without_extension tests.judges.te_models CASES REPORT` reads cases and writes a report for each, as JSON
files. Nothing is computed or stored: tensors are torch's FakeTensor, groups its fake process group, so that every model has its
full size and layout.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
import torch.testing._internal.distributed.fake_pg  # the backend "fake"
from megatron.core import fp8_utils
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, apply_factories
from megatron.core.transformer.transformer_config import TransformerConfig
from torch._subclasses import FakeTensorMode
from transformer_engine.pytorch.module import base

from megatron_ledom.checkpoint.store import sharded_weights
from megatron_ledom.config.derived import expected_world_size
from megatron_ledom.config.load import load_config
from megatron_ledom.config.schema import RunConfig
from megatron_ledom.config.shipped import shipped_configs
from megatron_ledom.model.builder import LanguageModel, build_model_chunks, checkpoint_metadata
from megatron_ledom.model.layer_specs import LayerChoice, choose_layers
from megatron_ledom.parallel.groups import ParallelGroups, seed_iteration, start_distributed, stop_distributed
from megatron_ledom.platform.device import Platform, prepare_platform
from megatron_ledom.platform.launch import ALONE

BLACKWELL = (10, 0)
TRANSFORMER_ENGINE = LayerChoice("transformer_engine", "test")
UNKNOWN_VOCABULARY = 1000
"""Number of ids where the config takes it from a tokenizer."""


def pretend_cuda() -> Platform:
    """Make this process look like one with a GPU for every fp8 recipe, and return a platform with the fake process group."""
    platform = replace(prepare_platform(1, ALONE), backend="fake")
    cuda: Any = torch.cuda
    cuda.is_available = lambda: True
    cuda.get_device_capability = lambda *device: BLACKWELL
    torch.nn.Module.cuda = lambda self, device=None: self  # type: ignore[method-assign, assignment]
    return platform


@contextmanager
def rank_of(config: RunConfig, platform: Platform, rank: int) -> Iterator[ParallelGroups]:
    """Yield the process groups of one rank of a run."""
    launch = replace(ALONE, rank=rank, world_size=expected_world_size(config))
    groups = start_distributed(platform, config.parallel, launch)
    seed_iteration(config.train.seed, 0, groups)
    try:
        yield groups
    finally:
        stop_distributed()


def first_replica(config: RunConfig) -> list[int]:
    """Return the ranks that together hold the model once: every tensor-parallel rank of every pipeline stage."""
    parallel = config.parallel
    stages = parallel.pipeline_model_parallel_size
    step = expected_world_size(config) // stages
    return [stage * step + rank for stage in range(stages) for rank in range(parallel.tensor_model_parallel_size)]


def describe_tensors(model: list[LanguageModel], groups: ParallelGroups) -> dict[str, Any]:
    """Return the parts of the sharded state of this rank."""
    state = sharded_weights(model, checkpoint_metadata(groups))
    apply_factories(state)
    parts = list(nested_values(state))
    tensors = [
        {
            "key": part.key,
            "dtype": str(part.dtype),
            "local_shape": list(part.local_shape),
            "global_shape": list(part.global_shape),
            "global_offset": list(part.global_offset),
            "layer_axes": part.prepend_axis_num,
            "replica": list(part.replica_id) if isinstance(part.replica_id, tuple) else part.replica_id,
        }
        for part in parts
        if isinstance(part, ShardedTensor)
    ]
    return {
        "tensors": sorted(tensors, key=lambda tensor: (tensor["key"], tensor["global_offset"])),
        "objects": sorted(part.unique_key for part in parts if isinstance(part, ShardedObject)),
    }


def describe_layer(model: list[LanguageModel]) -> dict[str, Any]:
    """Return the settings that Transformer Engine's modules of the first layer have."""
    layer = model[0].decoder.layers[0]
    attention, mlp = layer.self_attention, layer.mlp
    core = attention.core_attention
    linears = (attention.linear_qkv, attention.linear_proj, mlp.linear_fc1, mlp.linear_fc2)
    return {
        "modules": sorted({type(part).__name__ for part in layer.modules()}),
        "softmax_scale": core.unfused_attention.softmax_scale,
        "attention_dropout": core.attention_dropout,
        "mask": core.attn_mask_type,
        "eps": [
            norm.eps
            for norm in (attention.linear_qkv, mlp.linear_fc1, attention.q_layernorm, attention.k_layernorm)
            if hasattr(norm, "eps")
        ],
        "tensor_parallel": [linear.tp_size for linear in linears],
        "sequence_parallel": [linear.sequence_parallel for linear in linears],
        "frequencies": model[0].rotary_pos_emb.inv_freq.shape[0],
        "fused_activation": layer.mlp.config.bias_activation_fusion,
    }


@contextmanager
def recorded_buffers() -> Iterator[list[dict[str, str]]]:
    """Yield the arguments of every start of the user buffers in the context, checked against its parameters."""
    passed: list[dict[str, str]] = []

    def start(**arguments: Any) -> None:
        passed.append({name: str(value) for name, value in arguments.items()})
        base._ub_initialized = True  # which layers read

    with (
        mock.patch.object(base, "initialize_ub", autospec=True, side_effect=start),
        mock.patch.object(base, "_ub_initialized", False),
    ):
        yield passed


def describe(name: str, overrides: list[str], platform: Platform) -> dict[str, Any]:
    """Build the model of a config on each rank of its first replica, with both kinds of layers."""
    config = load_config(str(shipped_configs()[name]), overrides)
    plain = replace(config, parallel=replace(config.parallel, tp_comm_overlap=False), model=replace(config.model, fp8=None))
    vocab_size = config.model.vocab_size or UNKNOWN_VOCABULARY
    report: dict[str, Any] = {"choice": choose_layers(config).implementation, "vocab_size": vocab_size, "ranks": []}
    for rank in first_replica(config):
        with rank_of(config, platform, rank) as groups, FakeTensorMode():
            expected = build_model_chunks(plain, vocab_size, groups, LayerChoice("torch", "test"), initialize=False)
            with recorded_buffers() as buffers:
                found = build_model_chunks(config, vocab_size, groups, TRANSFORMER_ENGINE, initialize=False)
            report["ranks"].append({"torch": describe_tensors(expected, groups), "found": describe_tensors(found, groups)})
            report |= {"layer": describe_layer(found), "buffers": buffers, "recipe": fp8_recipe(found[0].config)}
    return report


def fp8_recipe(core_config: TransformerConfig) -> list[str]:
    """Return the names of the classes of Transformer Engine's recipe, and make its context; nothing without fp8."""
    if core_config.fp8 is None:
        return []
    fp8_utils.get_fp8_context(core_config)
    return [kind.__name__ for kind in type(fp8_utils.get_fp8_recipe(core_config)).__mro__]


def main() -> None:
    with open(sys.argv[1], encoding="utf-8") as file:
        cases: dict[str, Any] = json.load(file)
    platform = pretend_cuda()
    reports = {case: describe(name, overrides, platform) for case, (name, overrides) in cases.items()}
    with open(sys.argv[2], "w", encoding="utf-8") as file:
        json.dump(reports, file)


if __name__ == "__main__":
    main()

"""Muon of megatron-core equals a reference in plain torch, on one process."""

import dataclasses
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_ledom.config.derived import bucket_elements
from megatron_ledom.config.load import load_config
from megatron_ledom.config.schema import OptimizerSettings
from megatron_ledom.model.builder import build_model_chunks, wrap_for_training
from megatron_ledom.model.layer_specs import LayerChoice
from megatron_ledom.planning.hardware import load_hardware
from megatron_ledom.planning.matrix_shards import matrix_shards, matrix_sizes
from megatron_ledom.planning.memory import buffer_elements, muon_parameters, stage_parameters, state_bytes
from megatron_ledom.planning.shapes import architecture_of, layout_of
from megatron_ledom.planning.step_time import muon_flops, muon_seconds
from megatron_ledom.training.optimizer import MUON_KEYS, build_optimizer, build_scheduler
from megatron_ledom.training.replay import squared_norms
from megatron_ledom.training.step_policy import Action, StepResult, Verdict
from megatron_ledom.training.trainer import train_step
from tests.numerics.test_training import VOCAB, always_update, hf_weights, micro_batches
from tests.support.plain_llama import PlainLlama, plain_lr, plain_step
from tests.support.plain_muon import PlainMuon
from tests.support.tiny_runs import TinyData

pytest.importorskip("emerging_optimizers", reason="emerging-optimizers needs Python 3.12")
from megatron.core.optimizer import OptimizerConfig
from megatron.core.optimizer.emerging_optimizers import TensorParallelMuon, get_supported_coefficient_types
from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer

STEPS = 20
MUON = (
    "optimizer.optimizer=muon",
    "optimizer.muon_fp32_matmul_prec=highest",
    "optimizer.lr_warmup_iters=3",
    "optimizer.adam_eps=1e-6",  # with 1e-8 the order of a sum would decide the sign of the update if the gradient is nearly 0
    f"train.train_iters={STEPS}",
    "train.global_batch_size=4",
)
CASES = {
    "defaults": (),
    "Nesterov, joint qkv, simple coefficients": (
        "optimizer.muon_nesterov=true",
        "optimizer.muon_split_qkv=false",
        "optimizer.muon_coefficient_type=simple",
        "optimizer.muon_momentum=0.9",
        "optimizer.muon_extra_scale_factor=0.2",
        "optimizer.muon_num_ns_steps=4",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_muon_equals_the_reference_over_twenty_steps(data: TinyData, tmp_path: Path, groups: Any, case: str) -> None:
    config = load_config(str(data.config), [f"run_dir={tmp_path}", *MUON, *CASES[case]])
    chunks = build_model_chunks(config, VOCAB, groups, LayerChoice("torch", "test"))
    plain = PlainLlama(config.model, VOCAB)
    plain.load_state_dict(hf_weights(config, chunks[0].state_dict()))
    model = wrap_for_training(config, chunks)
    optimizer = build_optimizer(config, model, groups)
    scheduler, reference = build_scheduler(config, optimizer), PlainMuon(config, plain)
    for step in range(STEPS):
        expected = plain_step(config, plain, reference, micro_batches(step), plain_lr(config, step))
        found = train_step(config, model, optimizer, [iter(micro_batches(step))], groups, always_update, global_batch_size=4)
        scheduler.step(increment=1)
        assert (found.lm_loss, found.grad_norm) == pytest.approx(expected, rel=1e-6)
    wanted = plain.state_dict()
    for name, weight in hf_weights(config, chunks[0].state_dict()).items():
        in_adam = name in ("lm_head.weight", "model.embed_tokens.weight")  # its first steps follow the sign of tiny gradients
        torch.testing.assert_close(
            weight, wanted[name], rtol=1e-6, atol=3e-5 if in_adam else 1e-6, msg=lambda text, name=name: name + text
        )


def test_a_skipped_step_changes_no_weight_and_no_state(data: TinyData, tmp_path: Path, groups: Any) -> None:
    """The gradients of both optimizers are measured before either updates; the norm is that of all parameters together."""
    config = load_config(str(data.config), [f"run_dir={tmp_path}", *MUON])
    model = wrap_for_training(config, build_model_chunks(config, VOCAB, groups, LayerChoice("torch", "test")))
    optimizer = build_optimizer(config, model, groups)
    build_scheduler(config, optimizer).step(increment=3)  # the learning rate is above 0

    def step(judge: Any) -> StepResult:
        return train_step(config, model, optimizer, [iter(micro_batches(0))], groups, judge, global_batch_size=4)

    step(always_update)
    tensors = [
        *model[0].state_dict().values(),
        *(value for part in optimizer.chained_optimizers for value in state_tensors(part)),
    ]
    before = [tensor.clone() for tensor in tensors if torch.is_tensor(tensor)]
    found = step(lambda lm_loss, grad_norm: Verdict(Action.SKIP, "test"))
    assert sum(squared_norms(model, optimizer).values()) ** 0.5 == pytest.approx(found.grad_norm, rel=1e-6)
    after = [tensor for tensor in tensors if torch.is_tensor(tensor)]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    step(always_update)
    assert not any(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_muon_has_the_matrices_of_the_layers_and_one_momentum(data: TinyData, tmp_path: Path, groups: Any) -> None:
    """The bytes of the state are those that the planner counts."""
    config = load_config(str(data.config), [f"run_dir={tmp_path}", *MUON, f"model.vocab_size={VOCAB}"])
    model = wrap_for_training(config, build_model_chunks(config, VOCAB, groups, LayerChoice("torch", "test")))
    optimizer = build_optimizer(config, model, groups)
    train_step(config, model, optimizer, [iter(micro_batches(0))], groups, always_update, global_batch_size=4)
    muon, adam = optimizer.chained_optimizers
    assert isinstance(muon.optimizer, TensorParallelMuon)
    names = {id(weight): name.removeprefix("module.") for name, weight in model[0].named_parameters()}
    in_muon = {names[id(weight)].split(".", 3)[-1] for weight in muon.get_parameters()}
    matrices = ("self_attention.linear_proj", "self_attention.linear_qkv", "mlp.linear_fc1", "mlp.linear_fc2")
    assert in_muon == {f"{name}.weight" for name in matrices}
    assert len(muon.get_parameters()) + len(adam.get_parameters()) == len(names)
    shape, layout = architecture_of(config.model), layout_of(config, 1)
    counts = stage_parameters(shape, layout, 0)
    planned = state_bytes(shape, layout, sum(counts.values()), muon_parameters(layout, counts))[2]
    assert sum(tensor.nbytes for part in (muon, adam) for tensor in state_tensors(part)) == planned


LAYER_WISE = ("model.params_dtype=bf16", "parallel.use_distributed_optimizer=true", "parallel.overlap_grad_reduce=true")


@pytest.mark.parametrize("ranks", [1, 2, 3, 8, 64])
@pytest.mark.parametrize(
    "settings",
    [
        ("model.num_layers=4",),
        ("model.num_layers=6", "parallel.bucket_size=5000"),
        ("model.num_layers=5", "model.ffn_hidden_size=200", "model.num_query_groups=1", "parallel.bucket_size=30000"),
    ],
)
def test_the_planner_packs_whole_matrices_as_megatron_core_does(
    data: TinyData, tmp_path: Path, groups: Any, settings: tuple[str, ...], ranks: int
) -> None:
    """In one bucket and in several, for numbers of ranks that the model is laid out for here without having them."""
    words = [f"run_dir={tmp_path}", *MUON, *LAYER_WISE, f"model.vocab_size={VOCAB}", *settings]
    config = load_config(str(data.config), words)
    chunks = build_model_chunks(config, VOCAB, groups, LayerChoice("torch", "test"))
    wrapped = wrap_for_training(config, chunks)[0]
    shape = architecture_of(config.model)
    for is_bucketed in (True, False):
        layout = replace(layout_of(config, 1), data=ranks, overlap_grad_reduce=is_bucketed)
        limit = bucket_elements(config.parallel.bucket_size, ranks) if is_bucketed else None
        params = list(chunks[0].parameters())
        core = LayerWiseDistributedOptimizer.compute_full_param_layout(params, limit, ranks, wrapped.ddp_config)
        own = next(one for key, one in core.layouts.items() if key.is_managed_by_layer_wise_optimizer)
        found = matrix_shards(shape, layout, 0)
        assert found.padded == own.bucket_indices[-1][1]
        assert found.most(matrix_sizes(shape, layout)) == max(elements_of_ranks(own, ranks))


def elements_of_ranks(layout: Any, ranks: int) -> list[int]:
    """Return the elements of the matrices of each rank in megatron-core's layout of a buffer."""
    elements = [0] * ranks
    for start, end, bucket in layout.param_index_map.values():
        first, last = layout.bucket_indices[bucket]
        elements[(start - first) // ((last - first) // ranks)] += end - start
    return elements


def test_the_buffers_of_the_layer_wise_optimizer_have_the_planned_elements(data: TinyData, tmp_path: Path, groups: Any) -> None:
    """Of one rank; tests/distributed has two. AdamW's buffer is aligned, which the plan does not count: less than 1 % here."""
    config = load_config(str(data.config), [f"run_dir={tmp_path}", *MUON, *LAYER_WISE, f"model.vocab_size={VOCAB}"])
    wrapped = wrap_for_training(config, build_model_chunks(config, VOCAB, groups, LayerChoice("torch", "test")))[0]
    planned = buffer_elements(architecture_of(config.model), layout_of(config, 1), 0)
    assert planned <= sum(buffer.numel for buffer in wrapped.buffers) <= 1.01 * planned


def test_the_norms_of_a_replay_add_up_with_the_layer_wise_optimizer(data: TinyData, tmp_path: Path, groups: Any) -> None:
    config = load_config(str(data.config), [f"run_dir={tmp_path}", *MUON, *LAYER_WISE])
    model = wrap_for_training(config, build_model_chunks(config, VOCAB, groups, LayerChoice("torch", "test")))
    optimizer = build_optimizer(config, model, groups)
    assert [type(part).__name__ for part in optimizer.chained_optimizers] == [
        "LayerWiseDistributedOptimizer",
        "DistributedOptimizer",
    ]

    def skip(lm_loss: float, grad_norm: float) -> Verdict:
        return Verdict(Action.SKIP, "test")

    found = train_step(config, model, optimizer, [iter(micro_batches(0))], groups, skip, global_batch_size=4)
    norms = squared_norms(model, optimizer)
    assert len(norms) == len(list(model[0].parameters()))
    assert sum(norms.values()) ** 0.5 == pytest.approx(found.grad_norm, rel=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        (),
        ("optimizer.muon_split_qkv=false", "optimizer.muon_num_ns_steps=3"),
        ("optimizer.muon_tp_mode=distributed", "model.ffn_hidden_size=48"),
        ("optimizer.muon_tp_mode=blockwise", "model.num_query_groups=1"),
    ],
)
def test_the_planner_counts_the_operations_of_the_iterations(
    data: TinyData, tmp_path: Path, groups: Any, settings: tuple[str, ...]
) -> None:
    config = load_config(str(data.config), [f"run_dir={tmp_path}", *MUON, f"model.vocab_size={VOCAB}", *settings])
    model = wrap_for_training(config, build_model_chunks(config, VOCAB, groups, LayerChoice("torch", "test")))
    optimizer = build_optimizer(config, model, groups)
    train_step(config, model, optimizer, [iter(micro_batches(0))], groups, always_update, global_batch_size=4)
    with FlopCounterMode(display=False) as counter:
        optimizer.chained_optimizers[0].optimizer.step()
    assert counter.get_total_flops() == muon_flops(architecture_of(config.model), layout_of(config, 1)) > 0


def test_the_planned_time_follows_the_settings(data: TinyData) -> None:
    """More iterations and fp32 products take longer; the layer-wise optimizer shares the matrices."""

    def seconds(ranks: int, *settings: str) -> float:
        config = load_config(str(data.config), [*MUON[:1], "model.params_dtype=bf16", f"model.vocab_size={VOCAB}", *settings])
        return muon_seconds(architecture_of(config.model), layout_of(config, ranks), load_hardware("h100-sxm"))

    assert seconds(1, "optimizer.muon_num_ns_steps=10") == pytest.approx(2 * seconds(1))
    assert seconds(1, "optimizer.muon_fp32_matmul_prec=highest") == pytest.approx(16 * seconds(1))
    assert seconds(2) == seconds(1)
    assert seconds(1) / 2 < seconds(2, "parallel.use_distributed_optimizer=true") < seconds(1)  # whole matrices: not quite half


def state_tensors(part: Any) -> list[torch.Tensor]:
    """Return the tensors of an optimizer's state."""
    return [value for state in part.optimizer.state.values() for value in state.values() if torch.is_tensor(value)]


def test_the_keys_are_those_of_megatron_core() -> None:
    own = {field.name: field for field in dataclasses.fields(OptimizerSettings) if field.name in MUON_KEYS}
    core = {field.name: field.default for field in dataclasses.fields(OptimizerConfig)}
    different = {name for name, field in own.items() if core[name] != field.default}
    assert different == {"muon_tp_mode"}
    named = get_type_hints(OptimizerSettings)["muon_coefficient_type"]
    assert {*get_args(named), "custom"} == set(get_supported_coefficient_types())

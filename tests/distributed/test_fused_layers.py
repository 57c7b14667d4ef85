"""Fused layers train as torch's do, with this CPU's kernels, and each resumes from the other's checkpoint."""

from pathlib import Path

import pytest
import torch

from megatron_ledom.platform.cpu_ops import find_cpu_ops
from tests.support.tiny_runs import TinyData, curve, read_metrics, read_tensors, run_each_on_ranks

pytestmark = pytest.mark.skipif(find_cpu_ops().module is None, reason=find_cpu_ops().state)
STEPS, HALF = 20, 8
TOLERANCE = {"fp32": 2e-5, "bf16": 5e-3}
"""Relative tolerances of losses over 20 steps, for another order of sums or rounding; ten times that for gradient norms."""
Z_LOSS = "train.z_loss_coeff=1e-3"


def layers(name: str) -> str:
    return f"model.transformer_impl={name}"


def check_alike(found: Path, wanted: Path, dtype: str) -> None:
    """Check losses and gradient norms of every step, and in fp32 the weights."""
    ours, theirs = curve(read_metrics(found)), curve(read_metrics(wanted))
    assert len(ours) == len(theirs) == STEPS
    for (loss, norm), (their_loss, their_norm) in zip(ours, theirs, strict=True):
        assert loss == pytest.approx(their_loss, rel=TOLERANCE[dtype])
        assert norm == pytest.approx(their_norm, rel=10 * TOLERANCE[dtype])
    tensors, wanted_tensors = read_tensors(found), read_tensors(wanted)
    assert tensors.keys() == wanted_tensors.keys()
    for name, tensor in tensors.items() if dtype == "fp32" else ():
        if "optimizer" not in name and tensor.is_floating_point():
            torch.testing.assert_close(tensor, wanted_tensors[name], rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_fused_layers_train_as_torch_and_read_its_checkpoints(data: TinyData, tmp_path: Path, dtype: str) -> None:
    settings = (f"model.params_dtype={dtype}", Z_LOSS)
    whole, other = tmp_path / "torch", tmp_path / "fused"
    mixed = {tmp_path / f"{first}_{then}": (first, then) for first, then in (("torch", "fused"), ("fused", "torch"))}
    runs = {whole: [*settings, layers("torch")], other: [*settings, layers("fused")]}
    runs |= {run: [*settings, layers(first), f"train.exit_interval={HALF}"] for run, (first, _) in mixed.items()}
    run_each_on_ranks(data.config, runs, num_ranks=1)
    run_each_on_ranks(data.config, {run: [*settings, layers(then)] for run, (_, then) in mixed.items()}, num_ranks=1)
    for found in (other, *mixed):
        check_alike(found, whole, dtype)


def test_ranks_that_share_a_group_of_keys_use_their_own_queries(data: TinyData, tmp_path: Path) -> None:
    """With two ranks and one group, each rank uses only a part of the queries that the projection returns."""
    shared = ("model.num_query_groups=1", "parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true")
    runs = {tmp_path / name: [*shared, layers(name)] for name in ("torch", "fused")}
    run_each_on_ranks(data.config, runs, num_ranks=2)
    check_alike(tmp_path / "fused", tmp_path / "torch", "fp32")


def test_dropout_between_sum_and_norm_equals_that_of_torch_layers(data: TinyData, tmp_path: Path) -> None:
    runs = {tmp_path / name: ["model.hidden_dropout=0.1", layers(name)] for name in ("torch", "fused")}
    run_each_on_ranks(data.config, runs, num_ranks=1)
    check_alike(tmp_path / "fused", tmp_path / "torch", "fp32")


def test_unfused_attention_trains_as_sdpa_does(data: TinyData, tmp_path: Path) -> None:
    """The run has context parallelism, recompute of the attention, and isolated documents."""
    settings = (
        "parallel.context_parallel_size=2",
        "parallel.recompute_granularity=selective",
        "data.reset_attention_mask=true",
        "data.reset_position_ids=true",
    )
    runs = {tmp_path / name: [*settings, f"model.attention_backend={name}"] for name in ("auto", "unfused")}
    run_each_on_ranks(data.config, runs, num_ranks=2)
    check_alike(tmp_path / "unfused", tmp_path / "auto", "fp32")

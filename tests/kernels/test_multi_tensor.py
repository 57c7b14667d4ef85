"""FusedAdam, norm and clipping by the emulated kernels compared with torch on doubles, through the binding for GPUs."""

import subprocess
from pathlib import Path

import pytest
import torch

from megatron_ledom.ops.fused_adam import FusedAdam, use_fused_adam
from megatron_ledom.ops.multi_tensor import CHUNK, ChunkTables, chunk_table
from megatron_ledom.platform.adam import GroupStepAdam
from tests.kernels.bindings import emulated_binding, load_emulated_ops, train_on_emulated_optimizer
from tests.support.paths import ROOT
from tests.support.tiny_runs import TinyData, curve, read_tensors, run_on_ranks

SIZES = (0, 3, 8, CHUNK + 17, 40)
SETTINGS = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def parameters(dtype: torch.dtype) -> list[torch.Tensor]:
    """Return tensors of several sizes; the first is empty, the second is not aligned to 16 bytes."""
    torch.manual_seed(0)
    drawn = [torch.randn(size + 1) for size in SIZES]
    return [(each[1:] if i == 1 else each[:-1].clone()).to(dtype).requires_grad_() for i, each in enumerate(drawn)]


def draw_gradients(ours: list[torch.Tensor], theirs: list[torch.Tensor], seed: int) -> None:
    torch.manual_seed(seed)
    for p, q in zip(ours, theirs, strict=True):
        p.grad = torch.randn(p.shape).to(p.dtype)
        q.grad = p.grad.to(q.dtype)


def check_steps(dtype: torch.dtype) -> None:
    """Make ten steps in two groups, with save and load in the middle: within 2^-20 of torch on doubles; weights are rounded masters."""
    ours = parameters(dtype)
    theirs = [p.detach().double().requires_grad_() for p in ours]
    groups = [[{"params": each[:2]}, {"params": each[2:], "weight_decay": 0.0}] for each in (ours, theirs)]
    fused, exact = FusedAdam(groups[0], **SETTINGS), torch.optim.AdamW(groups[1], **SETTINGS)
    for step in range(10):
        if step == 5:
            saved = fused.state_dict()
            fused = FusedAdam([{"params": ours[:2]}, {"params": ours[2:]}], lr=1.0)
            fused.load_state_dict(saved)
        draw_gradients(ours, theirs, step)
        fused.step()
        exact.step()
    for p, q in zip(ours, theirs, strict=True):
        master = fused.state[p].get("master_param", p)
        assert fused.state[p]["exp_avg"].dtype == master.dtype == torch.float32
        torch.testing.assert_close(master.double(), q, rtol=2**-20, atol=2**-20)
        torch.testing.assert_close(fused.state[p]["exp_avg_sq"].double(), exact.state[q]["exp_avg_sq"], rtol=2**-20, atol=0)
        assert torch.equal(p, master.to(dtype))


def check_norm_and_scale() -> None:
    """Check the result of clipping."""
    tensors = [p.detach() for p in parameters(torch.float32) if p.numel()]
    norm = torch.ops.ledom.multi_tensor_norm(chunk_table(tensors), tensors)
    torch.testing.assert_close(norm, torch.cat(tensors).double().norm().float().view(1), rtol=1e-6, atol=0)
    halves, table = [torch.empty(t.shape, dtype=torch.float16) for t in tensors], chunk_table(tensors, tensors)
    targets = chunk_table(tensors, halves)
    torch.ops.ledom.multi_tensor_scale(targets, tensors, halves, 0.5)
    assert all(torch.equal(half, (t * 0.5).half()) for half, t in zip(halves, tensors, strict=True))
    before = torch.cat(tensors)
    torch.ops.ledom.multi_tensor_scale(table, tensors, tensors, 0.25)
    assert torch.equal(torch.cat(tensors), before * 0.25)


def check_operators() -> None:
    """Run opcheck, which calls with copies: with one tensor per list the table is valid for them too."""
    gradients, exp_avgs, exp_avg_sqs, masters = ([torch.rand(40)] for _ in range(4))
    weights = [masters[0].half()]
    lists = (gradients, exp_avgs, exp_avg_sqs, masters, weights)
    scalars = (0.01, 0.9, 0.95, 1e-8, 0.1, 0.1, 0.05)
    operators = torch.ops.ledom
    torch.library.opcheck(operators.multi_tensor_adamw.default, (chunk_table(*lists), *lists, *scalars, True))
    torch.library.opcheck(operators.multi_tensor_norm.default, (chunk_table(gradients), gradients))
    torch.library.opcheck(operators.multi_tensor_scale.default, (chunk_table(gradients, weights), gradients, weights, 0.5))


def test_fused_adam_equals_torch_on_doubles_on_the_emulated_kernels(python: Path) -> None:
    """Run in a process of its own, because the emulated kernels stay."""
    emulated_binding()
    done = subprocess.run([python, "-m", "tests.kernels.test_multi_tensor"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.splitlines()[-1] == "all is well"


def test_a_model_trains_alike_on_the_emulated_optimizer_and_on_torch(data: TinyData, tmp_path: Path) -> None:
    """Train twenty steps with clipping in megatron-core's distributed optimizer; the checkpoint has the same names."""
    emulated_binding()
    plain = ("model.transformer_impl=torch",)
    ours = run_on_ranks(data.config, tmp_path / "ours", *plain, hook=train_on_emulated_optimizer)
    assert "optimizer: adamw=cuda norm=cuda scale=cuda" in (data.config.parent / f"{tmp_path.name}-ours.log").read_text()
    theirs = run_on_ranks(data.config, tmp_path / "torch", *plain)
    assert len(ours) == len(theirs) == 20
    for found, wanted in zip(curve(ours), curve(theirs), strict=True):
        assert found == pytest.approx(wanted, rel=1e-4)
    assert read_tensors(tmp_path / "ours").keys() == read_tensors(tmp_path / "torch").keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fused_adam_equals_torch_on_doubles_by_the_references(dtype: torch.dtype) -> None:
    check_steps(dtype)


def test_fused_adam_continues_the_state_of_torch_adamw() -> None:
    ours = parameters(torch.float32)
    theirs = [p.detach().clone().requires_grad_() for p in ours]
    torchs, fused = torch.optim.AdamW(theirs, **SETTINGS), FusedAdam(ours, **SETTINGS)
    draw_gradients(ours, theirs, 1)
    torchs.step()
    for p, q in zip(ours, theirs, strict=True):
        p.data.copy_(q.data)
    fused.load_state_dict(torchs.state_dict())
    assert fused.param_groups[0]["step"] == 1
    assert all("step" not in fused.state[p] for p in ours)
    draw_gradients(ours, theirs, 2)
    torchs.step()
    fused.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


def test_state_is_that_of_the_adam_it_replaces() -> None:
    fused_parameters, torch_parameters = parameters(torch.float32), parameters(torch.float32)
    fused, through_torch = FusedAdam(fused_parameters, **SETTINGS), GroupStepAdam(torch_parameters, **SETTINGS)
    draw_gradients(fused_parameters, torch_parameters, 1)
    fused.step()
    through_torch.step()
    ours, theirs = fused.state_dict(), through_torch.state_dict()
    assert ours["param_groups"] == theirs["param_groups"]
    for key, state in theirs["state"].items():
        assert ours["state"][key].keys() == state.keys()
        for name, value in state.items():
            torch.testing.assert_close(ours["state"][key][name], value, rtol=1e-6, atol=1e-7)


def test_table_is_recomputed_when_a_tensor_has_moved() -> None:
    tables, tensors = ChunkTables(), [torch.zeros(CHUNK + 1), torch.zeros(5)]
    first = tables.table("norm", tensors)
    assert first[:, 0].tolist() == [CHUNK, 1, 5]
    assert tables.table("norm", tensors) is first
    moved = [tensors[0], torch.zeros(5)]
    assert tables.table("norm", moved)[2, 1] - first[2, 1] == moved[1].data_ptr() - tensors[1].data_ptr()


def test_lists_of_different_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="different sizes"):
        chunk_table([torch.zeros(3)], [torch.zeros(4)])


def test_without_cuda_kernels_megatron_core_keeps_torch() -> None:
    from megatron_ledom.platform.core_fixes import install_core_fixes

    install_core_fixes()
    assert use_fused_adam("cpu") == "adamw=torch norm=torch scale=torch"


if __name__ == "__main__":
    load_emulated_ops()
    for each in (torch.float32, torch.bfloat16, torch.float16):
        check_steps(each)
    check_norm_and_scale()
    check_operators()
    print("all is well")

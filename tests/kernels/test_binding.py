"""`torch.ops.ledom` over the emulated CUDA kernels, through the binding that a GPU uses: references, opcheck, a model's training."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.kernels.bindings import emulated_binding, load_emulated_ops
from tests.support.paths import ROOT
from tests.support.tiny_runs import TinyData, curve, read_tensors, run_on_ranks

ULPS = 2.0
FUSED = ("model.transformer_impl=fused",)
SHAPE = (  # heads of 16, the narrowest that the kernels rotate
    "model.params_dtype=bf16",
    "model.num_attention_heads=2",
    "model.num_query_groups=1",
    "train.micro_batch_size=4",
)


def arguments_of(name: str, dtype: torch.dtype) -> tuple[Any, ...]:
    """Return the operator's arguments for opcheck."""
    torch.manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape).to(dtype).requires_grad_()

    labels, rows = torch.tensor([0, 3, -1, 9, 2]), [torch.rand(5) for _ in range(3)]
    angles = torch.rand(5, 1, 1, 8).repeat(1, 1, 1, 2)
    documents = torch.tensor([[0] * 5 + [1] * 11], dtype=torch.int32)
    return {
        "rms_norm": lambda: (drawn(5, 2, 24), drawn(24), 1e-5),
        "add_rms_norm": lambda: (drawn(5, 2, 24), drawn(5, 2, 24), drawn(24), 1e-5),
        "swiglu": lambda: (drawn(5, 2, 48),),
        "rope": lambda: (drawn(5, 2, 2, 4 * 16), angles),
        "causal_softmax": lambda: (drawn(1, 2, 16, 16), documents, 0.3),
        "cross_entropy_terms": lambda: (drawn(5, 16).detach(), labels, 10),
        "cross_entropy_gradient": lambda: (drawn(5, 16).detach(), labels, *rows, 10),
    }[name]()


OPERATORS = (
    "rms_norm", "add_rms_norm", "swiglu", "rope", "causal_softmax", "cross_entropy_terms", "cross_entropy_gradient"
)  # fmt: skip


def check_operator(name: str, dtype: torch.dtype) -> None:
    """Check that the emulated kernel runs, passes opcheck and equals the reference."""
    from megatron_ledom.ops import library

    operator = getattr(torch.ops.ledom, name).default
    arguments = arguments_of(name, dtype)
    torch.library.opcheck(operator, arguments)
    references = {
        "rms_norm": library_reference("rms_norm", "rms_norm_reference"),
        "add_rms_norm": library_reference("rms_norm", "add_rms_norm_reference"),
        "swiglu": library_reference("swiglu", "swiglu_reference"),
        "rope": library_reference("rope", "rope_reference"),
        "causal_softmax": lambda x, documents, scale: library_reference("causal_softmax", "causal_softmax_reference")(
            x, scale, documents
        ),
        "cross_entropy_terms": library_reference("cross_entropy", "cross_entropy_terms_reference"),
    }
    assert library.backend("cpu").name == "cpu"
    if name == "cross_entropy_gradient":
        mine, theirs = arguments[0].clone(), arguments[0].clone()
        operator(mine, *arguments[1:])
        library_reference("cross_entropy", "cross_entropy_gradient_reference")(theirs, *arguments[1:])
        torch.testing.assert_close(mine, theirs, rtol=ULPS * torch.finfo(dtype).eps, atol=1e-4)
        return
    compare(operator, references[name], arguments, dtype)


def library_reference(module: str, function: str) -> Any:
    """Return a function of megatron_ledom/ops."""
    from importlib import import_module

    return getattr(import_module(f"megatron_ledom.ops.{module}"), function)


def compare(operator: Any, reference: Any, arguments: tuple[Any, ...], dtype: torch.dtype) -> None:
    """Return outputs and gradients."""
    results = []
    for function in (operator, reference):
        leaves = [a.detach().clone().requires_grad_(a.requires_grad) if isinstance(a, torch.Tensor) else a for a in arguments]
        found = function(*leaves)
        found = found if isinstance(found, tuple) else (found,)
        if found[0].requires_grad:
            torch.autograd.backward(found, [torch.cos(torch.arange(o.numel())).view(o.shape).to(dtype) for o in found])
        results.append([*found, *(a.grad for a in leaves if isinstance(a, torch.Tensor) and a.grad is not None)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=ULPS * torch.finfo(dtype).eps, atol=ULPS * torch.finfo(dtype).eps)


def test_every_operator_passes_opcheck_and_equals_its_reference(python: Path) -> None:
    """Run in a process of its own, because the emulated kernels stay."""
    emulated_binding()
    done = subprocess.run([python, "-m", "tests.kernels.test_binding"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert json.loads(done.stdout.splitlines()[-1]) == [
        f"{name} {dtype}" for dtype in ("bfloat16", "float16") for name in OPERATORS
    ]


def test_a_model_trains_alike_on_emulated_kernels_and_on_torch(data: TinyData, tmp_path: Path) -> None:
    """Twenty steps in bf16: losses within 2e-3, the first (forward and backward of equal weights) within 3e-4."""
    emulated_binding()
    ours = run_on_ranks(data.config, tmp_path / "ours", *SHAPE, *FUSED, hook=load_emulated_ops)
    log = (data.config.parent / f"{tmp_path.name}-ours.log").read_text()
    assert "rms_norm=cpu swiglu=cpu rope=cpu cross_entropy=cpu (CUDA kernels on the emulator)" in log
    theirs = run_on_ranks(data.config, tmp_path / "torch", *SHAPE, "model.transformer_impl=torch")
    assert len(ours) == len(theirs) == 20
    found, wanted = curve(ours), curve(theirs)
    assert found[0] == pytest.approx(wanted[0], rel=3e-3)
    assert found[0][0] == pytest.approx(wanted[0][0], rel=3e-4)
    for (loss, norm), (their_loss, their_norm) in zip(found, wanted, strict=True):
        assert loss == pytest.approx(their_loss, rel=2e-3)
        assert norm == pytest.approx(their_norm, rel=5e-2)
    assert read_tensors(tmp_path / "ours").keys() == read_tensors(tmp_path / "torch").keys()


if __name__ == "__main__":
    load_emulated_ops()
    done = []
    for each in (torch.bfloat16, torch.float16):
        for one in OPERATORS:
            check_operator(one, each)
            done.append(f"{one} {str(each).removeprefix('torch.')}")
    print(json.dumps(done))

"""Our fused operators compared with double precision, with the kernels of this CPU: all shapes, types and gradients."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_ledom.hardware_check.comparison import Operator, drawn, largest_errors
from megatron_ledom.hardware_check.formulas import add_rms_norm_formula, rms_norm_formula, rope_formula, swiglu_formula
from megatron_ledom.ops import __main__ as report
from megatron_ledom.ops.library import backend, describe
from megatron_ledom.ops.rms_norm import add_rms_norm, rms_norm, rms_norm_reference
from megatron_ledom.ops.rope import rope, rope_reference
from megatron_ledom.ops.swiglu import swiglu, swiglu_reference
from megatron_ledom.platform.core_fixes import norm_of_all, scale_all
from megatron_ledom.platform.cpu_ops import find_cpu_ops

EOD = 0
DTYPES = (torch.float32, torch.bfloat16)
ISAS = ("avx2", "avx512", "baseline")


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Yield each instruction set of this machine."""
    kernels = find_cpu_ops().module
    if kernels is None:
        pytest.skip(f"no CPU operators: {find_cpu_ops().state}")
    best = kernels.isa()
    try:
        kernels.use_isa(request.param)
    except ValueError as missing:
        pytest.skip(str(missing))
    yield request.param
    kernels.use_isa(best)


def check_op(operator: Operator, formula: Operator, inputs: list[torch.Tensor], differentiable: int) -> None:
    errors = largest_errors(operator, formula, inputs, differentiable)
    assert max(errors.values()) <= 1, errors


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 8), (3, 2, 40), (65, 3, 17), (129, 1, 512)])
def test_rms_norm_equals_double_precision(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight = drawn(shape[-1], dtype=dtype, seed=1)
    check_op(
        lambda x, w: rms_norm(x, w, 1e-5), lambda x, w: rms_norm_formula(x, w, 1e-5), [drawn(*shape, dtype=dtype), weight], 2
    )


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 8), (65, 3, 17), (129, 1, 512)])
def test_norm_of_a_sum_equals_double_precision(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Use multiples of 1/16 up to 8, whose sums are exact; the next test covers the rounding of the sum."""
    x, residual = (drawn(*shape, dtype=torch.float32, seed=seed).mul(16).round().clamp(-64, 64).div(16) for seed in (2, 3))
    weight = drawn(shape[-1], dtype=dtype, seed=1)
    check_op(
        lambda x, r, w: add_rms_norm(x, r, w, 1e-5),
        lambda x, r, w: add_rms_norm_formula(x, r, w, 1e-5),
        [x.to(dtype), residual.to(dtype), weight],
        3,
    )


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_of_a_sum_is_the_norm_after_the_sum(dtype: torch.dtype) -> None:
    x, residual, weight = (
        drawn(*shape, dtype=dtype, seed=seed) for seed, shape in enumerate([(65, 3, 17), (65, 3, 17), (17,)])
    )
    normed, added = add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(added, x + residual)
    assert torch.equal(normed, rms_norm(added, weight, 1e-5))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 2), (5, 3, 26), (64, 1, 2816)])
@pytest.mark.parametrize("spread", [1.0, 30.0])
def test_swiglu_equals_double_precision(shape: tuple[int, ...], dtype: torch.dtype, spread: float) -> None:
    check_op(swiglu, swiglu_formula, [drawn(*shape, dtype=dtype) * spread], 1)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("groups", "per_group", "width"), [(1, 8, 64), (4, 1, 10), (2, 4, 192)])
def test_rope_equals_double_precision(groups: int, per_group: int, width: int, dtype: torch.dtype) -> None:
    angles = drawn(9, 1, 1, width // 2, dtype=torch.float32, seed=2).mul(100).repeat(1, 1, 1, 2)
    mixed = drawn(9, 3, groups, (per_group + 2) * width, dtype=dtype)
    check_op(lambda x: rope(x, angles), lambda x: rope_formula(x, angles), [mixed], 1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_references_equal_double_precision(dtype: torch.dtype) -> None:
    """Test the functions that run without kernels."""
    weight, angles = drawn(48, dtype=dtype, seed=1), drawn(5, 1, 1, 6, dtype=torch.float32).repeat(1, 1, 1, 2)
    norm = [lambda x, w: rms_norm_reference(x, w, 1e-5), lambda x, w: rms_norm_formula(x, w, 1e-5)]
    check_op(*norm, [drawn(5, 2, 48, dtype=dtype), weight], 2)
    check_op(swiglu_reference, swiglu_formula, [drawn(5, 2, 48, dtype=dtype)], 1)
    check_op(lambda x: rope_reference(x, angles), lambda x: rope_formula(x, angles), [drawn(5, 2, 2, 48, dtype=dtype)], 1)


@pytest.mark.usefixtures("isa")
def test_rope_takes_gradients_of_any_strides() -> None:
    """SDPA returns them as [B, H, S, D] in memory."""
    angles = drawn(5, 1, 1, 4, dtype=torch.float32).repeat(1, 1, 1, 2)
    mixed = drawn(5, 2, 2, 4 * 8, dtype=torch.float32).requires_grad_()
    given = [torch.randn(2, heads, 5, 8) for heads in (4, 2, 2)]
    for strided in ([g.permute(2, 0, 1, 3) for g in given], [g.permute(2, 0, 1, 3).contiguous() for g in given]):
        torch.autograd.backward(rope(mixed, angles), strided)
    assert mixed.grad is not None
    once, mixed.grad = mixed.grad / 2, None
    torch.autograd.backward(rope(mixed, angles), [g.permute(2, 0, 1, 3).contiguous() for g in given])
    assert torch.equal(once, mixed.grad)


@pytest.mark.usefixtures("isa")
def test_the_number_of_threads_does_not_change_a_bit() -> None:
    x, weight = drawn(500, 96, dtype=torch.bfloat16), drawn(96, dtype=torch.bfloat16, seed=1)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            leaves = [t.clone().requires_grad_() for t in (x, weight)]
            swiglu(rms_norm(*leaves, 1e-5)).sum().backward()
            found.append([leaf.grad for leaf in leaves])
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_are_kept(dtype: torch.dtype) -> None:
    x = torch.ones(3, 40, dtype=dtype)
    x[0, 3], x[1, 20] = torch.nan, torch.inf
    assert swiglu(x)[0, 3].isnan()
    assert swiglu(x)[1, 0].isinf()
    assert rms_norm(x, torch.ones(40, dtype=dtype), 1e-5)[0].isnan().all()
    assert rms_norm(x, torch.ones(40, dtype=dtype), 1e-5)[2].isfinite().all()


@pytest.mark.skipif(not backend("cpu").usable, reason=backend("cpu").state)
@pytest.mark.parametrize("name", ["rms_norm", "swiglu", "rope", "cross_entropy_terms", "cross_entropy_gradient"])
def test_opcheck(name: str) -> None:
    """Schema, fake tensors and autograd meet torch's rules."""
    angles = drawn(5, 1, 1, 4, dtype=torch.float32).repeat(1, 1, 1, 2)
    rows = [torch.rand(5) for _ in range(3)]
    labels = torch.tensor([0, 3, -1, 9, 2])
    arguments = {
        "rms_norm": (drawn(5, 2, 16, dtype=torch.float32).requires_grad_(), torch.ones(16, requires_grad=True), 1e-5),
        "swiglu": (drawn(5, 16, dtype=torch.float32).requires_grad_(),),
        "rope": (drawn(5, 2, 2, 32, dtype=torch.float32).requires_grad_(), angles),
        "cross_entropy_terms": (drawn(5, 16, dtype=torch.bfloat16), labels, 10),
        "cross_entropy_gradient": (drawn(5, 16, dtype=torch.bfloat16), labels, *rows, 10),
    }[name]
    torch.library.opcheck(getattr(torch.ops.ledom, name).default, arguments)


def test_the_log_has_the_kernels_and_the_reason() -> None:
    runs = "rms_norm={0} swiglu={0} rope={0} cross_entropy={1} "
    ours, state = ("cpu" if backend("cpu").usable else "torch"), f"({backend('cpu').state})"
    for implementation, in_layers, in_loss in (
        ("fused", ours, ours),
        ("torch", "torch", "torch"),
        ("transformer_engine", "transformer_engine", ours),
    ):
        assert describe(torch.device("cpu"), implementation) == "ops: " + runs.format(in_layers, in_loss) + state
    assert describe(torch.device("meta"), "fused").endswith("(no kernels)")


def test_the_report_has_the_built_operators_and_those_of_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    report.main()
    built, on_cpu, optimizer, *models = capsys.readouterr().out.splitlines()
    assert built.startswith("CUDA operators: ")
    assert on_cpu == f"CPU operators: {find_cpu_ops().state}"
    adam = "cuda" if backend("cuda").usable else "torch"
    assert optimizer.endswith(f": adamw={adam} norm={adam} scale={adam}")
    assert models[-1] == "a model on cpu: " + describe(torch.device("cpu"), "fused")


def test_architectures_are_read_from_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    binary = tmp_path / "ops.so"
    binary.write_bytes(b"\0.target sm_90\0..sm_100a\0sm_80")
    monkeypatch.setattr(report, "which", lambda name: None)
    assert report.architectures(binary) == "sm_80, sm_90, sm_100a"


def test_norm_and_scaling_of_many_tensors_equal_those_of_one() -> None:
    """Test the functions of core_fixes that replace megatron-core's loops, with apex's arguments."""
    tensors, flag = [drawn(3 * i + 1, dtype=torch.float32, seed=i) for i in range(5)], torch.zeros(1)
    whole = torch.cat(tensors)
    norm, none = norm_of_all(1, flag, [tensors], False)
    assert none is None
    torch.testing.assert_close(norm, whole.double().norm().float().view(1), rtol=1e-6, atol=0)
    others = [torch.zeros_like(tensor) for tensor in tensors]
    scale_all(1, flag, [tensors, others], 0.5)
    assert torch.equal(torch.cat(others), whole * 0.5)
    assert torch.equal(torch.cat(tensors), whole)
    scale_all(1, flag, [tensors, tensors], 0.25)
    assert torch.equal(torch.cat(tensors), whole * 0.25)

"""The comparison with double precision finds operators that are a little wrong, and those that are not repeatable."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from megatron_ledom.hardware_check import kernels
from megatron_ledom.hardware_check.comparison import drawn, error_fraction, largest_errors
from megatron_ledom.hardware_check.formulas import adamw_formula, swiglu_formula
from megatron_ledom.hardware_check.kernels import Operation

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_once_is_within_the_tolerance_and_four_units_are_not(dtype: torch.dtype) -> None:
    exact = drawn(1000, dtype=torch.float64)
    assert error_fraction(exact.to(dtype), exact) <= 0.5
    off = (exact * (1 + 8 * torch.finfo(dtype).eps)).to(dtype)
    assert error_fraction(off, exact) > 1


def test_nan_exceeds_every_tolerance() -> None:
    found = torch.tensor([1.0, torch.nan])
    assert not error_fraction(found, torch.ones(2, dtype=torch.float64)) <= 1


class _WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        ctx.save_for_backward(x)
        return swiglu_formula(x.double()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """Return the gradient of the first half only."""
        with torch.enable_grad():
            x = ctx.saved_tensors[0].double().detach().requires_grad_()
            (whole,) = torch.autograd.grad(swiglu_formula(x), x, gradient.double())
        whole[..., x.shape[-1] // 2 :] = 0
        return whole.to(gradient.dtype)


def test_a_wrong_gradient_is_found_and_the_right_output_is_not() -> None:
    errors = largest_errors(_WrongGradient.apply, swiglu_formula, [drawn(5, 32, dtype=torch.float32)], 1)
    assert errors["forward"] <= 1
    assert errors["backward"] > 1000


class _OtherBits(torch.autograd.Function):
    """Returns its input, and a gradient that is off by one unit in the last place in every second call."""

    calls = 0

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """Return the gradient, in every second call with other bits."""
        _OtherBits.calls += 1
        return gradient * (1 + _OtherBits.calls % 2 * torch.finfo(gradient.dtype).eps)


@pytest.mark.parametrize("scale", [lambda call: 1.0 + 0.01 * call, lambda call: 1.01])
def test_operator_that_is_not_repeatable_or_off_is_reported(
    monkeypatch: pytest.MonkeyPatch, scale: Callable[[int], float]
) -> None:
    calls = iter(range(1000))

    def operations(device: str, dtype: torch.dtype) -> Iterator[Operation]:
        x = drawn(64, dtype=dtype)
        yield Operation("good", lambda x: x * 1, lambda x: x, [x], 1)
        yield Operation("bad", lambda x: (x.float() * scale(next(calls))).to(x.dtype), lambda x: x, [x], 1)
        yield Operation("other bits", _OtherBits.apply, lambda x: x, [x], 1)

    monkeypatch.setattr(kernels, "operations", operations)
    rows = {(row["operator"], row["type"], row["pass"]): row["error_by_tolerance"] for row in kernels.errors_of_all("cpu")}
    assert rows["good", "float32", "forward"] <= 1
    assert rows["good", "float32", "backward"] <= 1
    assert rows["bad", "float32", "forward"] > 1
    assert rows["bad", "bfloat16", "forward"] > 0.5
    assert rows["other bits", "float32", "forward"] <= 1
    assert rows["other bits", "float32", "backward"] == math.inf


def test_formula_of_adamw_is_that_of_torch() -> None:
    weight, gradients = drawn(50, dtype=torch.float64), [drawn(50, dtype=torch.float64, seed=seed) for seed in (1, 2, 3)]
    parameter = torch.nn.Parameter(weight.clone())
    optimizer = torch.optim.AdamW([parameter], **kernels.ADAM)
    for gradient in gradients:
        parameter.grad = gradient
        optimizer.step()
    torch.testing.assert_close(adamw_formula(weight, gradients, **kernels.ADAM), parameter.detach(), rtol=1e-12, atol=1e-14)

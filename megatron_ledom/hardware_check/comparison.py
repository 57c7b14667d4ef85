"""Compares operators with exact results: outputs and gradients within a tolerance that depends on the type."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

ULPS = 2.0
"""Largest error in units of the last place of the type, at the magnitude of the element."""
SMALLEST = 1e-3
"""Elements below this part of the array's largest one may have the error of such an element."""
FP32_OF_LARGEST = 4.0
"""fp32 only: further units of the last place of the largest element, because sums have another order."""
Operator = Callable[..., Any]


def drawn(*shape: int, dtype: torch.dtype, seed: int = 0, device: str | torch.device = "cpu") -> torch.Tensor:
    """Return normal random numbers, the same on every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


def error_fraction(found: torch.Tensor, exact: torch.Tensor, ulps: float = ULPS) -> float:
    """Return the largest error of `found` as a fraction of the tolerance; above 1 it is exceeded, NaN is never within it."""
    if found.shape != exact.shape:
        raise ValueError(f"found the shape {tuple(found.shape)}, expected {tuple(exact.shape)}")
    found, exact = found.detach(), exact.detach()
    unit, largest = torch.finfo(found.dtype).eps, float(exact.abs().max())
    allowed = ulps * unit * exact.abs().clamp(min=SMALLEST * largest + 1e-30)
    if found.dtype == torch.float32:
        allowed = allowed + FP32_OF_LARGEST * unit * largest
    return float(((found.double() - exact).abs() / allowed).max())


def largest_errors(
    operator: Operator, formula: Operator, inputs: Sequence[torch.Tensor], differentiable: int, ulps: float = ULPS
) -> dict[str, float]:
    """Return the errors of outputs and gradients of an operator, as fractions of the tolerance.

    formula: the exact result for the same inputs in double precision, differentiable by autograd. differentiable: number of
    inputs, from the first on, whose gradients are compared.
    """
    leaves = [t.clone().requires_grad_(index < differentiable) for index, t in enumerate(inputs)]
    exact = [
        (t.double() if index < differentiable else t).clone().requires_grad_(index < differentiable)
        for index, t in enumerate(inputs)
    ]
    found, wanted = outputs_of(operator(*leaves)), outputs_of(formula(*exact))
    gradients = [drawn(*one.shape, dtype=one.dtype, seed=7 + i, device=one.device) for i, one in enumerate(found)]
    errors = {"forward": max(error_fraction(one, other, ulps) for one, other in zip(found, wanted, strict=True))}
    if differentiable:
        torch.autograd.backward(found, gradients)
        torch.autograd.backward(wanted, [gradient.double() for gradient in gradients])
        pairs = zip(leaves[:differentiable], exact[:differentiable], strict=True)
        errors["backward"] = max(error_fraction(_gradient(one), _gradient(other), ulps) for one, other in pairs)
    return errors


def outputs_of(result: Any) -> tuple[torch.Tensor, ...]:
    """Return the tensors that an operator returned, also of a single one."""
    return result if isinstance(result, tuple) else (result,)


def _gradient(leaf: torch.Tensor) -> torch.Tensor:
    assert leaf.grad is not None
    return leaf.grad

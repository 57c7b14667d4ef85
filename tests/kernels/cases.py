"""Calls of a kernel's launcher with their expected results. All ways of running kernels use the same cases."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from tests.kernels.interface import DTYPES, Function

Argument = torch.Tensor | torch.dtype | int | float | None


@dataclass
class Expected:
    """The expected output: `values` (float64, or integers, which must be equal) within `ulps` spacings of the output's type at
    that value, plus `noise`, the absolute error of fp32 arithmetic if terms cancel."""

    values: torch.Tensor
    ulps: float = 0.0
    noise: torch.Tensor | float = 0.0


@dataclass
class Case:
    """A function of a header, its arguments by name, and its expected outputs. An output's tensor is filled with `blank`; a
    tensor under two names is processed in place. `stream` is not named."""

    function: str
    arguments: dict[str, Argument]
    expected: dict[str, Expected]
    scratch: frozenset[str] = field(default_factory=frozenset)
    """Names of tensors that the call may overwrite with any values."""


CaseMaker = Callable[[torch.dtype], Case]
Run = Callable[[Case], dict[str, torch.Tensor]]
"""A way of running a case: returns the outputs by name. Raises KernelError if the call fails."""


class KernelError(RuntimeError):
    """The launcher returned an error, or the run found an error in the kernel."""


def blank(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Return an output that is not yet written: NaN, or -1."""
    size = torch.empty(0, dtype=dtype).element_size()
    length = torch.Size(shape).numel()
    return torch.full((length * size,), 0xFF, dtype=torch.uint8).view(dtype).view(shape)


def values(*shape: int, dtype: torch.dtype, seed: int, scale: float = 1.0) -> torch.Tensor:
    """Return normal random numbers, rounded to the type."""
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def pointers(case: Case) -> dict[str, torch.Tensor]:
    """Return the tensors among the arguments."""
    return {name: value for name, value in case.arguments.items() if isinstance(value, torch.Tensor)}


def c_arguments(function: Function, case: Case, addresses: Mapping[str, int | None]) -> list[int | float | None]:
    """Return the arguments in the header's order, with addresses for tensors."""
    given = {"stream": None, **case.arguments}
    assert given.keys() == function.parameters.keys(), f"{function.name} takes {list(function.parameters)}, got {list(given)}"
    found: list[int | float | None] = []
    for name in function.parameters:
        value = given[name]
        if isinstance(value, torch.Tensor):
            found.append(addresses[name])
        else:
            found.append(DTYPES[value] if isinstance(value, torch.dtype) else value)
    return found


def spacing(wanted: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the distance of neighbouring numbers of `dtype` at each value of `wanted` (float64)."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(wanted).exponent - 1
    return torch.ldexp(torch.full_like(wanted, info.eps), exponent.clamp(min=torch.frexp(torch.tensor(info.tiny)).exponent - 1))


def check_outputs(case: Case, outputs: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Raise AssertionError for a wrong output. Returns the largest error of each, as a fraction of the allowed error."""
    fractions = {}
    for name, expected in case.expected.items():
        found, wanted = outputs[name], expected.values
        assert found.shape == wanted.shape, f"{case.function} {name}: shape {tuple(found.shape)}"
        if not wanted.is_floating_point():
            assert torch.equal(found, wanted.to(found.dtype)), f"{case.function} {name} differs"
            continue
        error = (found.double() - wanted).abs()
        allowed = expected.ulps * spacing(wanted, found.dtype) + expected.noise
        bad = ~(error <= allowed)
        if bad.any():
            at = tuple(int(i) for i in bad.nonzero()[0])
            raise AssertionError(
                f"{case.function} {name}{list(at)}: found {found[at].item()}, wanted {wanted[at].item()} within"
                f" {torch.broadcast_to(allowed, wanted.shape)[at].item():.3g}; {int(bad.sum())} of {bad.numel()} are off"
            )
        fractions[name] = float((error / allowed).nan_to_num(0).max()) if error.numel() else 0.0
    return fractions

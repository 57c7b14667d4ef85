"""One call of a kernel's launcher, with what it must come to. Every way of running kernels takes the same cases."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from tests.kernels.interface import DTYPES, Function

Argument = torch.Tensor | torch.dtype | int | float | None


@dataclass
class Expected:
    """What an output must be: `values` (float64, or integers, which must be equal) within `ulps` spacings of the output's type
    at that value, and what fp32 arithmetic may add where terms cancel: `noise`, absolute."""

    values: torch.Tensor
    ulps: float = 0.0
    noise: torch.Tensor | float = 0.0


@dataclass
class Case:
    """A function of a header, its arguments by name, and what it must write. An output's tensor comes filled with `blank`;
    a tensor that stands under two names is worked on in place. `stream` is not named."""

    function: str
    arguments: dict[str, Argument]
    expected: dict[str, Expected]
    scratch: frozenset[str] = field(default_factory=frozenset)
    """Names of tensors that the call may overwrite with anything."""


CaseMaker = Callable[[torch.dtype], Case]
Run = Callable[[Case], dict[str, torch.Tensor]]
"""A way of running: the outputs by name. KernelError if the call fails."""


class KernelError(RuntimeError):
    """The launcher returned an error, or the way of running found a fault in the kernel."""


def blank(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """An output before it is written: NaN, or -1."""
    size = torch.empty(0, dtype=dtype).element_size()
    length = torch.Size(shape).numel()
    return torch.full((length * size,), 0xFF, dtype=torch.uint8).view(dtype).view(shape)


def values(*shape: int, dtype: torch.dtype, seed: int, scale: float = 1.0) -> torch.Tensor:
    """Normal numbers, rounded to the type."""
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def pointers(case: Case) -> dict[str, torch.Tensor]:
    """The tensors among the arguments."""
    return {name: value for name, value in case.arguments.items() if isinstance(value, torch.Tensor)}


def c_arguments(function: Function, case: Case, addresses: Mapping[str, int | None]) -> list[int | float | None]:
    """The arguments in the header's order; tensors by their addresses."""
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
    """The distance of neighbouring numbers of `dtype` at each value of `wanted` (float64)."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(wanted).exponent - 1
    return torch.ldexp(torch.full_like(wanted, info.eps), exponent.clamp(min=torch.frexp(torch.tensor(info.tiny)).exponent - 1))


def check_outputs(case: Case, outputs: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """AssertionError if an output is not what is expected. Returns the largest error of each, as a share of what is allowed."""
    shares = {}
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
        shares[name] = float((error / allowed).nan_to_num(0).max()) if error.numel() else 0.0
    return shares

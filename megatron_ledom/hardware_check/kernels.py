"""Compares every fused operator on this device with its formula in double precision, forward and backward, in each type."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

import megatron_ledom.ops.causal_softmax  # noqa: F401  defines torch.ops.ledom.causal_softmax
from megatron_ledom.config.schema import ParallelConfig
from megatron_ledom.hardware_check.check import Outcome, Setting, failed, passed, skipped
from megatron_ledom.hardware_check.comparison import ULPS, Operator, drawn, error_fraction, largest_errors, outputs_of
from megatron_ledom.hardware_check.formulas import (
    adamw_formula,
    add_rms_norm_formula,
    causal_softmax_formula,
    cross_entropy_formula,
    rms_norm_formula,
    rope_formula,
    swiglu_formula,
)
from megatron_ledom.ops.cross_entropy import vocab_parallel_cross_entropy
from megatron_ledom.ops.fused_adam import FusedAdam, MultiTensorKernels
from megatron_ledom.ops.library import DTYPES, backend
from megatron_ledom.ops.rms_norm import add_rms_norm, rms_norm
from megatron_ledom.ops.rope import rope
from megatron_ledom.ops.swiglu import swiglu
from megatron_ledom.parallel.groups import start_distributed, stop_distributed
from megatron_ledom.platform.device import prepare_platform
from megatron_ledom.platform.launch import ALONE

EPS = 1e-5
ADAM: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
STEPS = 3
NORM_ULPS = 32.0
"""torch's norm on a CPU adds thousands of squares in a row; those of 16-bit numbers are all rounded in the same direction."""
SIZES = (1, 7, 8192, 8193, 40_000)
"""Elements of the tensors of a list: below, at and above the kernels' chunks of 8,192."""
Draw = Callable[..., torch.Tensor]


@dataclass(frozen=True, slots=True)
class Operation:
    """An operator with inputs of one shape and the formula of its exact results."""

    name: str
    operator: Operator
    formula: Operator
    inputs: Sequence[torch.Tensor]
    differentiable: int
    """Number of inputs, from the first on, that have gradients."""


def kernels(setting: Setting) -> Outcome:
    """Compare all operators with double precision. Fails if the largest error of one is above its tolerance.

    An operator whose second call gives other bits has an infinite error.
    """
    state = backend(setting.device)
    if not state.usable:
        return skipped(f"only plain torch runs here: {state.state}")
    start_distributed(prepare_platform(None, ALONE), ParallelConfig(), ALONE)
    rows = list(errors_of_all(setting.device))
    stop_distributed()
    tolerance = f"{ULPS:g} units in the last place of each type, {NORM_ULPS:g} for the norm"
    wrong = [f"{row['operator']} in {row['type']}" for row in rows if not row["error_by_tolerance"] <= 1]
    if wrong:
        reason = f"above the tolerance ({tolerance}), or not the same bits again (inf): {', '.join(sorted(set(wrong)))}"
        return failed(reason, errors=rows)
    worst = max(row["error_by_tolerance"] for row in rows)
    return passed(f"{len(rows)} comparisons; the largest error is {worst:.2f} of its tolerance ({tolerance})", errors=rows)


def errors_of_all(device: str) -> Iterator[dict[str, Any]]:
    """Yield operator, type, pass, and largest error as a fraction of the tolerance, for all operators of a device."""
    for dtype in DTYPES[device]:
        found: dict[tuple[str, str], float] = {}
        for operation in operations(device, dtype):
            for direction, error in _errors(operation).items():
                key = operation.name, direction
                found[key] = _larger(found.get(key, 0.0), error)
        for direction, error in softmax_errors(device, dtype).items():
            found["causal_softmax", direction] = error
        found |= {("adamw", "update"): adam_error(device, dtype), ("norm", "forward"): norm_error(device, dtype)}
        found["scale", "forward"] = scale_error(device, dtype)
        for (name, direction), error in found.items():
            yield {"operator": name, "type": str(dtype).removeprefix("torch."), "pass": direction, "error_by_tolerance": error}


def _larger(one: float, other: float) -> float:
    """Return the larger number; NaN is larger than any."""
    return max(one, other, key=lambda value: (value != value, value))


def _errors(operation: Operation) -> dict[str, float]:
    """Return the largest errors; a pass whose second run gives other bits has an infinite one."""
    first, second = (_results(operation) for _ in range(2))
    errors = largest_errors(operation.operator, operation.formula, operation.inputs, operation.differentiable)
    return {
        direction: error if all(map(torch.equal, first[direction], second[direction])) else math.inf
        for direction, error in errors.items()
    }


def _results(operation: Operation) -> dict[str, Sequence[torch.Tensor]]:
    """Return the outputs and the gradients of one run."""
    leaves = [tensor.clone().requires_grad_() for tensor in operation.inputs[: operation.differentiable]]
    outputs = outputs_of(operation.operator(*leaves, *operation.inputs[operation.differentiable :]))
    above = [drawn(*one.shape, dtype=one.dtype, seed=index, device=one.device) for index, one in enumerate(outputs)]
    return {"forward": outputs, "backward": torch.autograd.grad(outputs, leaves, above)}


def operations(device: str, dtype: torch.dtype) -> Iterator[Operation]:
    """Yield every operator but the softmax, with several shapes, all of which the kernels of both devices support."""
    draw = partial(drawn, dtype=dtype, device=device)
    for name in (norms, gates, rotations, losses):
        yield from name(draw, device)


def norms(draw: Draw, device: str) -> Iterator[Operation]:
    """Yield RMSNorm, alone and of a sum."""
    for rows, hidden in ((1, 8), (65, 1032), (130, 4096)):
        weight = draw(hidden, seed=1)
        yield Operation(
            "rms_norm",
            lambda x, w: rms_norm(x, w, EPS),
            lambda x, w: rms_norm_formula(x, w, EPS),
            [draw(rows, hidden), weight],
            2,
        )
        # multiples of 1/16 up to 4: their sums are exact in every type, so only the norm is rounded
        x, residual = (draw(rows, hidden, seed=seed).mul(16).round().clamp(-64, 64).div(16) for seed in (2, 3))
        yield Operation(
            "add_rms_norm",
            lambda x, r, w: add_rms_norm(x, r, w, EPS),
            lambda x, r, w: add_rms_norm_formula(x, r, w, EPS),
            [x, residual, weight],
            3,
        )


def gates(draw: Draw, device: str) -> Iterator[Operation]:
    """Yield SwiGLU of moderate and of large values."""
    for rows, width in ((1, 8), (65, 1032), (64, 2816)):
        for spread in (1.0, 30.0):
            yield Operation("swiglu", swiglu, swiglu_formula, [draw(rows, 2 * width) * spread], 1)


def rotations(draw: Draw, device: str) -> Iterator[Operation]:
    """Yield the rotation of a fused projection."""
    for groups, per_group, width in ((1, 8, 64), (4, 1, 16), (2, 4, 128)):
        angles = drawn(33, 1, 1, width // 2, dtype=torch.float32, seed=2, device=device).mul(100).repeat(1, 1, 1, 2)
        mixed = draw(33, 3, groups, (per_group + 2) * width)
        yield Operation("rope", lambda x, a=angles: rope(x, a), lambda x, a=angles: rope_formula(x, a), [mixed], 1)


def losses(draw: Draw, device: str) -> Iterator[Operation]:
    """Yield the cross-entropy over a padded vocabulary."""
    for tokens, ids, padded in ((5, 10, 16), (33, 8005, 8064), (16, 32_000, 32_000)):
        labels = torch.randint(0, ids, (tokens, 1), generator=torch.Generator().manual_seed(3)).to(device)
        yield Operation(
            "cross_entropy",
            lambda x, labels=labels, ids=ids: vocab_parallel_cross_entropy(x * 1, labels, ids, world())[0],
            lambda x, labels=labels, ids=ids: cross_entropy_formula(x[:, 0], labels[:, 0], ids)[:, None],
            [draw(tokens, 1, padded)],
            1,
        )


def world() -> dist.ProcessGroup:
    """Return the group of all ranks, here of one."""
    group = dist.group.WORLD
    assert group is not None
    return group


def softmax_errors(device: str, dtype: torch.dtype, scale: float = 0.125) -> dict[str, float]:
    """Return the errors of the causal softmax, square and with more keys than queries.

    Its gradient is computed from its rounded output, so the exact gradient is that of the same output: where terms cancel, the
    gradient of the exact output is another one.
    """
    errors = {"forward": 0.0, "backward": 0.0}
    for heads, queries, keys in ((3, 64, 64), (2, 8, 200), (1, 136, 1032)):
        scores, gradient = (drawn(2, heads, queries, keys, dtype=dtype, seed=seed, device=device) for seed in (4, 5))
        found = torch.ops.ledom.causal_softmax(scores.requires_grad_(), None, scale)
        (found_gradient,) = torch.autograd.grad(found, scores, gradient)
        weights, from_above = found.detach().double(), gradient.double()
        exact = scale * weights * (from_above - (weights * from_above).sum(-1, keepdim=True))
        forward = error_fraction(found, causal_softmax_formula(scores.detach().double(), scale))
        errors["forward"] = _larger(errors["forward"], forward)
        errors["backward"] = _larger(errors["backward"], error_fraction(found_gradient, exact))
    return errors


def adam_error(device: str, dtype: torch.dtype) -> float:
    """Return the error of parameters after some steps of AdamW with clipping's gradients, for fp32 and for 16-bit weights."""
    weights = [drawn(size, dtype=dtype, seed=index, device=device) for index, size in enumerate(SIZES)]
    gradients = [
        [drawn(size, dtype=dtype, seed=100 * step + index, device=device) for index, size in enumerate(SIZES)]
        for step in range(1, STEPS + 1)
    ]
    parameters = [torch.nn.Parameter(weight.clone()) for weight in weights]
    optimizer = FusedAdam(parameters, **ADAM)
    for of_step in gradients:
        for parameter, gradient in zip(parameters, of_step, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
    exact = [
        adamw_formula(weight.double(), [of_step[index].double() for of_step in gradients], **ADAM)
        for index, weight in enumerate(weights)
    ]
    return max(error_fraction(one.detach(), other) for one, other in zip(parameters, exact, strict=True))


def norm_error(device: str, dtype: torch.dtype) -> float:
    """Return the error of the norm of a list of tensors, which is fp32."""
    tensors = [drawn(size, dtype=dtype, seed=index, device=device) for index, size in enumerate(SIZES)]
    found, _ = MultiTensorKernels().norm(1, torch.zeros(1, device=device), [tensors], False)
    return error_fraction(found, torch.cat([tensor.double() for tensor in tensors]).norm().view(1), NORM_ULPS)


def scale_error(device: str, dtype: torch.dtype) -> float:
    """Return the error of scaling a list of tensors into another list."""
    tensors = [drawn(size, dtype=dtype, seed=index, device=device) for index, size in enumerate(SIZES)]
    targets = [torch.zeros_like(tensor) for tensor in tensors]
    MultiTensorKernels().scale(1, torch.zeros(1, device=device), [tensors, targets], 0.3)
    return max(error_fraction(one, 0.3 * other.double()) for one, other in zip(targets, tensors, strict=True))

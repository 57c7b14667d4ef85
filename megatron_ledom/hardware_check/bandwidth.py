"""Measures the bytes per second of each operator on large tensors, as a fraction of those of a copy on the same device."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from megatron_ledom.config.schema import ParallelConfig
from megatron_ledom.hardware_check.check import Outcome, Setting, failed, passed, skipped
from megatron_ledom.hardware_check.comparison import Operator, outputs_of
from megatron_ledom.hardware_check.kernels import EPS, world
from megatron_ledom.ops.causal_softmax import causal_softmax
from megatron_ledom.ops.cross_entropy import vocab_parallel_cross_entropy
from megatron_ledom.ops.fused_adam import FusedAdam, MultiTensorKernels
from megatron_ledom.ops.library import backend
from megatron_ledom.ops.rms_norm import rms_norm
from megatron_ledom.ops.rope import rope
from megatron_ledom.ops.swiglu import swiglu
from megatron_ledom.parallel.groups import start_distributed, stop_distributed
from megatron_ledom.platform.device import Platform, prepare_platform
from megatron_ledom.platform.launch import ALONE

LEAST_FRACTION = 0.2
"""A CUDA kernel that moves its least bytes slower than this fraction of a copy has failed: something is seriously wrong."""
ROWS = {"cuda": 32_768, "cpu": 256}
"""Tokens of the tensors; the other sizes are those of a 7B model on a GPU, and of a small one on a CPU."""
LISTS = {"cuda": (16, 1 << 23), "cpu": (16, 1 << 17)}
"""Number of the optimizer's tensors, and elements of each: the host takes 2 to 16 us for a tensor, and a GPU must take longer."""
COPIED_BYTES = {"cuda": 1 << 30, "cpu": 1 << 26}
SERIES = {"cuda": 20, "cpu": 2}
"""Calls that are measured together, because a wait for a GPU takes about as long as a kernel."""
Action = Callable[[], Any]


@dataclass(frozen=True, slots=True)
class Transfer:
    """An action that moves at least `least_bytes` between a device and its memory: each input and output once."""

    name: str
    action: Action
    least_bytes: int


def bandwidth(setting: Setting) -> Outcome:
    """Measure all operators. On a CPU, where arithmetic limits some of them, the fractions are only reported."""
    state = backend(setting.device)
    if not state.usable:
        return skipped(f"only plain torch runs here: {state.state}")
    platform = prepare_platform(None, ALONE)
    start_distributed(platform, ParallelConfig(), ALONE)
    rows: list[dict[str, Any]] = []
    copy = copy_bandwidth(platform)
    for transfer in transfers(platform.device):
        speed = transfer.least_bytes / seconds_of(platform, transfer.action)
        rows.append({"operator": transfer.name, "gb_per_second": speed / 1e9, "fraction_of_copy": speed / copy})
    stop_distributed()
    numbers = {"copy_gb_per_second": copy / 1e9, "operators": rows}
    slow = [row["operator"] for row in rows if row["fraction_of_copy"] < LEAST_FRACTION]
    if slow and setting.device == "cuda":
        return failed(f"below {LEAST_FRACTION:.0%} of the bandwidth of a copy: {', '.join(slow)}", **numbers)
    slowest = min(rows, key=lambda row: row["fraction_of_copy"])
    return passed(
        f"a copy moves {copy / 1e9:,.0f} GB/s, the operators {slowest['fraction_of_copy']:.0%} of it or more"
        f" ({slowest['operator']} is the slowest)",
        **numbers,
    )


def seconds_of(platform: Platform, action: Action, rounds: int = 3) -> float:
    """Return the seconds of one call: the shortest mean of a series, after a first call."""
    action()
    found, calls = [], SERIES[platform.device.type]
    for _ in range(rounds):
        platform.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            action()
        platform.synchronize()
        found.append((time.perf_counter() - start) / calls)
    return min(found)


def copy_bandwidth(platform: Platform) -> float:
    """Return the bytes per second of a copy, read and written."""
    source = torch.zeros(COPIED_BYTES[platform.device.type], dtype=torch.uint8, device=platform.device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds_of(platform, lambda: target.copy_(source))


def transfers(device: torch.device) -> Iterator[Transfer]:
    """Yield forward and backward of each operator, then the optimizer's kernels, on large bf16 tensors."""
    rows, scale = ROWS[device.type], 8 if device.type == "cuda" else 1
    normal = partial(torch.randn, dtype=torch.bfloat16, device=device)
    yield from both("rms_norm", partial(rms_norm, eps=EPS), [normal(rows, 512 * scale), normal(512 * scale)])
    yield from both("swiglu", swiglu, [normal(rows, 2 * 1408 * scale)])
    angles = torch.rand(rows, 1, 1, 64, device=device).repeat(1, 1, 1, 2)
    yield from both("rope", partial(rope, angles_S11D=angles), [normal(rows, 1, scale, (4 + 2) * 128)], reads_inputs=False)
    length = 256 * scale
    yield from both("causal_softmax", partial(causal_softmax, scale=0.125), [normal(1, scale * scale, length, length)])
    yield from cross_entropy(rows, normal)
    yield from optimizer_kernels(device, *LISTS[device.type])


def both(name: str, operator: Operator, inputs: Sequence[torch.Tensor], *, reads_inputs: bool = True) -> Iterator[Transfer]:
    """Yield the forward pass, and the backward pass alone. reads_inputs: False if it reads only the gradients."""
    leaves = [tensor.requires_grad_() for tensor in inputs]
    outputs = outputs_of(operator(*leaves))
    gradients = [torch.randn_like(output) for output in outputs]
    read, written = (sum(tensor.nbytes for tensor in tensors) for tensors in (leaves, outputs))

    def forward() -> None:
        """Compute the outputs."""
        with torch.no_grad():
            operator(*leaves)

    def backward() -> None:
        """Compute the gradients."""
        torch.autograd.grad(outputs, leaves, gradients, retain_graph=True)

    yield Transfer(f"{name} forward", forward, read + written)
    yield Transfer(f"{name} backward", backward, written + read + (read if reads_inputs else 0))


def cross_entropy(rows: int, normal: Callable[..., torch.Tensor]) -> Iterator[Transfer]:
    """Yield the loss, and loss with gradient: the gradient takes the memory of the logits, so it runs once per forward pass."""
    logits, ids = normal(rows, 1, 8064), 8000
    labels = torch.randint(0, ids, (rows, 1), device=logits.device)

    def forward() -> None:
        """Compute the loss."""
        with torch.no_grad():
            vocab_parallel_cross_entropy(logits, labels, ids, world())

    def with_gradient() -> None:
        """Compute loss and gradient."""
        leaf = logits.detach().requires_grad_()
        losses, _ = vocab_parallel_cross_entropy(leaf, labels, ids, world())
        torch.autograd.backward(losses.sum())

    yield Transfer("cross_entropy forward", forward, logits.nbytes)
    yield Transfer("cross_entropy forward and backward", with_gradient, 3 * logits.nbytes)


def optimizer_kernels(device: torch.device, count: int, size: int) -> Iterator[Transfer]:
    """Yield AdamW on fp32 weights, the norm and the scaling of `count` tensors of `size` elements."""
    parameters = [torch.nn.Parameter(torch.randn(size, device=device)) for _ in range(count)]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    optimizer, kernels, flag = FusedAdam(parameters), MultiTensorKernels(), torch.zeros(1, device=device)
    num_bytes = 4 * size * count
    # reads gradient, weight and two moments, writes all but the gradient
    yield Transfer("adamw", optimizer.step, 7 * num_bytes)
    yield Transfer("norm", lambda: kernels.norm(1, flag, [gradients], False), num_bytes)
    yield Transfer("scale", lambda: kernels.scale(1, flag, [gradients, gradients], 0.999), 2 * num_bytes)

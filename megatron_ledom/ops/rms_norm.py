"""RMSNorm (Zhang and Sennrich, arXiv 1910.07467, equation 4): reference, operator, and the modules for layer specs.

Shape letters: N rows (any leading axes), H hidden.
"""

from typing import Any

import torch

from megatron_ledom.ops.library import check_alike, check_shape, cpu_kernels, define, define_gradient, is_bf16, runs_kernel


def rms_norm_reference(x_NH: torch.Tensor, weight_H: torch.Tensor, eps: float) -> torch.Tensor:
    """Return x / sqrt(mean(x^2) + eps) * weight over the last axis, in fp32, rounded once, with the shape and type of x."""
    wide = x_NH.float()
    return (wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt() * weight_H.float()).to(x_NH.dtype)


def rms_norm(x_NH: torch.Tensor, weight_H: torch.Tensor, eps: float) -> torch.Tensor:
    """Compute RMSNorm over the last axis by the kernel of x's device, else by the reference."""
    if not runs_kernel(x_NH, weight_H):
        return rms_norm_reference(x_NH, weight_H, eps)
    normed: torch.Tensor = torch.ops.ledom.rms_norm(x_NH.contiguous(), weight_H, eps)
    return normed


def add_rms_norm_reference(
    x_NH: torch.Tensor, residual_NH: torch.Tensor, weight_H: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the RMSNorm of x + residual, and the sum itself, which is rounded to x's type before the norm."""
    sum_NH = x_NH + residual_NH
    return rms_norm_reference(sum_NH, weight_H, eps), sum_NH


def add_rms_norm(
    x_NH: torch.Tensor, residual_NH: torch.Tensor, weight_H: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute `add_rms_norm_reference`, by the kernel of x's device if it can run: one pass over the rows, forward and backward."""
    if not runs_kernel(x_NH, residual_NH, weight_H):
        return add_rms_norm_reference(x_NH, residual_NH, weight_H, eps)
    normed, added = torch.ops.ledom.add_rms_norm(x_NH.contiguous(), residual_NH.contiguous(), weight_H, eps)
    return normed, added


class TorchRMSNorm(torch.nn.RMSNorm):
    """RMSNorm over the last axis by torch, with support for sequence parallelism.

    megatron-core's own torch norm refuses sequence parallelism, in which each tensor-parallel rank has only its part of the
    sequence. The mark on the weight lets megatron-core sum its gradient over those ranks.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **unused: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class FusedRMSNorm(TorchRMSNorm):
    """RMSNorm in one pass over the rows, forward and backward."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the norm of x [..., H], in the same shape."""
        assert self.eps is not None
        return rms_norm(x, self.weight, self.eps)

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the norm of x + residual, and the sum, all [..., H]."""
        assert self.eps is not None
        return add_rms_norm(x, residual, self.weight, self.eps)


def _fake(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return torch.empty_like(x)


def _cpu(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    hidden = x.shape[-1]
    check_alike(x, weight)
    check_shape("weight", weight, (hidden,))
    y = torch.empty_like(x)
    rows = x.numel() // max(hidden, 1)
    cpu_kernels().rms_norm_forward(is_bf16(x), x.data_ptr(), 0, weight.data_ptr(), y.data_ptr(), 0, rows, hidden, eps)
    return y


def _fake_add(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


def _cpu_add(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    hidden = x.shape[-1]
    check_alike(x, residual, weight)
    check_shape("residual", residual, tuple(x.shape))
    check_shape("weight", weight, (hidden,))
    normed, added = torch.empty_like(x), torch.empty_like(x)
    addresses = [tensor.data_ptr() for tensor in (x, residual, weight, normed, added)]
    cpu_kernels().rms_norm_forward(is_bf16(x), *addresses, x.numel() // max(hidden, 1), hidden, eps)
    return normed, added


Gradients = tuple[torch.Tensor, torch.Tensor]


def _fake_backward(dy: torch.Tensor, dsum: torch.Tensor | None, x: torch.Tensor, weight: torch.Tensor, eps: float) -> Gradients:
    return torch.empty_like(x), torch.empty_like(weight)


def _cpu_backward(dy: torch.Tensor, dsum: torch.Tensor | None, x: torch.Tensor, weight: torch.Tensor, eps: float) -> Gradients:
    kernels, hidden = cpu_kernels(), x.shape[-1]
    past = [] if dsum is None else [dsum]
    check_alike(dy, *past, x, weight)
    for gradient in (dy, *past):
        check_shape("the gradient", gradient, tuple(x.shape))
    check_shape("weight", weight, (hidden,))
    rows, dx = x.numel() // max(hidden, 1), torch.empty_like(x)
    sums = x.new_empty((-(-rows // kernels.NORM_BLOCK_ROWS), hidden), dtype=torch.float32)
    addresses = [0 if tensor is None else tensor.data_ptr() for tensor in (dy, dsum, x, weight, dx, sums)]
    kernels.rms_norm_backward(is_bf16(x), *addresses, rows, hidden, eps)
    return dx, sums.sum(0).to(weight.dtype)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(inputs[0], inputs[1])
    ctx.eps = inputs[2]


def _backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
    return (*torch.ops.ledom.rms_norm_backward(dy.contiguous(), None, *ctx.saved_tensors, ctx.eps), None)


def _remember_sum(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    ctx.save_for_backward(output[1], inputs[2])
    ctx.eps = inputs[3]


def _backward_of_add(ctx: Any, dy: torch.Tensor, dsum: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:
    dx, dweight = torch.ops.ledom.rms_norm_backward(dy.contiguous(), dsum.contiguous(), *ctx.saved_tensors, ctx.eps)
    return dx, dx, dweight, None


define("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor", _fake, _cpu)
define("add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)", _fake_add, _cpu_add)
define(
    "rms_norm_backward(Tensor dy, Tensor? dsum, Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)",
    _fake_backward,
    _cpu_backward,
)
define_gradient("rms_norm", _backward, _remember)
define_gradient("add_rms_norm", _backward_of_add, _remember_sum)

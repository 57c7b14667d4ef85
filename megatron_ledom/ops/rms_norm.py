"""RMSNorm (Zhang and Sennrich, arXiv 1910.07467, equation 4): reference, operator, and the modules that layer specs take.

Shape letters: N rows (any leading axes), H hidden.
"""

from typing import Any

import torch

from megatron_ledom.ops.library import check_alike, check_shape, cpu_kernels, define, define_gradient, is_bf16, runs_kernel


def rms_norm_reference(x_NH: torch.Tensor, weight_H: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, in fp32, rounded once. Same shape and type as x."""
    wide = x_NH.float()
    return (wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt() * weight_H.float()).to(x_NH.dtype)


def rms_norm(x_NH: torch.Tensor, weight_H: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm over the last axis by the kernel of x's device, else by the reference. Same shape and type as x."""
    if not runs_kernel(x_NH, weight_H):
        return rms_norm_reference(x_NH, weight_H, eps)
    normed: torch.Tensor = torch.ops.ledom.rms_norm(x_NH.contiguous(), weight_H, eps)
    return normed


class TorchRMSNorm(torch.nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis; its weight knows of sequence parallelism.

    megatron-core's own torch norm refuses sequence parallelism; there, each tensor-parallel rank sees only its part of the
    sequence, and the mark on the weight makes its gradient summed over those ranks.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **unused: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class FusedRMSNorm(TorchRMSNorm):
    """The same, in one pass over the rows each way."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., H] -> the same shape."""
        assert self.eps is not None
        return rms_norm(x, self.weight, self.eps)


def _fake(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return torch.empty_like(x)


def _cpu(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    hidden = x.shape[-1]
    check_alike(x, weight)
    check_shape("weight", weight, (hidden,))
    y = torch.empty_like(x)
    rows = x.numel() // max(hidden, 1)
    cpu_kernels().rms_norm_forward(is_bf16(x), x.data_ptr(), weight.data_ptr(), y.data_ptr(), rows, hidden, eps)
    return y


def _fake_backward(dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(x), torch.empty_like(weight)


def _cpu_backward(dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    kernels, hidden = cpu_kernels(), x.shape[-1]
    check_alike(dy, x, weight)
    check_shape("the gradient", dy, tuple(x.shape))
    check_shape("weight", weight, (hidden,))
    rows, dx = x.numel() // max(hidden, 1), torch.empty_like(x)
    sums = x.new_empty((-(-rows // kernels.NORM_BLOCK_ROWS), hidden), dtype=torch.float32)
    addresses = [tensor.data_ptr() for tensor in (dy, x, weight, dx, sums)]
    kernels.rms_norm_backward(is_bf16(x), *addresses, rows, hidden, eps)
    return dx, sums.sum(0).to(weight.dtype)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(inputs[0], inputs[1])
    ctx.eps = inputs[2]


def _backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
    return (*torch.ops.ledom.rms_norm_backward(dy.contiguous(), *ctx.saved_tensors, ctx.eps), None)


define("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor", _fake, _cpu)
define("rms_norm_backward(Tensor dy, Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)", _fake_backward, _cpu_backward)
define_gradient("rms_norm", _backward, _remember)

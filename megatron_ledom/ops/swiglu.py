"""SwiGLU (Shazeer, arXiv 2002.05202, equation 5) on megatron-core's rows [gate, up]: reference, operator, module.

Shape letters: N rows (any leading axes), F width of the result.
"""

from typing import Any

import torch
import torch.nn.functional as F

from megatron_ledom.ops.library import check_alike, check_shape, cpu_kernels, define, define_gradient, is_bf16, runs_kernel


def swiglu_reference(x_N2F: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) * up in fp32, rounded once: [..., 2F] -> [..., F]."""
    gate, up = x_N2F.float().chunk(2, -1)
    return (F.silu(gate) * up).to(x_N2F.dtype)


def swiglu(x_N2F: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) * up [..., F] of x [..., 2F], by the kernel of x's device or the reference. Only x is kept for backward."""
    if not runs_kernel(x_N2F) or (x_N2F.is_cuda and x_N2F.shape[-1] % 16):
        return swiglu_reference(x_N2F)
    product: torch.Tensor = torch.ops.ledom.swiglu(x_N2F.contiguous())
    return product


class FusedSwiGLU(torch.nn.Module):
    """The `activation_func` of an MLP's spec; it has no weights."""

    def __init__(self, config: Any) -> None:
        super().__init__()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x [..., 2F] to [..., F]."""
        return swiglu(x)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return nothing: there are no weights."""
        return {}


def _fake(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


def _cpu(x: torch.Tensor) -> torch.Tensor:
    check_alike(x)
    y = _fake(x)
    width = y.shape[-1]
    check_shape("x", x, (*x.shape[:-1], 2 * width))
    cpu_kernels().swiglu_forward(is_bf16(x), x.data_ptr(), y.data_ptr(), y.numel() // max(width, 1), width)
    return y


def _fake_backward(dy: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def _cpu_backward(dy: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    check_alike(dy, x)
    check_shape("x", x, (*dy.shape[:-1], 2 * dy.shape[-1]))
    dx, width = torch.empty_like(x), dy.shape[-1]
    rows = dy.numel() // max(width, 1)
    cpu_kernels().swiglu_backward(is_bf16(x), x.data_ptr(), dy.data_ptr(), dx.data_ptr(), rows, width)
    return dx


def _remember(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(inputs[0])


def _backward(ctx: Any, dy: torch.Tensor) -> torch.Tensor:
    gradient: torch.Tensor = torch.ops.ledom.swiglu_backward(dy.contiguous(), *ctx.saved_tensors)
    return gradient


define("swiglu(Tensor x) -> Tensor", _fake, _cpu)
define("swiglu_backward(Tensor dy, Tensor x) -> Tensor", _fake_backward, _cpu_backward)
define_gradient("swiglu", _backward, _remember)

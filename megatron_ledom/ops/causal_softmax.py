"""Causal softmax of attention scores, within a sample or a document: reference and operator for attention without flash kernels.

Shape letters: B batch, H heads, Q queries, K keys.
"""

from typing import Any

import torch

from megatron_ledom.ops.library import define, define_gradient, runs_kernel


def causal_softmax_reference(scores_BHQK: torch.Tensor, scale: float, documents_BK: torch.Tensor | None = None) -> torch.Tensor:
    """Return softmax(scale * scores) over the visible keys of each query and 0 elsewhere; computed in fp32, rounded once.

    Key k is visible to query q if k <= q + K - Q and, with documents [B, K], both are in the same document.
    """
    queries, keys = scores_BHQK.shape[-2:]
    visible = torch.ones(queries, keys, dtype=torch.bool, device=scores_BHQK.device).tril(keys - queries)[None, None]
    if documents_BK is not None:
        visible = visible & (documents_BK[:, None, keys - queries :, None] == documents_BK[:, None, None, :])
    return (scores_BHQK.float() * scale).masked_fill(~visible, -torch.inf).softmax(-1).to(scores_BHQK.dtype)


def causal_softmax(scores_BHQK: torch.Tensor, scale: float, documents_BK: torch.Tensor | None = None) -> torch.Tensor:
    """Compute `causal_softmax_reference`, by the CUDA kernel if it is built. documents: int32, not decreasing in a sample."""
    if scores_BHQK.device.type != "cuda" or not runs_kernel(scores_BHQK):
        return causal_softmax_reference(scores_BHQK, scale, documents_BK)
    output: torch.Tensor = torch.ops.ledom.causal_softmax(scores_BHQK.contiguous(), documents_BK, scale)
    return output


def _fake(scores: torch.Tensor, documents: torch.Tensor | None, scale: float) -> torch.Tensor:
    return torch.empty_like(scores)


def _cpu(scores: torch.Tensor, documents: torch.Tensor | None, scale: float) -> torch.Tensor:
    return causal_softmax_reference(scores, scale, documents)


def _fake_backward(gradient: torch.Tensor, output: torch.Tensor, documents: torch.Tensor | None, scale: float) -> torch.Tensor:
    return torch.empty_like(output)


def _cpu_backward(gradient: torch.Tensor, output: torch.Tensor, documents: torch.Tensor | None, scale: float) -> torch.Tensor:
    wide, from_above = output.float(), gradient.float()
    return (scale * wide * (from_above - (wide * from_above).sum(-1, keepdim=True))).to(output.dtype)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(output, *(tensor for tensor in inputs[1:2] if tensor is not None))
    ctx.scale = inputs[2]


def _backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
    output, *documents = ctx.saved_tensors
    of_keys = documents[0] if documents else None
    return torch.ops.ledom.causal_softmax_backward(gradient.contiguous(), output, of_keys, ctx.scale), None, None


define("causal_softmax(Tensor scores, Tensor? documents, float scale) -> Tensor", _fake, _cpu)
define(
    "causal_softmax_backward(Tensor gradient, Tensor output, Tensor? documents, float scale) -> Tensor",
    _fake_backward,
    _cpu_backward,
)
define_gradient("causal_softmax", _backward, _remember)

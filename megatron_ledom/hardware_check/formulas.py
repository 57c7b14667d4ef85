"""The formulas of the fused operators in plain torch, in the precision of their inputs: exact results in double precision.

Shape letters: S sequence, B batch, G key-value groups, R query heads per group, D head width, Q queries, K keys, N tokens, V ids.
"""

import torch
import torch.nn.functional as F


def rms_norm_formula(x_NH: torch.Tensor, weight_H: torch.Tensor, eps: float) -> torch.Tensor:
    """Return x / sqrt(mean(x^2) + eps) * weight."""
    return x_NH * (x_NH.square().mean(-1, keepdim=True) + eps).rsqrt() * weight_H


def add_rms_norm_formula(
    x_NH: torch.Tensor, residual_NH: torch.Tensor, weight_H: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the RMSNorm of the sum, and the sum."""
    return rms_norm_formula(x_NH + residual_NH, weight_H, eps), x_NH + residual_NH


def swiglu_formula(x_N2F: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) * up."""
    gate, up = x_N2F.chunk(2, -1)
    return F.silu(gate) * up


def rope_formula(mixed_SBGM: torch.Tensor, angles_S11D: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Split [S, B, G, (R + 2) * D] into query, key and value, and rotate the first two."""
    width = angles_S11D.shape[-1]
    heads = mixed_SBGM.view(*mixed_SBGM.shape[:-1], -1, width)
    half = angles_S11D[:, 0, 0, : width // 2].to(mixed_SBGM.dtype)
    cos, sin = (table[:, None, None, None] for table in (half.cos(), half.sin()))
    first, second = heads[..., :-1, :].chunk(2, -1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
    return rotated[..., :-1, :].flatten(2, 3), rotated[..., -1, :], heads[..., -1, :]


def causal_softmax_formula(scores_BHQK: torch.Tensor, scale: float) -> torch.Tensor:
    """Return softmax(scale * scores) over the keys up to each query, and 0 elsewhere."""
    queries, keys = scores_BHQK.shape[-2:]
    hidden = torch.ones(queries, keys, dtype=torch.bool, device=scores_BHQK.device).triu(keys - queries + 1)
    return (scores_BHQK * scale).masked_fill(hidden, -torch.inf).softmax(-1)


def cross_entropy_formula(logits_NV: torch.Tensor, labels_N: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Return the negative log-likelihood of each label among the first `vocab_size` ids."""
    return F.cross_entropy(logits_NV[:, :vocab_size], labels_N, reduction="none")


def adamw_formula(
    weight: torch.Tensor,
    gradients: list[torch.Tensor],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> torch.Tensor:
    """Return the weight after a step with each gradient (Loshchilov and Hutter, arXiv 1711.05101, algorithm 2)."""
    exp_avg, exp_avg_sq = torch.zeros_like(weight), torch.zeros_like(weight)
    for step, gradient in enumerate(gradients, 1):
        exp_avg = betas[0] * exp_avg + (1 - betas[0]) * gradient
        exp_avg_sq = betas[1] * exp_avg_sq + (1 - betas[1]) * gradient.square()
        mean, square = exp_avg / (1 - betas[0] ** step), exp_avg_sq / (1 - betas[1] ** step)
        weight = weight - lr * (mean / (square.sqrt() + eps) + weight_decay * weight)
    return weight

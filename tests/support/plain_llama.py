"""The model and the optimizer step in plain torch, written from the papers, as a reference for training.

The architecture is that of Touvron et al. 2023, arXiv 2302.13971. Weights have the names and shapes of Hugging Face Llama.
Shape letters: B batch, S sequence, H query heads, G key-value heads, D head width.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from megatron_ledom.config.derived import head_dim, query_groups
from megatron_ledom.config.schema import ModelConfig, RunConfig


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.width, self.heads, self.groups = head_dim(model), model.num_attention_heads, query_groups(model)
        self.q_proj = nn.Linear(model.hidden_size, self.heads * self.width, bias=False)
        self.k_proj = nn.Linear(model.hidden_size, self.groups * self.width, bias=False)
        self.v_proj = nn.Linear(model.hidden_size, self.groups * self.width, bias=False)
        self.o_proj = nn.Linear(self.heads * self.width, model.hidden_size, bias=False)

    def forward(self, hidden: torch.Tensor, cos_sin: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Return hidden [B, S, hidden] after this module."""
        q, k, v = (
            projection(hidden).unflatten(-1, (-1, self.width)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = (rotated(heads, *cos_sin) for heads in (q, k))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.heads != self.groups)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate x) * up x)."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(model.hidden_size, model.ffn_hidden_size, bias=False)
        self.up_proj = nn.Linear(model.hidden_size, model.ffn_hidden_size, bias=False)
        self.down_proj = nn.Linear(model.ffn_hidden_size, model.hidden_size, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return hidden [B, S, hidden] after this module."""
        return self.down_proj(F.silu(self.gate_proj(hidden)) * self.up_proj(hidden))


class Layer(nn.Module):
    """Attention and feed-forward, each after a norm, added to the residual stream."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(model.hidden_size, eps=model.layernorm_epsilon)
        self.self_attn = Attention(model)
        self.post_attention_layernorm = nn.RMSNorm(model.hidden_size, eps=model.layernorm_epsilon)
        self.mlp = FeedForward(model)

    def forward(self, hidden: torch.Tensor, cos_sin: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Return hidden [B, S, hidden] after this module."""
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), cos_sin)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class PlainLlama(nn.Module):
    """A model that maps ids [B, S] to logits [B, S, vocab_size]."""

    def __init__(self, model: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(vocab_size, model.hidden_size),
                "layers": nn.ModuleList(Layer(model) for _ in range(model.num_layers)),
                "norm": nn.RMSNorm(model.hidden_size, eps=model.layernorm_epsilon),
            }
        )
        self.lm_head = nn.Linear(model.hidden_size, vocab_size, bias=False)
        self.rotary_base, self.width = model.rotary_base, head_dim(model)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the logits [B, S, vocab_size] of ids [B, S]."""
        hidden = self.model["embed_tokens"](ids)
        cos_sin = rotary_angles(ids.shape[1], self.width, self.rotary_base, hidden.dtype)
        for layer in self.model["layers"]:
            hidden = layer(hidden, cos_sin)
        return self.lm_head(self.model["norm"](hidden))


def rotary_angles(length: int, width: int, base: float, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cos and sin [S, D] of position * base ** (-2i / D), equal for both halves of a head.

    Su et al. 2021, arXiv 2104.09864.
    """
    frequencies = base ** -(torch.arange(0, width, 2, dtype=torch.float32) / width)
    angles = torch.outer(torch.arange(length, dtype=torch.float32), frequencies).repeat(1, 2)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotated(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate each pair (i, i + D/2) of heads [B, H, S, D] by its angle."""
    first, second = heads.chunk(2, -1)
    return heads * cos + torch.cat([-second, first], -1) * sin


def plain_lr(config: RunConfig, step: int) -> float:
    """Return the learning rate of optimizer step `step`, counted from 0, by the definition of the schedule."""
    settings, done = config.optimizer, step + 0.0
    end = settings.lr_decay_iters or config.train.train_iters
    if done <= settings.lr_warmup_iters and settings.lr_warmup_iters:
        return settings.lr * done / settings.lr_warmup_iters
    if settings.lr_decay_style == "constant":
        return settings.lr
    start = settings.lr_warmup_iters
    if settings.lr_decay_style == "WSD":
        assert settings.lr_wsd_decay_iters is not None
        start = end - settings.lr_wsd_decay_iters
    fraction = min(max((done - start) / (end - start), 0.0), 1.0)
    shape = settings.lr_wsd_decay_style if settings.lr_decay_style == "WSD" else settings.lr_decay_style
    left = {
        "cosine": 0.5 * (1 + math.cos(math.pi * fraction)),
        "linear": 1 - fraction,
        "exponential": 2 * 0.5**fraction - 1,
        "minus_sqrt": 1 - math.sqrt(fraction),
    }[shape]
    return settings.min_lr + left * (settings.lr - settings.min_lr)


def plain_optimizer(config: RunConfig, model: nn.Module) -> torch.optim.AdamW:
    """Return torch's fused AdamW without weight decay of vectors (norms)."""
    settings = config.optimizer
    decayed = [weight for weight in model.parameters() if weight.dim() > 1]
    vectors = [weight for weight in model.parameters() if weight.dim() == 1]
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    betas = (settings.adam_beta1, settings.adam_beta2)
    return torch.optim.AdamW(groups, lr=settings.lr, betas=betas, eps=settings.adam_eps, fused=True)


def plain_step(
    config: RunConfig,
    model: Callable[[torch.Tensor], torch.Tensor],
    optimizer: torch.optim.AdamW,
    batches: list[dict[str, torch.Tensor]],
    lr: float,
) -> tuple[float, float]:
    """Run one optimizer step on the micro-batches of a global batch.

    Returns the mean loss without z-loss and the gradient norm before clipping.
    """
    optimizer.zero_grad()
    count, total = sum(float(batch["loss_mask"].sum()) for batch in batches), 0.0
    for batch in batches:
        logits = model(batch["tokens"]).float()
        losses = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="none")
        mask = batch["loss_mask"].flatten()
        total += float((losses.detach() * mask).sum())
        if config.train.z_loss_coeff:
            losses = losses + config.train.z_loss_coeff * logits.logsumexp(-1).square().flatten()
        ((losses * mask).sum() / count).backward()
    limit = config.optimizer.clip_grad or math.inf
    norm = torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], limit)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    return total / count, float(norm)

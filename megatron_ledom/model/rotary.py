"""Rotary frequencies (Su et al., arXiv 2104.09864), plain or stretched for longer contexts, in one place for every kind.

megatron-core's own options leave out what public models set (the bounds of llama3, yarn outside multi-latent attention), so
the model gets the frequencies themselves. What yarn multiplies queries and keys by goes into the scale of the softmax: both
only meet in their product.
"""

import math

import torch

from megatron_ledom.config.derived import head_dim
from megatron_ledom.config.schema import ModelConfig


def rotary_frequencies(model: ModelConfig) -> torch.Tensor:
    """Radians a position of each pair of a head [D / 2], fp32."""
    width = head_dim(model)
    plain = 1.0 / (model.rotary_base ** (torch.arange(0, width, 2, dtype=torch.float32) / width))
    if model.rope_scaling is None:
        return plain
    stretched = plain / model.rope_scaling_factor
    if model.rope_scaling == "linear":
        return stretched
    kept = _kept_by_llama3(model, plain) if model.rope_scaling == "llama3" else _kept_by_yarn(model, width)
    return stretched * (1 - kept) + plain * kept


def softmax_scale(model: ModelConfig) -> float | None:
    """What scores are multiplied by; None: 1 / sqrt(D). yarn: section 3.4 of Peng et al., arXiv 2309.00071."""
    if model.rope_scaling != "yarn":
        return None
    factor = model.rope_scaling_attention_factor
    return (0.1 * math.log(model.rope_scaling_factor) + 1.0 if factor is None else factor) ** 2 / math.sqrt(head_dim(model))


def _kept_by_llama3(model: ModelConfig, plain: torch.Tensor) -> torch.Tensor:
    """Share of each frequency that is not stretched [D / 2] (Llama 3.1): by its turns in the original positions."""
    turns = model.rope_scaling_original_max_position * plain / (2 * math.pi)
    low, high = model.rope_scaling_low_freq_factor, model.rope_scaling_high_freq_factor
    return ((turns - low) / (high - low)).clamp(0, 1)


def _kept_by_yarn(model: ModelConfig, width: int) -> torch.Tensor:
    """As `_kept_by_llama3`, but a ramp over the pairs' numbers, its ends rounded outwards (Peng et al., section 3.2)."""

    def pair_that_turns(times: float) -> float:
        positions = model.rope_scaling_original_max_position
        return width * math.log(positions / (times * 2 * math.pi)) / (2 * math.log(model.rotary_base))

    first = max(math.floor(pair_that_turns(model.rope_scaling_beta_fast)), 0)
    last = min(math.ceil(pair_that_turns(model.rope_scaling_beta_slow)), width - 1)
    pairs = torch.arange(width // 2, dtype=torch.float32)
    return 1 - ((pairs - first) / (last - first if last != first else 0.001)).clamp(0, 1)

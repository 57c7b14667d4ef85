"""RMSNorm for layer specs without Transformer Engine (Zhang and Sennrich, arXiv 1910.07467, equation 4)."""

from typing import Any

import torch


class TorchRMSNorm(torch.nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis; its weight knows of sequence parallelism.

    megatron-core's own torch norm refuses sequence parallelism; there, each tensor-parallel rank sees only its part of the
    sequence, and the mark on the weight makes its gradient summed over those ranks.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **unused: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

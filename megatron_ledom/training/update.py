"""The two halves of an optimizer step, so that a step can be judged between them.

megatron-core's `optimizer.step()` measures the gradient norm and updates at once; without loss scaling (fp32, bf16) a norm that
is NaN or infinite has then already gone into every weight. Both halves together do exactly what it does.
"""

from typing import Any

import torch
from megatron.core.optimizer import clip_grads


@torch.no_grad()
def measure_gradient(optimizer: Any) -> float:
    """Bring the reduced gradients to the main weights and return their global norm. Call on every rank."""
    optimizer.prepare_grads()
    return float(optimizer.get_grad_norm())


@torch.no_grad()
def apply_gradient(optimizer: Any, grad_norm: float) -> None:
    """Clip by the measured norm and update. Call on every rank."""
    for part in optimizer.chained_optimizers:
        parameters = [] if part.is_stub_optimizer else part.get_parameters()
        if parameters and part.config.clip_grad > 0:
            clip_grads.clip_grad_by_total_norm_fp32(
                parameters,
                part.config.clip_grad,
                grad_norm,
                part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8,
            )
    optimizer.step_with_ready_grads()

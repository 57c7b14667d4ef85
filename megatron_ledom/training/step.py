"""One optimizer step: micro-batches through megatron-core's schedule, gradients reduced, clipped, applied."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_ledom.config.derived import num_microbatches
from megatron_ledom.config.schema import RunConfig
from megatron_ledom.data.batch import Batch
from megatron_ledom.parallel.groups import ParallelGroups
from megatron_ledom.training.anomalies import Verdict
from megatron_ledom.training.update import apply_gradient, measure_gradient

LossTerms = tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one optimizer step reports."""

    lm_loss: float
    """Mean negative log-likelihood of the tokens the mask keeps, in nats."""
    grad_norm: float
    """Global gradient norm before clipping."""
    verdict: Verdict
    """Whether the update was made, and why not."""


def masked_loss(loss_mask: torch.Tensor, z_loss_coeff: float, output: torch.Tensor) -> LossTerms:
    """Sum over kept tokens to differentiate, their number, and what is reported. output and loss_mask: [b, s], fp32.

    With a z-loss (Chowdhery et al. 2022, arXiv 2204.02311, section 5) the output is [b, s, 2], losses and log Z, and
    z_loss_coeff * (log Z)^2 is added to each loss; the reported lm_loss is without it.
    """
    losses = output[..., 0] if z_loss_coeff else output
    kept, count = (losses * loss_mask).sum(), loss_mask.sum()
    report = {"lm_loss": torch.stack([kept.detach(), count])}
    if z_loss_coeff:
        kept = kept + z_loss_coeff * (output[..., 1].square() * loss_mask).sum()
    return kept, count.to(torch.int), report


def forward_step(
    z_loss_coeff: float, batches: Iterator[Batch], model: Any
) -> tuple[torch.Tensor, Callable[[torch.Tensor], LossTerms]]:
    """What megatron-core's schedules call for each micro-batch: the model's output and the loss to take of it."""
    batch = next(batches)
    output = model(batch["tokens"], batch["position_ids"], batch.get("attention_mask"), labels=batch["labels"])
    return output, partial(masked_loss, batch["loss_mask"], z_loss_coeff)


def run_schedule(
    config: RunConfig, model: list[Any], batches: list[Iterator[Batch]], groups: ParallelGroups, *, forward_only: bool
) -> tuple[float, float]:
    """One global batch through the pipeline. Returns the loss sum and token count of all ranks, on every rank."""
    schedule = get_forward_backward_func(groups.pipeline.size(), groups.virtual_stages if groups.virtual_stages > 1 else None)
    reports = schedule(
        forward_step_func=partial(forward_step, config.train.z_loss_coeff),
        data_iterator=batches if len(batches) > 1 else batches[0],
        model=model if len(model) > 1 else model[0],
        num_microbatches=num_microbatches(config, dist.get_world_size()),
        seq_length=config.data.seq_length,
        micro_batch_size=config.train.micro_batch_size,
        forward_only=forward_only,
    )
    device = next(model[0].parameters()).device
    total = torch.zeros(2, dtype=torch.float64, device=device)
    for report in reports:  # empty except on the last pipeline stage
        total += report["lm_loss"]
    dist.all_reduce(total, group=groups.data_and_context)
    dist.all_reduce(total, group=groups.pipeline)
    return float(total[0]), float(total[1])


def train_step(
    config: RunConfig,
    model: list[Any],
    optimizer: Any,
    batches: list[Iterator[Batch]],
    groups: ParallelGroups,
    judge: Callable[[float, float], Verdict],
) -> StepResult:
    """One optimizer step over one global batch, unless `judge`, given loss and gradient norm, says that it shall not be made."""
    for chunk in model:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    loss_sum, num_tokens = run_schedule(config, model, batches, groups, forward_only=False)
    lm_loss = loss_sum / max(num_tokens, 1.0)
    grad_norm = measure_gradient(optimizer)
    verdict = judge(lm_loss, grad_norm)
    if verdict.updates:
        apply_gradient(optimizer, grad_norm)
    return StepResult(lm_loss, grad_norm, verdict)

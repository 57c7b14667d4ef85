"""The training loop: step, log, validate, save, until the run is done or told to stop.

The two halves of an optimizer step, so that a step can be judged between them.

megatron-core's `optimizer.step()` measures the gradient norm and updates at once; without loss scaling (fp32, bf16) a norm that
is NaN or infinite has then already gone into every weight. Both halves together do exactly what it does.

One optimizer step: micro-batches through megatron-core's schedule, gradients reduced, clipped, applied.

One iteration of a run, as training and `tools/replay_step.py` do it: the same samples, random states and decisions.
"""

from collections.abc import Callable, Iterator, Set
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import clip_grads
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_ledom.config.derived import num_microbatches
from megatron_ledom.config.schema import RunConfig
from megatron_ledom.data.dataset.batch import Batch, batch_iterators
from megatron_ledom.parallel.groups import ParallelGroups, seed_iteration
from megatron_ledom.training.recovery import Recovery
from megatron_ledom.training.resilience import StopRequest
from megatron_ledom.training.state import TrainState, save_checkpoint
from megatron_ledom.training.step_policy import StepPolicy, StepResult, Verdict
from megatron_ledom.training.watchdog import Watchdog


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


LossTerms = tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]


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


Batches = list[Iterator[Batch]]


def open_batches(state: TrainState) -> Batches:
    """The micro-batches from the state's position to the end of the run, an iterator for each model chunk of this rank."""
    first, last = state.consumed_train_samples, len(state.train_dataset)
    device, eod_id = state.platform.device, state.provenance.eod_id
    return batch_iterators(state.config, state.train_dataset, first, last, state.groups, device, eod_id)


def run_iteration(state: TrainState, batches: Batches, policy: StepPolicy, left_out: Set[int]) -> StepResult | None:
    """Do the next iteration and count it if the policy lets it count; None for one of `left_out`, which computes nothing."""
    if state.iteration + 1 in left_out:
        _consume(state, batches)
        state.advance()
        return None
    result = compute_step(state, batches, partial(policy.judge, state.iteration + 1))
    if result.verdict.goes_on:
        state.advance()
    return result


def compute_step(state: TrainState, batches: Batches, judge: Callable[[float, float], Verdict]) -> StepResult:
    """Loss, gradient and, if `judge` lets it, the update of the next iteration, without counting it."""
    seed_iteration(state.config.train.seed, state.iteration, state.groups)
    return train_step(state.config, state.model, state.optimizer, batches, state.groups, judge)


def _consume(state: TrainState, batches: Batches) -> None:
    """Pass over the micro-batches of one iteration."""
    for iterator in batches:
        for _ in range(num_microbatches(state.config, dist.get_world_size())):
            next(iterator)


def train(state: TrainState, stop: StopRequest, watchdog: Watchdog, evaluate_tasks: Any = None) -> None:
    """Train from the state's iteration to the end of the run, or to a stop; whatever was done is saved.

    evaluate_tasks: what every `train.task_interval` iterations gives figures for the metrics, called on every rank.
    """
    from megatron_ledom.callbacks.reporting import Reporter

    config = state.config
    recovery = Recovery.of_run(state, watchdog)
    reporter = Reporter(state, recovery.history, watchdog, evaluate_tasks)
    batches = reporter.open_batches()
    while state.iteration < config.train.train_iters:
        reporter.begin_step()
        result = run_iteration(state, batches, recovery.policy, recovery.history.left_out)
        if not recovery.accept(result):  # back at the last checkpoint
            reporter.take_position()
            batches = reporter.open_batches()
            continue
        reporter.end_step(result)
        stopping = stop.agreed(state.platform.device, state.store.seconds_to_finish()) or _is_multiple(
            state.iteration, config.train.exit_interval
        )
        if (
            stopping
            or state.iteration == config.train.train_iters
            or _is_multiple(state.iteration, config.checkpoint.save_interval)
        ):
            with reporter.apart("saving"):
                recovery.history.sync()
                save_checkpoint(state)
        reporter.report(result)  # behind the save: it is written while validation runs, and counts when that is recorded
        watchdog.tell("looking after the pending checkpoint", patient=True)  # which rank 0 may be finishing
        state.store.poll()
        if stopping:
            break
    with reporter.apart("finishing the last checkpoint"):
        state.store.finish()
    recovery.history.close()
    reporter.close()


def _is_multiple(iteration: int, interval: int | None) -> bool:
    return interval is not None and iteration % interval == 0

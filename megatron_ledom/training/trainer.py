"""The training loop, and the functions it calls: the iteration, the step, its schedule, loss and update."""

from collections.abc import Callable, Iterator, Sequence, Set
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
from megatron_ledom.reverse_teacher import ReverseTeacher
from megatron_ledom.training.callback import Callback, CallbackList
from megatron_ledom.training.recovery import Recovery
from megatron_ledom.training.resilience import StopRequest
from megatron_ledom.training.state import TrainState, save_checkpoint
from megatron_ledom.training.step_policy import StepPolicy, StepResult, Verdict

Batches = list[Iterator[Batch]]
"""Micro-batches: one iterator for each model chunk of this rank."""
Judge = Callable[[float, float], Verdict]
"""Function that decides on a step, given its loss and gradient norm."""
LossTerms = tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]


def train(state: TrainState, stop: StopRequest, chosen_callbacks: Sequence[Callback]) -> None:
    """Train from the state's iteration to the end of the run or a stop, and save. Call on every rank."""
    recovery = Recovery.resume(state)
    history, callbacks = recovery.history, CallbackList(chosen_callbacks, state, recovery.history)
    callbacks.call(Callback.on_train_start)
    batches = callbacks.observe(open_batches(state))
    while state.iteration < state.config.train.train_iters:
        callbacks.call(Callback.on_step_start)
        result = run_iteration(state, batches, recovery.policy, history.skip_iterations)
        recovery.record(result)
        if result is not None and not result.verdict.is_accepted:
            with callbacks.pause("recovering from a bad step"):
                recovery.roll_back(result)
            callbacks.call(Callback.on_rollback)
            batches = callbacks.observe(open_batches(state))
            continue
        callbacks.call(Callback.on_step_end, result)
        is_stopping = _agree_to_stop(state, stop)
        if is_stopping or _is_save_due(state):
            with callbacks.pause("saving"):
                history.sync()
                save_checkpoint(state)
        callbacks.record(result)  # after the save, so that validation runs while the checkpoint is written
        with callbacks.pause("checking the pending checkpoint"):  # rank 0 may have to complete it
            state.store.poll()
        if is_stopping:
            break
    with callbacks.pause("finishing the last checkpoint"):
        state.store.finish()
    history.close()
    callbacks.call(Callback.on_train_end)


def _agree_to_stop(state: TrainState, stop: StopRequest) -> bool:
    """Return True if the run must stop after this iteration: on request, or at `train.exit_interval`. The same on every rank."""
    is_requested = stop.agreed(state.platform.device, state.store.seconds_to_finish())
    return is_requested or _is_multiple(state.iteration, state.config.train.exit_interval)


def _is_save_due(state: TrainState) -> bool:
    is_last = state.iteration == state.config.train.train_iters
    return is_last or _is_multiple(state.iteration, state.config.checkpoint.save_interval)


def _is_multiple(iteration: int, interval: int | None) -> bool:
    return interval is not None and iteration % interval == 0


def open_batches(state: TrainState) -> Batches:
    """Return the micro-batches from the state's position to the end of the run."""
    first, last = state.consumed_train_samples, len(state.train_dataset)
    device, eod_id = state.platform.device, state.provenance.eod_id
    return batch_iterators(state.config, state.train_dataset, first, last, state.groups, device, eod_id)


def run_iteration(state: TrainState, batches: Batches, policy: StepPolicy, skip_iterations: Set[int]) -> StepResult | None:
    """Do the next iteration and count it if the policy accepts it. Skips it and returns None if it is in `skip_iterations`."""
    if state.iteration + 1 in skip_iterations:
        for iterator in batches:
            for _ in range(num_microbatches(state.config, dist.get_world_size(), state.next_batch_size)):
                next(iterator)
        state.advance()
        return None
    result = compute_step(state, batches, partial(policy.judge, state.iteration + 1))
    if result.verdict.is_accepted:
        state.advance()
    return result


def compute_step(state: TrainState, batches: Batches, judge: Judge) -> StepResult:
    """Do the step of the next iteration with that iteration's random state, without counting it."""
    seed_iteration(state.config.train.seed, state.iteration, state.groups)
    size = state.next_batch_size
    result = train_step(
        state.config,
        state.model,
        state.optimizer,
        batches,
        state.groups,
        judge,
        global_batch_size=size,
        teacher=state.teacher,
    )
    if state.ema is not None and result.verdict.is_applied:
        state.ema.update()
    return result


def train_step(
    config: RunConfig,
    model: list[Any],
    optimizer: Any,
    batches: Batches,
    groups: ParallelGroups,
    judge: Judge,
    *,
    global_batch_size: int,
    teacher: ReverseTeacher | None = None,
) -> StepResult:
    """Compute loss and gradient of one global batch, and update unless `judge` rejects the step. Call on every rank.

    teacher: computes the auxiliary loss of a model with an auxiliary head.
    """
    for chunk in model:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    size = global_batch_size
    loss_sum, num_tokens, *further = run_schedule(
        config, model, batches, groups, global_batch_size=size, forward_only=False, teacher=teacher
    )
    lm_loss = loss_sum / max(num_tokens, 1.0)
    grad_norm = measure_gradient(optimizer)
    verdict = judge(lm_loss, grad_norm)
    if verdict.is_applied:
        apply_gradient(optimizer, grad_norm)
    return StepResult(lm_loss, grad_norm, verdict, further[0] / max(further[1], 1.0) if further else None)


def run_schedule(
    config: RunConfig,
    model: list[Any],
    batches: Batches,
    groups: ParallelGroups,
    *,
    global_batch_size: int,
    forward_only: bool,
    teacher: ReverseTeacher | None = None,
) -> list[float]:
    """Run one global batch through megatron-core's schedule. Returns the loss sum and token count over all ranks.

    global_batch_size: samples of this batch over all ranks, which a schedule changes during a run. teacher: also return the sum of
    its loss and the number of positions that have one.
    """
    schedule = get_forward_backward_func(groups.pipeline.size(), groups.virtual_stages if groups.virtual_stages > 1 else None)
    one_step = partial(forward_step, config.train.z_loss_coeff)
    if teacher is not None:
        one_step = partial(one_step, teacher=teacher)
    reports = schedule(
        forward_step_func=one_step,
        data_iterator=batches if len(batches) > 1 else batches[0],
        model=model if len(model) > 1 else model[0],
        num_microbatches=num_microbatches(config, dist.get_world_size(), global_batch_size),
        seq_length=config.data.seq_length,
        micro_batch_size=config.train.micro_batch_size,
        forward_only=forward_only,
    )
    device = next(model[0].parameters()).device
    names = ["lm_loss"] if teacher is None else ["lm_loss", "auxiliary_loss"]
    total = torch.zeros(2 * len(names), dtype=torch.float64, device=device)
    for report in reports:  # empty except on the last pipeline stage
        total += torch.cat([report[name] for name in names])
    dist.all_reduce(total, group=groups.data_and_context)
    dist.all_reduce(total, group=groups.pipeline)
    return [float(one) for one in total]


def forward_step(
    z_loss_coeff: float, batches: Iterator[Batch], model: Any, teacher: ReverseTeacher | None = None
) -> tuple[torch.Tensor, Callable[[torch.Tensor], LossTerms]]:
    """Run the next micro-batch forward; the schedule then calls the returned loss function with the output."""
    batch = next(batches)
    known = {"labels": batch["labels"], "loss_mask": batch["loss_mask"]}  # multi-token prediction needs the mask
    output = model(batch["tokens"], batch["position_ids"], batch.get("attention_mask"), **known)
    if teacher is not None:
        return output, partial(loss_with_teacher, teacher, batch, z_loss_coeff)
    return output, partial(masked_loss, batch["loss_mask"], z_loss_coeff)


def loss_with_teacher(teacher: ReverseTeacher, batch: Batch, z_loss_coeff: float, output: torch.Tensor) -> LossTerms:
    """Return what `masked_loss` returns, with the weighted distances to the teacher's states in the sum to differentiate.

    output: the [b, s, n + W] of `ModelWithHead`. megatron-core divides the sum by the number of tokens that count in the language
    loss, so that the result does not depend on the micro-batches; positions without a state count as 0.
    """
    num_losses = 2 if z_loss_coeff else 1
    losses = output[..., :num_losses] if z_loss_coeff else output[..., 0]
    kept, count, report = masked_loss(batch["loss_mask"], z_loss_coeff, losses)
    distance, found = teacher.measure(batch, output[..., num_losses:])
    return kept + teacher.weight * distance, count, {**report, "auxiliary_loss": found}


def masked_loss(loss_mask: torch.Tensor, z_loss_coeff: float, output: torch.Tensor) -> LossTerms:
    """Return the loss sum over kept tokens to differentiate, the number of kept tokens, and the sums to report.

    output, loss_mask: [b, s], fp32. With a z-loss (Chowdhery et al. 2022, arXiv 2204.02311, section 5) the output is [b, s, 2]
    with losses and log Z, and z_loss_coeff * (log Z)^2 is added to each loss; the reported lm_loss is without it.
    """
    losses = output[..., 0] if z_loss_coeff else output
    kept, count = (losses * loss_mask).sum(), loss_mask.sum()
    report = {"lm_loss": torch.stack([kept.detach(), count])}
    if z_loss_coeff:
        kept = kept + z_loss_coeff * (output[..., 1].square() * loss_mask).sum()
    return kept, count.to(torch.int), report


@torch.no_grad()
def measure_gradient(optimizer: Any) -> float:
    """Copy the reduced gradients to the main weights and return their global norm. Call on every rank.

    megatron-core's `optimizer.step()` measures and updates in one call: without loss scaling (fp32, bf16), a gradient that is
    not finite would reach every weight before it can be judged. `measure_gradient` and `apply_gradient` split it in two.
    """
    optimizer.prepare_grads()
    return float(optimizer.get_grad_norm())


@torch.no_grad()
def apply_gradient(optimizer: Any, grad_norm: float) -> None:
    """Clip the gradients by the measured norm and update the weights. Call on every rank."""
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

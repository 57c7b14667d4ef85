"""One iteration of a run, as training and `tools/replay_step.py` do it: the same samples, random states and decisions."""

from collections.abc import Callable, Iterator, Set
from functools import partial

import torch.distributed as dist

from megatron_ledom.config.derived import num_microbatches
from megatron_ledom.data.batch import Batch, batch_iterators
from megatron_ledom.parallel.seeds import seed_iteration
from megatron_ledom.training.anomalies import StepPolicy, Verdict
from megatron_ledom.training.state import TrainState
from megatron_ledom.training.step import StepResult, train_step

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

"""The training loop: step, log, validate, save, until the run is done or told to stop."""

import logging
import time
from typing import Any

import torch.distributed as dist
from tqdm import tqdm

from megatron_ledom.config.derived import tokens_per_iteration
from megatron_ledom.data.batch import batch_iterators
from megatron_ledom.errors import StoppedError
from megatron_ledom.parallel.seeds import seed_iteration
from megatron_ledom.training.metrics import MetricsWriter, Throughput
from megatron_ledom.training.resilience import StopRequest
from megatron_ledom.training.state import TrainState, save_checkpoint
from megatron_ledom.training.step import StepResult, train_step
from megatron_ledom.training.validate import evaluate, validate

log = logging.getLogger(__name__)


def train(state: TrainState, stop: StopRequest) -> None:
    """Train from the state's iteration to the end of the run, or to a stop; whatever was done is saved."""
    config, groups = state.config, state.groups
    batches = batch_iterators(
        config,
        state.train_dataset,
        state.consumed_train_samples,
        len(state.train_dataset),
        groups,
        state.platform.device,
        state.provenance.eod_id,
    )
    throughput = Throughput(config, state.provenance.vocab_size, state.platform, dist.get_world_size())
    metrics = MetricsWriter(config, state.iteration)
    bar = _progress_bar(state)
    while state.iteration < config.train.train_iters:
        seed_iteration(config.train.seed, state.iteration, groups)
        try:
            result = train_step(config, state.model, state.optimizer, state.scheduler, batches, groups)
        except StoppedError:  # on every rank: what is being written is good
            state.store.finish()
            raise
        state.advance()
        throughput.count(tokens_per_iteration(config))
        bar.update()
        stopping = stop.agreed(state.platform.device) or _is_multiple(state.iteration, config.train.exit_interval)
        _report(state, result, throughput, metrics, bar)
        state.store.poll()
        if (
            stopping
            or state.iteration == config.train.train_iters
            or _is_multiple(state.iteration, config.checkpoint.save_interval)
        ):
            before = time.perf_counter()
            save_checkpoint(state)
            throughput.pause(time.perf_counter() - before)
        if stopping:
            break
    state.store.finish()
    bar.close()
    metrics.close()


def _report(state: TrainState, result: StepResult, throughput: Throughput, metrics: MetricsWriter, bar: "tqdm[Any]") -> None:
    """Validate and write a record where this iteration asks for it."""
    train, iteration = state.config.train, state.iteration
    last = iteration == train.train_iters
    validating = bool(state.valid_datasets) and (last or _is_multiple(iteration, train.eval_interval))
    if not (validating or last or _is_multiple(iteration, state.config.logging.log_interval)):
        return
    record = {
        "iteration": iteration,
        "lm_loss": result.lm_loss,
        "grad_norm": result.grad_norm,
        "lr": state.optimizer.param_groups[0]["lr"],
        "consumed_train_samples": state.consumed_train_samples,
        "consumed_train_tokens": state.consumed_train_tokens,
        **throughput.read(),
    }
    if validating:
        before = time.perf_counter()
        record["validation"] = validate(state)
        throughput.pause(time.perf_counter() - before)
    if last and state.test_datasets:
        record["test"] = evaluate(state, state.test_datasets)
    metrics.write(record)
    bar.set_postfix(loss=f"{result.lm_loss:.3f}", tokens_per_second=f"{record['tokens_per_second']:,.0f}")
    log.info(
        "iteration %d/%d  loss %.4f  grad norm %.3f  lr %.3g  %s tokens/s  MFU %.1f%%%s",
        iteration,
        train.train_iters,
        result.lm_loss,
        result.grad_norm,
        record["lr"],
        f"{record['tokens_per_second']:,.0f}",
        100 * record["mfu"],
        "".join(
            f"  {p}: loss {v['lm_loss']:.4f}, {v['bits_per_byte']:.3f} bits/byte"
            for p, v in {**record.get("validation", {}), **record.get("test", {})}.items()
        ),
    )


def _progress_bar(state: TrainState) -> "tqdm[Any]":
    hidden = True if dist.get_rank() != 0 else None  # None: only on a terminal
    total = state.config.train.train_iters
    name = f"train {state.config.data.direction}"
    return tqdm(total=total, initial=state.iteration, desc=name, unit="step", disable=hidden)


def _is_multiple(iteration: int, interval: int | None) -> bool:
    return interval is not None and iteration % interval == 0

"""What the loop reports: a record and a line of the log every interval, validation, the progress bar, the profile."""

import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from tqdm import tqdm

from megatron_ledom.callbacks.metrics import MetricsWriter, Throughput
from megatron_ledom.callbacks.profiling import ProfilerWindow
from megatron_ledom.callbacks.timing import RankTimes
from megatron_ledom.callbacks.validation import evaluate, validate
from megatron_ledom.config.derived import tokens_per_iteration
from megatron_ledom.errors import NotFiniteError
from megatron_ledom.storage.records import Record, plain
from megatron_ledom.training.history import RunHistory
from megatron_ledom.training.state import TrainState
from megatron_ledom.training.step_policy import StepResult
from megatron_ledom.training.trainer import Batches, open_batches
from megatron_ledom.training.watchdog import Watchdog

log = logging.getLogger(__name__)

TaskEvaluation = Callable[[], dict[str, dict[str, float]]]
"""Figures by task, among them `accuracy`."""
STRAGGLES = 1.1
"""A rank is named in the log when its step takes that many times the mean."""


class Reporter:
    """Everything the loop tells the outside. The same calls on every rank; rank 0 writes."""

    def __init__(
        self, state: TrainState, history: RunHistory, watchdog: Watchdog, evaluate_tasks: TaskEvaluation | None
    ) -> None:
        self.state, self.history, self.watchdog = state, history, watchdog
        self.throughput = Throughput(state.config, state.provenance.vocab_size, state.platform, dist.get_world_size())
        self.times = RankTimes(state.platform, state.model[0].config, watchdog)
        self.profiler = ProfilerWindow(state.config)
        watchdog.watch_model(state.model)
        self.evaluate_tasks = evaluate_tasks
        self.metrics, self.bar = MetricsWriter(state.config, state.iteration), _progress_bar(state)

    def take_position(self) -> None:
        """Go on behind a checkpoint that was returned to: what came after it is not reported twice."""
        self.close()
        self.metrics = MetricsWriter(self.state.config, self.state.iteration, self.metrics.lost())
        self.bar = _progress_bar(self.state)
        self.throughput.read()

    def open_batches(self) -> Batches:
        """The micro-batches from here on; the wait for them is measured."""
        return self.times.timed(open_batches(self.state))

    def begin_step(self) -> None:
        """The next iteration begins."""
        self.watchdog.tell("a step", self.state.iteration + 1)
        self.profiler.before(self.state.iteration + 1)
        self.times.begin_step()

    def end_step(self, result: StepResult | None) -> None:
        """An iteration counts as done; None when it was left out."""
        if self.profiler.ends_with(self.state.iteration):
            with self.apart("writing the profile"):
                self.profiler.close(self.state.iteration)
        self.throughput.count(0 if result is None else tokens_per_iteration(self.state.config))
        self.bar.update()

    @contextmanager
    def apart(self, doing: str) -> Iterator[None]:
        """Inside, time is no training, and may be long."""
        self.watchdog.tell(doing, self.state.iteration, patient=True)
        before = time.perf_counter()
        yield
        self.throughput.pause(time.perf_counter() - before)
        self.watchdog.tell("training", self.state.iteration)

    def report(self, result: StepResult | None) -> None:
        """Validate and write a record where this iteration asks for it; of one that was left out there is nothing to record."""
        state, train = self.state, self.state.config.train
        last = state.iteration == train.train_iters
        validating = bool(state.valid_datasets) and (last or state.iteration % train.eval_interval == 0)
        asking = self.evaluate_tasks is not None and (last or state.iteration % train.task_interval == 0)
        if not (validating or asking or last or state.iteration % state.config.logging.log_interval == 0):
            return
        record = self._record(result)
        if validating:
            with self.apart("validating"):
                _add_finite(record, "validation", validate(state))
        if asking and self.evaluate_tasks is not None:
            with self.apart("evaluating tasks"):
                _add_tasks(record, self.evaluate_tasks)
        if last and state.test_datasets:
            with self.apart("testing"):
                _add_finite(record, "test", evaluate(state, state.test_datasets))
        if result is not None or len(record.keys() & {"validation", "test", "tasks"}):
            self.metrics.write(record)
            _log_line(record, train.train_iters, self.metrics.lost() | self.history.lost())
            if result is not None:
                shown = f"{record['tokens_per_second']:,.0f}"
                self.bar.set_postfix(loss=f"{result.lm_loss:.3f}", tokens_per_second=shown)

    def close(self) -> None:
        """Write and close everything, which may take long: a trace, what Weights & Biases has still to send."""
        self.watchdog.tell("closing the reports", patient=True)
        self.profiler.close(self.state.iteration)
        self.bar.close()
        self.metrics.close()

    def _record(self, result: StepResult | None) -> Record:
        state = self.state
        speed = self.throughput.read()
        remaining = state.config.train.train_iters - state.iteration
        return {
            "iteration": state.iteration,
            "lm_loss": None if result is None else _finite(result.lm_loss),
            "grad_norm": None if result is None else _finite(result.grad_norm),
            "lr": state.optimizer.param_groups[0]["lr"],
            "consumed_train_samples": state.consumed_train_samples,
            "consumed_train_tokens": state.consumed_train_tokens,
            **speed,
            "eta_seconds": remaining * speed["seconds_per_iteration"],
            **self.times.read(),
            "skipped_iterations": self.history.num_skipped(state.iteration),
        }


def _add_finite(record: Record, kind: str, found: dict[str, dict[str, float]]) -> None:
    """Add the results of each set; those that hold NaN or infinity are no results: they are named in the log and under "not_finite"."""
    is_finite = {name: all(map(math.isfinite, values.values())) for name, values in found.items()}
    record[kind] = {name: values for name, values in found.items() if is_finite[name]}
    for name in [name for name in found if not is_finite[name]]:
        record.setdefault("not_finite", []).append(f"{kind}/{name}")
        log.warning(
            "iteration %d: %s of %s is not finite and is not recorded: %s", record["iteration"], kind, name, found[name]
        )


def _add_tasks(record: Record, evaluate_tasks: TaskEvaluation) -> None:
    """Add the results of the tasks; a model whose scores are not finite gets none, which is said. The same on every rank."""
    try:
        _add_finite(record, "tasks", evaluate_tasks())
    except NotFiniteError as error:
        record.setdefault("not_finite", []).append("tasks")
        log.warning("iteration %d: the tasks have no result: %s", record["iteration"], error)


def _finite(value: float) -> float | None:
    return value if isinstance(plain(value), float) else None


def _log_line(record: Record, train_iters: int, lost: dict[str, int]) -> None:
    parts = [f"iteration {record['iteration']}/{train_iters}"]
    for name, key, form in (("loss", "lm_loss", ".4f"), ("grad norm", "grad_norm", ".3f"), ("lr", "lr", ".3g")):
        parts.append(f"{name} {'not finite' if record[key] is None else format(record[key], form)}")
    parts.append(f"{record['tokens_per_second']:,.0f} tokens/s")
    parts.append(f"MFU {100 * record['mfu']:.1f}%")
    parts.append(f"memory {record['memory_gib']:.2f} GiB")
    parts.append(f"data wait {100 * record['data_wait_seconds'] / record['seconds_per_iteration']:.1f}%")
    if record["rank_seconds_max"] > STRAGGLES * record["rank_seconds_mean"]:
        above = record["rank_seconds_max"] / record["rank_seconds_mean"] - 1
        parts.append(f"rank {record['slowest_rank']} slower by {100 * above:.0f}%")
    if record["skipped_iterations"]:
        parts.append(f"skipped {record['skipped_iterations']}")
    parts.append(f"ETA {timedelta(seconds=round(record['eta_seconds']))}")
    parts += [
        f"{name}: loss {found['lm_loss']:.4f}, {found['bits_per_byte']:.3f} bits/byte"
        for name, found in {**record.get("validation", {}), **record.get("test", {})}.items()
    ]
    parts += [f"{name}: accuracy {100 * found['accuracy']:.1f}%" for name, found in record.get("tasks", {}).items()]
    parts += [f"not written: {number} records of {os.path.basename(where)}" for where, number in lost.items()]
    log.info("%s", "  ".join(parts))


def _progress_bar(state: TrainState) -> "tqdm[Any]":
    hidden = True if dist.get_rank() != 0 else None  # None: only on a terminal
    total = state.config.train.train_iters
    name = f"train {state.config.data.direction}"
    return tqdm(total=total, initial=state.iteration, desc=name, unit="step", disable=hidden)

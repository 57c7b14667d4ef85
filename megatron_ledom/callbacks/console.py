"""Write a log line for each record, and show a progress bar on a terminal."""

import logging
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from tqdm import tqdm

from megatron_ledom.callbacks.metrics import Metrics
from megatron_ledom.storage.records import Record
from megatron_ledom.training.callback import Callback, TrainingRun
from megatron_ledom.training.step_policy import StepResult

log = logging.getLogger(__name__)

STRAGGLES = 1.1
"""The log names the slowest rank if its step takes at least this many times the mean."""
FORMATS = {"lm_loss": "loss {:.4f}", "bits_per_byte": "{:.3f} bits/byte", "accuracy": "accuracy {:.1%}"}
"""Metrics of an evaluation that the log shows; without any of them it shows all."""


class Console(Callback):
    """Logs each record, with the number of records that could not be written, and moves the progress bar."""

    def __init__(self, metrics: Metrics) -> None:
        self.metrics = metrics

    def on_train_start(self, run: TrainingRun) -> None:
        """Draw the bar on rank 0, from the iteration at which training starts."""
        hidden = True if dist.get_rank() != 0 else None  # None: only on a terminal
        total, name = run.state.config.train.train_iters, f"train {run.state.config.data.direction}"
        self.bar: tqdm[Any] = tqdm(total=total, initial=run.state.iteration, desc=name, unit="step", disable=hidden)

    def on_step_end(self, run: TrainingRun, result: StepResult | None) -> None:
        """Move the bar."""
        self.bar.update()

    def on_record(self, run: TrainingRun, record: Record) -> None:
        """Log the record, and show its loss and speed in the bar."""
        lost = self.metrics.writer.lost() | run.history.lost()
        text = describe(record, run.state.config.train.train_iters, lost, is_skipped=run.is_skipped_iteration())
        log.info("%s", text)
        if record["lm_loss"] is not None:
            self.bar.set_postfix(loss=f"{record['lm_loss']:.3f}", tokens_per_second=f"{record['tokens_per_second']:,.0f}")

    def on_rollback(self, run: TrainingRun) -> None:
        """Draw the bar again at the checkpoint."""
        self.bar.close()
        self.on_train_start(run)

    def on_train_end(self, run: TrainingRun) -> None:
        """Close the bar."""
        self.bar.close()


def describe(record: Record, train_iters: int, lost: dict[str, int], *, is_skipped: bool) -> str:
    """Return the log line of a record. lost: number of records that could not be written, by file.

    is_skipped: the iteration was not computed, so it has neither loss nor gradient norm.
    """
    parts = [f"iteration {record['iteration']}/{train_iters}"]
    absent = "none (skipped)" if is_skipped else "not finite"
    for name, key, form in (("loss", "lm_loss", ".4f"), ("grad norm", "grad_norm", ".3f"), ("lr", "lr", ".3g")):
        parts.append(f"{name} {absent if record[key] is None else format(record[key], form)}")
    if record.get("auxiliary_loss") is not None:
        parts.append(f"auxiliary loss {record['auxiliary_loss']:.4f}")
    parts += [f"batch {record['global_batch_size']:,}"] if "global_batch_size" in record else []
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
    for kind, found in record.items():
        parts += _evaluations(kind, found) if isinstance(found, dict) else []
    parts += [f"not written: {number} records of {os.path.basename(where)}" for where, number in lost.items()]
    return "  ".join(parts)


def _evaluations(name: str, found: Record) -> Iterator[str]:
    """Yield a part of the log line for each dict of numbers, at any depth, named by its key."""
    for inner, value in found.items():
        if isinstance(value, dict):
            yield from _evaluations(inner, value)
    numbers = {key: value for key, value in found.items() if isinstance(value, int | float)}
    metrics = [form.format(numbers[key]) for key, form in FORMATS.items() if key in numbers]
    metrics = metrics or [f"{key} {value:.4g}" for key, value in numbers.items()]
    if metrics:
        yield f"{name}: {', '.join(metrics)}"

"""A line of the log for each record, and a progress bar on a terminal."""

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
"""A rank is named in the log when its step takes that many times the mean."""
FORMATS = {"lm_loss": "loss {:.4f}", "bits_per_byte": "{:.3f} bits/byte", "accuracy": "accuracy {:.1%}"}
"""Figures of an evaluation that stand for it in the log; one that has none of them is logged whole."""


class Console(Callback):
    """Logs each record, with the number of those that `metrics` could not write, and moves the bar."""

    def __init__(self, metrics: Metrics) -> None:
        self.metrics = metrics

    def on_train_start(self, run: TrainingRun) -> None:
        """Draw the bar of rank 0, from the iteration that training starts with."""
        hidden = True if dist.get_rank() != 0 else None  # None: only on a terminal
        total, name = run.state.config.train.train_iters, f"train {run.state.config.data.direction}"
        self.bar: tqdm[Any] = tqdm(total=total, initial=run.state.iteration, desc=name, unit="step", disable=hidden)

    def on_step_end(self, run: TrainingRun, result: StepResult | None) -> None:
        """Move the bar."""
        self.bar.update()

    def on_record(self, run: TrainingRun, record: Record) -> None:
        """Log the record, and show its loss and speed in the bar."""
        lost = self.metrics.writer.lost() | run.history.lost()
        log.info("%s", describe(record, run.state.config.train.train_iters, lost))
        if record["lm_loss"] is not None:
            self.bar.set_postfix(loss=f"{record['lm_loss']:.3f}", tokens_per_second=f"{record['tokens_per_second']:,.0f}")

    def on_rollback(self, run: TrainingRun) -> None:
        """Draw the bar again at the checkpoint."""
        self.bar.close()
        self.on_train_start(run)

    def on_train_end(self, run: TrainingRun) -> None:
        """Leave the bar as it is."""
        self.bar.close()


def describe(record: Record, train_iters: int, lost: dict[str, int]) -> str:
    """Return the line of the log for a record. lost: number of records that could not be written, by file."""
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
    for kind, found in record.items():
        parts += _evaluations(kind, found) if isinstance(found, dict) else []
    parts += [f"not written: {number} records of {os.path.basename(where)}" for where, number in lost.items()]
    return "  ".join(parts)


def _evaluations(name: str, found: Record) -> Iterator[str]:
    """Return a part of the line for each dict of numbers, at any depth, named by its key."""
    for inner, value in found.items():
        if isinstance(value, dict):
            yield from _evaluations(inner, value)
    numbers = {key: value for key, value in found.items() if isinstance(value, int | float)}
    figures = [form.format(numbers[key]) for key, form in FORMATS.items() if key in numbers]
    figures = figures or [f"{key} {value:.4g}" for key, value in numbers.items()]
    if figures:
        yield f"{name}: {', '.join(figures)}"

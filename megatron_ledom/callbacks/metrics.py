"""Write the records of a run to `metrics.jsonl`, TensorBoard, Weights & Biases, MLflow and OpenTelemetry."""

import logging
import os
import threading
from functools import cache
from typing import Any

import torch.distributed as dist
from torch.utils.tensorboard import SummaryWriter

from megatron_ledom.callbacks.background_log import flatten
from megatron_ledom.callbacks.run_ids import WANDB_ID, kept_id, run_name
from megatron_ledom.callbacks.trackers import start_trackers
from megatron_ledom.config.load import published
from megatron_ledom.config.schema import RunConfig
from megatron_ledom.errors import UsageError
from megatron_ledom.storage.records import METRICS, Record
from megatron_ledom.training.callback import Callback, TrainingRun
from megatron_ledom.training.log_guard import GuardedLog, RecordLog, Sink

log = logging.getLogger(__name__)


class Metrics(Callback):
    """Writes each record, after adding the number of skipped iterations."""

    def on_train_start(self, run: TrainingRun) -> None:
        """Open the logs, without records after the iteration at which training starts."""
        self.writer = MetricsWriter(run.state.config, run.state.iteration)
        self.trackers = start_trackers(run) if dist.get_rank() == 0 else []

    def wants_record(self, run: TrainingRun) -> bool:
        """Return True at multiples of `logging.log_interval` and at the last iteration, but never for a skipped iteration."""
        is_due = run.is_last_iteration() or run.state.iteration % run.state.config.logging.log_interval == 0
        return is_due and not run.is_skipped_iteration()

    def on_measure(self, run: TrainingRun, record: Record) -> None:
        """Add the number of iterations without an update so far."""
        record["skipped_iterations"] = run.history.num_skipped(run.state.iteration)

    def on_record(self, run: TrainingRun, record: Record) -> None:
        """Write the record."""
        self.writer.write(record)
        for tracker in self.trackers:
            tracker.write(record)

    def on_rollback(self, run: TrainingRun) -> None:
        """Open the logs again after the checkpoint, so that no iteration is reported twice. Trackers cannot forget: they get both."""
        self.writer.close()
        self.writer = MetricsWriter(run.state.config, run.state.iteration, self.writer.lost())

    def on_train_end(self, run: TrainingRun) -> None:
        """Close the logs, and log how many records could not be written."""
        self.writer.close()
        for tracker in self.trackers:
            tracker.close(run.is_last_iteration())


class MetricsWriter:
    """The logs of a run, written only on rank 0, from the iteration at which training starts.

    A log that cannot be written does not end the training: its lost records are counted in `lost` and logged at the end.
    """

    def __init__(self, config: RunConfig, iteration: int, lost: dict[str, int] | None = None) -> None:
        """lost: number of records that the previous writer could not write, by log."""
        self.file: RecordLog | None = None
        self.board = self.wandb = None
        if dist.get_rank() != 0:
            return
        before = lost or {}
        path, board = os.path.join(config.run_dir, METRICS), os.path.join(config.run_dir, "tensorboard")
        self.file = RecordLog(path, iteration, before.get(path, 0))
        if config.logging.tensorboard:
            self.board = Sink(board, lambda: _start_board(board, iteration), before.get(board, 0))
        if config.logging.wandb_project is not None:
            self.wandb = Sink("Weights & Biases", lambda: _start_wandb(config), before.get("Weights & Biases", 0))

    def write(self, record: Record) -> None:
        """Write one record."""
        if self.file is None:
            return
        self.file.write(record)
        flat, iteration = flatten(record), record["iteration"]
        if self.board is not None:
            self.board.write(lambda board: _to_board(board, flat, iteration))
        if self.wandb is not None:
            self.wandb.write(lambda run: run.log(flat, step=iteration))

    def lost(self) -> dict[str, int]:
        """Return the number of records that could not be written, by log."""
        return {each.where: each.lost for each in self._logs() if each.lost}

    def close(self) -> None:
        """Flush and close all logs, and log how many records could not be written."""
        if self.file is not None:
            self.file.close()
        if self.board is not None:
            self.board.close(lambda board: board.close())
        if self.wandb is not None:
            self.wandb.close(lambda run: run.finish())
        for each in self._logs():
            each.report_lost()

    def _logs(self) -> list[GuardedLog]:
        return [each for each in (self.file, self.board, self.wandb) if each is not None]


def _to_board(board: SummaryWriter, flat: dict[str, float], iteration: int) -> None:
    """Write one record to disk at once, so that an error is counted for this record."""
    for name, value in flat.items():
        board.add_scalar(name, value, iteration)
    board.flush()


def _start_board(folder: str, iteration: int) -> SummaryWriter:
    _quiet_board_threads()
    return SummaryWriter(folder, purge_step=iteration + 1)


@cache
def _quiet_board_threads() -> None:
    """Keep tracebacks of TensorBoard's thread out of the log: the next record fails with the same error, and is counted."""
    original = threading.excepthook

    def hook(failed: threading.ExceptHookArgs) -> None:
        if not type(failed.thread).__module__.startswith("tensorboard."):
            original(failed)

    threading.excepthook = hook


def _start_wandb(config: RunConfig) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise UsageError(
            "logging.wandb_project is set but wandb is not installed: pip install 'megatron-ledom[wandb]'"
        ) from error
    return wandb.init(
        project=config.logging.wandb_project,
        id=wandb_run_id(config.run_dir),
        name=run_name(config.run_dir),
        resume="allow",
        mode=config.logging.wandb_mode,
        dir=config.run_dir,
        config=published(config),  # this is sent to another machine
    )


def wandb_run_id(run_dir: str) -> str:
    """Return the id of the run at Weights & Biases."""
    return kept_id(run_dir, WANDB_ID)

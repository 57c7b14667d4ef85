"""What a run reports: `metrics.jsonl` first, TensorBoard and Weights & Biases beside it."""

import logging
import os
import secrets
import threading
import time
from functools import cache
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.utils.tensorboard import SummaryWriter

from megatron_ledom.config.derived import padded_vocab_size
from megatron_ledom.config.load import published
from megatron_ledom.config.schema import RunConfig
from megatron_ledom.errors import UsageError
from megatron_ledom.model.arithmetic import flops_per_token, model_flops_utilisation
from megatron_ledom.model.dtypes import PARAMS_DTYPES
from megatron_ledom.platform.device import Platform, peak_flops
from megatron_ledom.storage.files import write_file
from megatron_ledom.storage.records import METRICS, Record
from megatron_ledom.training.log_guard import GuardedLog, RecordLog, Sink

log = logging.getLogger(__name__)

WANDB_ID = "wandb_run_id"
"""File in the run folder."""


class Throughput:
    """Tokens a second and the share of the machine's peak since the last reading."""

    def __init__(self, config: RunConfig, vocab_size: int, platform: Platform, world_size: int) -> None:
        if config.logging.peak_tflops is None:
            peak, source = peak_flops(platform, PARAMS_DTYPES[config.model.params_dtype])
        else:
            peak, source = config.logging.peak_tflops * 1e12, "logging.peak_tflops"
        padded = padded_vocab_size(vocab_size, config.model.make_vocab_size_divisible_by)
        self.flops_per_token = flops_per_token(config.model, config.data.seq_length, padded)
        self.peak_tflops = peak / 1e12 * world_size
        log.info("MFU is of %.3g FLOP/s a rank (%s)", peak, source)
        self.started = self.last = time.perf_counter()
        self.tokens = self.num_iterations = 0

    def count(self, tokens: int) -> None:
        """Add the tokens of one iteration, over all ranks; none of one that was left out."""
        self.tokens += tokens
        self.num_iterations += 1

    def pause(self, seconds: float) -> None:
        """Leave out time that was not training, such as a save or a validation."""
        self.last += seconds

    def read(self) -> Record:
        """tokens_per_second, seconds_per_iteration and mfu since the last reading, and seconds since the process began training."""
        now = time.perf_counter()
        rate, each = self.tokens / (now - self.last), (now - self.last) / max(self.num_iterations, 1)
        self.tokens, self.num_iterations, self.last = 0, 0, now
        return {
            "tokens_per_second": rate,
            "seconds_per_iteration": each,
            "mfu": model_flops_utilisation(rate * self.flops_per_token, self.peak_tflops),
            "elapsed_seconds": now - self.started,
        }


class MetricsWriter:
    """Writes records on rank 0 and nowhere else; after a resume it goes on behind the resumed iteration.

    None of its logs ends a training: what one could not take is counted in `lost`, and said at the end.
    """

    def __init__(self, config: RunConfig, iteration: int, lost: dict[str, int] | None = None) -> None:
        """lost: records that the writer before this one could not write."""
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
        """One logged iteration, with its validation if there was one."""
        if self.file is None:
            return
        self.file.write(record)
        flat, iteration = _flatten(record), record["iteration"]
        if self.board is not None:
            self.board.write(lambda board: _to_board(board, flat, iteration))
        if self.wandb is not None:
            self.wandb.write(lambda run: run.log(flat, step=iteration))

    def lost(self) -> dict[str, int]:
        """Records that could not be written, by the log they are missing from."""
        return {each.where: each.lost for each in self._logs() if each.lost}

    def close(self) -> None:
        """Flush and close everything, and say what could not be written."""
        if self.file is not None:
            self.file.close()
        if self.board is not None:
            self.board.close(lambda board: board.close())
        if self.wandb is not None:
            self.wandb.close(lambda run: run.finish())
        for each in self._logs():
            each.say_lost()

    def _logs(self) -> list[GuardedLog]:
        return [each for each in (self.file, self.board, self.wandb) if each is not None]


def _to_board(board: SummaryWriter, flat: dict[str, float], iteration: int) -> None:
    """One record, written when this returns: an error is one of this record."""
    for name, value in flat.items():
        board.add_scalar(name, value, iteration)
    board.flush()


def _start_board(folder: str, iteration: int) -> SummaryWriter:
    _quiet_board_threads()
    return SummaryWriter(folder, purge_step=iteration + 1)


@cache
def _quiet_board_threads() -> None:
    """TensorBoard's thread prints no traceback when it fails: the next record meets the same error, and is counted."""
    original = threading.excepthook

    def hook(failed: threading.ExceptHookArgs) -> None:
        if not type(failed.thread).__module__.startswith("tensorboard."):
            original(failed)

    threading.excepthook = hook


def _flatten(record: Record) -> dict[str, float]:
    flat = {name: value for name, value in record.items() if isinstance(value, int | float)}
    for kind in ("validation", "test", "tasks"):
        for prefix, result in record.get(kind, {}).items():
            flat.update({f"{kind}/{prefix}/{name}": value for name, value in result.items()})
    return flat


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
        name=os.path.basename(os.path.abspath(config.run_dir)),
        resume="allow",
        mode=config.logging.wandb_mode,
        dir=config.run_dir,
        config=published(config),  # leaves the machine
    )


def wandb_run_id(run_dir: str) -> str:
    """What Weights & Biases knows the run by: made once and kept in the run folder, whose name may not be the only one of its kind."""
    path = Path(run_dir, WANDB_ID)
    if not path.exists() or not path.read_text().strip():
        write_file(path, secrets.token_hex(8) + "\n")
    return path.read_text().strip()

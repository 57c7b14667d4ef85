"""What a run reports: `metrics.jsonl` first, TensorBoard and Weights & Biases beside it."""

import json
import logging
import os
import secrets
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.utils.tensorboard import SummaryWriter

from megatron_ledom.config.derived import padded_vocab_size
from megatron_ledom.config.published import published
from megatron_ledom.config.schema import RunConfig
from megatron_ledom.errors import UsageError
from megatron_ledom.model.arithmetic import flops_per_token, model_flops_utilisation
from megatron_ledom.model.dtypes import PARAMS_DTYPES
from megatron_ledom.platform.device import Platform, peak_flops
from megatron_ledom.training.history import drop_after

log = logging.getLogger(__name__)

Record = dict[str, Any]

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
    """Writes records on rank 0 and nowhere else; after a resume it goes on behind the resumed iteration."""

    def __init__(self, config: RunConfig, iteration: int) -> None:
        self.file = self.board = self.wandb = None
        if dist.get_rank() != 0:
            return
        path = os.path.join(config.run_dir, "metrics.jsonl")
        drop_after(path, iteration)
        self.file = open(path, "a", encoding="utf-8")  # noqa: SIM115  closed in close()
        if config.logging.tensorboard:
            self.board = SummaryWriter(os.path.join(config.run_dir, "tensorboard"), purge_step=iteration + 1)
        if config.logging.wandb_project is not None:
            self.wandb = _start_wandb(config)

    def write(self, record: Record) -> None:
        """One logged iteration, with its validation if there was one."""
        if self.file is None:
            return
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()
        flat = _flatten(record)
        if self.board is not None:
            for name, value in flat.items():
                self.board.add_scalar(name, value, record["iteration"])
        if self.wandb is not None:
            self.wandb.log(flat, step=record["iteration"])

    def close(self) -> None:
        """Flush and close everything."""
        if self.file is not None:
            self.file.close()
        if self.board is not None:
            self.board.close()
        if self.wandb is not None:
            self.wandb.finish()


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
        path.write_text(secrets.token_hex(8) + "\n")
    return path.read_text().strip()

"""Measure throughput, the step time of each rank, the wait for data, and memory.

The step time of a rank lasts from the start of a step to the end of its last backward pass. It excludes the reduction of
gradients over the data-parallel replicas, in which every rank waits for the slowest. Ranks of one tensor-, context- or
pipeline-parallel group wait for each other within a step: such a group is slow as a whole, and any of its ranks may be the one
that is named.
"""

import logging
import resource
import time
from typing import Any

import torch
import torch.distributed as dist

from megatron_ledom.config.batch_schedule import batch_phases, has_batch_schedule
from megatron_ledom.config.derived import padded_vocab_size
from megatron_ledom.model.arithmetic import flops_per_token, model_flops_utilisation
from megatron_ledom.model.dtypes import PARAMS_DTYPES
from megatron_ledom.platform.device import Platform, peak_flops
from megatron_ledom.storage.records import Record
from megatron_ledom.training.callback import Callback, TrainingRun
from megatron_ledom.training.state import TrainState
from megatron_ledom.training.step_policy import StepResult

log = logging.getLogger(__name__)


class Throughput(Callback):
    """Tokens per second and MFU (fraction of the peak FLOP/s) since the last record, without pauses."""

    def on_train_start(self, run: TrainingRun) -> None:
        """Start the clock."""
        self.start(run.state, dist.get_world_size())

    def start(self, state: TrainState, world_size: int) -> None:
        """Start the clock of a run on `world_size` ranks."""
        config = state.config
        if config.logging.peak_tflops is None:
            peak, source = peak_flops(state.platform, PARAMS_DTYPES[config.model.params_dtype])
        else:
            peak, source = config.logging.peak_tflops * 1e12, "logging.peak_tflops"
        padded = padded_vocab_size(state.provenance.vocab_size, config.model.make_vocab_size_divisible_by)
        self.flops_per_token = flops_per_token(config.model, config.data.seq_length, padded)
        self.peak_tflops = peak / 1e12 * world_size
        log.info("the MFU is relative to %.3g FLOP/s per rank (%s)", peak, source)
        self.started = self.last = time.perf_counter()
        self.tokens = self.samples = self.num_iterations = 0

    def on_step_end(self, run: TrainingRun, result: StepResult | None) -> None:
        """Count the tokens of the iteration over all ranks; a skipped iteration has none."""
        self.tokens += 0 if result is None else run.state.last_batch_size * run.state.config.data.seq_length
        self.samples += run.state.last_batch_size
        self.num_iterations += 1

    def on_pause_end(self, run: TrainingRun, seconds: float) -> None:
        """Exclude the pause."""
        self.last += seconds

    def on_measure(self, run: TrainingRun, record: Record) -> None:
        """Add the speed since the last record, the seconds since the start of training, and those to the end of the run."""
        now = time.perf_counter()
        rate, each = self.tokens / (now - self.last), (now - self.last) / max(self.num_iterations, 1)
        left = _iterations_left(run.state, self.samples / max(self.num_iterations, 1))
        self._reset(now)
        record["tokens_per_second"] = rate
        record["seconds_per_iteration"] = each
        record["mfu"] = model_flops_utilisation(rate * self.flops_per_token, self.peak_tflops)
        record["elapsed_seconds"] = now - self.started
        record["eta_seconds"] = left * each

    def on_rollback(self, run: TrainingRun) -> None:
        """Forget the iterations since the last record."""
        self._reset(time.perf_counter())

    def _reset(self, now: float) -> None:
        self.tokens, self.samples, self.num_iterations, self.last = 0, 0, 0, now


def _iterations_left(state: TrainState, mean_batch: float) -> float:
    """Return the iterations to the end of the run; if the batch size changes, as many as there would be of `mean_batch` samples."""
    if not has_batch_schedule(state.config) or not mean_batch:
        return state.config.train.train_iters - state.iteration
    phases = batch_phases(state.config, iteration=state.iteration, consumed_samples=state.consumed_train_samples)
    return sum(phase.num_samples for phase in phases) / mean_batch


class RankTimes(Callback):
    """Step time, wait for data and memory since the last record, compared over all ranks."""

    def __init__(self, platform: Platform) -> None:
        self.platform = platform
        self.data_wait = 0.0
        self._step_start: Any = None
        self._spans: list[tuple[Any, Any]] = []

    def on_train_start(self, run: TrainingRun) -> None:
        """Wrap the function that megatron-core's schedules call after the last backward pass, to note the time."""
        core_config = run.state.model[0].config
        finalize = core_config.finalize_model_grads_func

        def _finalize(*args: Any, **kwargs: Any) -> Any:
            self._spans.append((self._step_start, self._timestamp()))
            return finalize(*args, **kwargs)

        core_config.finalize_model_grads_func = _finalize

    def on_step_start(self, run: TrainingRun) -> None:
        """Note the start of the step."""
        self._step_start = self._timestamp()

    def on_batch(self, run: TrainingRun, seconds: float) -> None:
        """Count the wait for the micro-batch."""
        self.data_wait += seconds

    def on_measure(self, run: TrainingRun, record: Record) -> None:
        """Add the times and the memory since the last record."""
        record.update(self.read())

    def read(self) -> Record:
        """Return the means per step since the last call, over all ranks, and the peak memory. Call on every rank."""
        steps = max(len(self._spans), 1)
        mine = torch.tensor([self._seconds() / steps, self.data_wait / steps, self._memory_gib()], dtype=torch.float64)
        mine = mine.to(self.platform.device)
        all_ranks = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(all_ranks, mine)
        seconds, waits, memory = torch.stack(all_ranks).cpu().T
        self.data_wait = 0.0
        self._spans.clear()
        return {
            "rank_seconds_min": float(seconds.min()),
            "rank_seconds_mean": float(seconds.mean()),
            "rank_seconds_max": float(seconds.max()),
            "slowest_rank": int(seconds.argmax()),
            "data_wait_seconds": float(waits.max()),
            "memory_gib": float(memory.max()),
        }

    def _timestamp(self) -> Any:
        """Return the time; on a GPU an event in its stream, because the process runs ahead of the device."""
        if self.platform.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _seconds(self) -> float:
        self.platform.synchronize()
        if self.platform.device.type != "cuda":
            return float(sum(end - start for start, end in self._spans))
        return float(sum(start.elapsed_time(end) for start, end in self._spans)) / 1e3

    def _memory_gib(self) -> float:
        """Return the peak memory of this process in GiB: allocated on its GPU, or resident without one."""
        if self.platform.device.type == "cuda":
            return float(torch.cuda.max_memory_allocated(self.platform.device)) / 2**30
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

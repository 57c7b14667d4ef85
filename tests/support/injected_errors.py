"""Errors that a test injects into a rank of a real run: a loss that is not finite, a spike, a gradient, a rank that hangs.

An error is written as KIND:ITERATION[:RANK[:TIME]] and happens in every micro-batch of that iteration; `exit` happens only the
TIME-th time that the iteration is computed. `slow:1` slows every forward pass. `slow_save:N` delays every save by N seconds,
`slow_publish:N` the completion of a checkpoint, `slow_trace:N` the writing of a profile, `slow_close:N` the closing of the metrics.
`spoil:N` sets a weight to NaN before the save of iteration N.
"""

import ctypes
import os
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import profile

from megatron_ledom.callbacks.metrics import MetricsWriter
from megatron_ledom.checkpoint.writing import CheckpointWriter
from megatron_ledom.training import trainer


def inject(errors: str) -> None:
    """Change this process so that the errors, separated by commas, happen."""
    now, done = [0], Counter[int]()
    original_seed = trainer.seed_iteration

    def seed_and_note(seed: int, iteration: int, groups: Any) -> None:
        now[0] = iteration + 1
        done[now[0]] += 1
        original_seed(seed, iteration, groups)

    trainer.seed_iteration = seed_and_note
    for one in errors.split(","):
        kind, number, *rank = one.split(":")
        if not rank or int(rank[0]) == int(os.environ["RANK"]):
            _inject(
                kind, int(number), now, lambda number=int(number), times=rank[1:]: not times or done[number] == int(times[0])
            )


def _inject(kind: str, number: int, now: list[int], is_time: Callable[[], bool]) -> None:
    original_save = trainer.save_checkpoint
    original_loss, original_forward = trainer.masked_loss, trainer.forward_step

    def bad_loss(loss_mask: torch.Tensor, z_loss_coeff: float, losses: torch.Tensor) -> Any:
        if now[0] == number:
            if kind == "nan":
                losses = losses * float("nan")
            elif kind == "spike":
                losses = losses * 3.0
            elif kind == "gradient":
                losses.register_hook(lambda gradient: gradient * float("inf"))
        return original_loss(loss_mask, z_loss_coeff, losses)

    def slow_forward(z_loss_coeff: float, batches: Any, model: Any) -> Any:
        if now[0] == number and kind == "sleep":
            _sleep_here(1000)
        if now[0] == number and kind == "block":
            ctypes.PyDLL(None).sleep(1000)  # a PyDLL keeps the interpreter's lock
        if now[0] == number and kind == "exit" and is_time():
            os._exit(9)
        if kind == "slow":
            _sleep_here(0.05)
        return original_forward(z_loss_coeff, batches, model)

    def slow_save(state: Any) -> None:
        if kind == "slow_save":
            _sleep_here(number)
        if kind == "spoil" and state.iteration == number:
            with torch.no_grad():
                next(state.model[0].parameters()).view(-1)[0] = float("nan")
        original_save(state)

    slow_methods = {
        "slow_publish": (CheckpointWriter, "_publish"),
        "slow_trace": (profile, "export_chrome_trace"),
        "slow_close": (MetricsWriter, "close"),
    }
    if kind in slow_methods:
        _slow_down(*slow_methods[kind], number)
    trainer.save_checkpoint = slow_save
    trainer.masked_loss = bad_loss
    trainer.forward_step = slow_forward


def _slow_down(owner: type, method: str, seconds: float) -> None:
    original = getattr(owner, method)

    def slow(*arguments: Any) -> Any:
        _sleep_here(seconds)
        return original(*arguments)

    setattr(owner, method, slow)


def _sleep_here(seconds: float) -> None:
    time.sleep(seconds)

"""Callbacks: everything that a run does apart from training. The training loop calls each callback at named moments.

The moments of one iteration, in order: `on_step_start`; the step, with `on_batch_wait` and `on_batch` for each micro-batch;
`on_step_end`; the save if one is due; then, if any callback wants a record of the iteration, `on_measure` of all callbacks and
`on_record` of all callbacks. After a step that makes the run return to a checkpoint, `on_rollback` is called instead of
`on_step_end`, and there is no record. docs/reference/python_api.md describes how to add a callback; `megatron_ledom/callbacks`
has those of this project.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from inspect import signature
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

from megatron_ledom.config.batch_schedule import has_batch_schedule
from megatron_ledom.storage.records import Record

if TYPE_CHECKING:
    from megatron_ledom.data.dataset.batch import Batch
    from megatron_ledom.training.history import RunHistory
    from megatron_ledom.training.state import TrainState
    from megatron_ledom.training.step_policy import StepResult

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class TrainingRun:
    """The run that is being trained, as callbacks see it."""

    state: "TrainState"
    history: "RunHistory"
    pause: Callable[[str], AbstractContextManager[None]]
    """`with run.pause("validating"):` around long work that is not training; the throughput excludes its time."""

    def is_last_iteration(self) -> bool:
        """Return True if the iteration just done ends the run."""
        return self.state.iteration == self.state.config.train.train_iters

    def is_skipped_iteration(self) -> bool:
        """Return True if the iteration just done was skipped without being computed."""
        return self.state.iteration in self.history.skip_iterations


class Callback:
    """Base class of callbacks. Each method is one moment and does nothing here: override those you need.

    Every rank calls the same moments in the same order, so callbacks may use collectives, except in `on_batch_wait` and
    `on_batch`. An error of a callback ends the run.
    """

    def __init_subclass__(cls, **options: Any) -> None:
        """Raise TypeError for a method named `on_...` or `want...` that is not a moment, or that has other arguments."""
        super().__init_subclass__(**options)
        moments = [name for name in vars(Callback) if not name.startswith("_")]
        for name in vars(cls):
            if name.startswith(("on_", "want")) and name not in moments:
                near = get_close_matches(name, moments, 1)
                raise TypeError(
                    f"{cls.__name__}.{name} is not a moment of training, so it would never be called; "
                    + (f"did you mean {near[0]}?" if near else f"the moments are {', '.join(moments)}")
                )
            if name in moments:
                _check_arguments(f"{cls.__name__}.{name}", getattr(cls, name), getattr(Callback, name))

    def on_train_start(self, run: TrainingRun) -> None:
        """Training begins; `run.state.iteration` iterations are already done."""

    def on_step_start(self, run: TrainingRun) -> None:
        """Iteration `run.state.iteration` + 1 begins. If it is rolled back, `on_rollback` follows instead of `on_step_end`."""

    def on_batch_wait(self, run: TrainingRun) -> None:
        """The step begins to wait for its next micro-batch. Do not use collectives: ranks get here at different times."""

    def on_batch(self, run: TrainingRun, seconds: float) -> None:
        """The micro-batch has arrived after a wait of `seconds`. Do not use collectives."""

    def on_step_end(self, run: TrainingRun, result: "StepResult | None") -> None:
        """Iteration `run.state.iteration` is done; `result` is None if it was skipped without being computed."""

    def on_pause_start(self, run: TrainingRun, activity: str) -> None:
        """Work other than a step begins, such as a save; it may take a long time."""

    def on_pause_end(self, run: TrainingRun, seconds: float) -> None:
        """Training continues after `seconds` of other work."""

    def wants_record(self, run: TrainingRun) -> bool:
        """Return True if this callback needs a record of the iteration just done; the same on every rank."""
        return False

    def on_measure(self, run: TrainingRun, record: Record) -> None:
        """Add numbers, or dicts of numbers by name, to the record of the iteration just done, if any callback wants one."""

    def on_record(self, run: TrainingRun, record: Record) -> None:
        """The record is complete: write or show it."""

    def on_rollback(self, run: TrainingRun) -> None:
        """The run has returned to an earlier checkpoint; the iterations after it will be done again."""

    def on_train_end(self, run: TrainingRun) -> None:
        """Training is over and everything is saved: close open files. Not called if an error ends the run."""


def _check_arguments(name: str, method: Callable[..., Any], moment: Callable[..., Any]) -> None:
    """Raise TypeError if `method` cannot be called with the arguments of `moment`."""
    expected = signature(moment)
    try:
        signature(method).bind(*expected.parameters)
    except TypeError as error:
        raise TypeError(f"{name} is called with ({', '.join(expected.parameters)}): {error}") from error


class CallbackList:
    """The callbacks of one run, called in order at each moment."""

    def __init__(self, callbacks: Sequence[Callback], state: "TrainState", history: "RunHistory") -> None:
        self.callbacks = callbacks
        self.run = TrainingRun(state, history, self.pause)

    def call(
        self,
        moment: Callable[Concatenate[Callback, TrainingRun, Arguments], Result],
        *arguments: Arguments.args,
        **named: Arguments.kwargs,
    ) -> list[Result]:
        """Call one moment, such as `Callback.on_step_start`, of every callback; returns their results."""
        results = []
        for callback in self.callbacks:
            try:
                results.append(getattr(callback, moment.__name__)(self.run, *arguments, **named))
            except Exception as error:
                error.add_note(f"raised in {type(callback).__name__}.{moment.__name__}, a callback of the training loop")
                raise
        return results

    @contextmanager
    def pause(self, activity: str) -> Iterator[None]:
        """Call the moments before and after an activity that is not training."""
        self.call(Callback.on_pause_start, activity)
        start = time.perf_counter()
        yield
        self.call(Callback.on_pause_end, time.perf_counter() - start)

    def observe(self, batches: "list[Iterator[Batch]]") -> "list[Iterator[Batch]]":
        """Return the same micro-batches, one iterator per model chunk; call the moments before and after each wait."""
        return [self._observed(iterator) for iterator in batches]

    def _observed(self, batches: "Iterator[Batch]") -> "Iterator[Batch]":
        while True:
            self.call(Callback.on_batch_wait)
            start = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self.call(Callback.on_batch, time.perf_counter() - start)
            yield batch

    def record(self, result: "StepResult | None") -> None:
        """Make the record of the iteration just done and pass it to the callbacks, if any of them wants one."""
        if any(self.call(Callback.wants_record)):
            record = _position(self.run.state, result)
            self.call(Callback.on_measure, record)
            self.call(Callback.on_record, record)


def _position(state: "TrainState", result: "StepResult | None") -> Record:
    """Return the first keys of a record: iteration, losses, gradient norm, learning rate, position, and a batch size that changes.

    Losses and gradient norm are None if they are not finite or the iteration was skipped.
    """
    batch = {"global_batch_size": state.last_batch_size} if has_batch_schedule(state.config) else {}
    auxiliary = {}
    if state.teacher is not None:
        measured = None if result is None else result.auxiliary_loss
        auxiliary = {"auxiliary_loss": None if measured is None else _finite(measured)}
    return {
        "iteration": state.iteration,
        "lm_loss": None if result is None else _finite(result.lm_loss),
        "grad_norm": None if result is None else _finite(result.grad_norm),
        "lr": state.optimizer.param_groups[0]["lr"],
        "consumed_train_samples": state.consumed_train_samples,
        "consumed_train_tokens": state.consumed_train_tokens,
        **batch,
        **auxiliary,
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None

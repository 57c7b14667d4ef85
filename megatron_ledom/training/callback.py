"""Callbacks: what a run does beside training. The training loop calls each of them at a few named moments.

The moments of one iteration, in order: `on_step_start`; the step, with `on_batch_wait` and `on_batch` for each micro-batch;
`on_step_end`; the save if one is due; then, where any callback wants a record of the iteration, `on_measure` of all callbacks and
`on_record` of all callbacks. A step that sends the run back to a checkpoint has `on_rollback` instead of `on_step_end` and a record.
docs/python_api.md says how to add a callback; `megatron_ledom/callbacks` has those of this project.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from inspect import signature
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

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
    """`with run.pause("validating"):` around what takes long and is no training: its time is left out of the throughput."""

    def is_last_iteration(self) -> bool:
        """Return whether the iteration just done ends the run."""
        return self.state.iteration == self.state.config.train.train_iters

    def is_skipped_iteration(self) -> bool:
        """Return whether the iteration just done was skipped without being computed."""
        return self.state.iteration in self.history.skip_iterations


class Callback:
    """A duty beside training. Each method is one moment and does nothing here: override those you need.

    Every rank calls the same moments in the same order, so a callback may use collectives, but for `on_batch_wait` and `on_batch`.
    An error of a callback ends the run.
    """

    def __init_subclass__(cls, **options: Any) -> None:
        """Refuse a method that is named like a moment and is none, or takes other arguments: it would not be called."""
        super().__init_subclass__(**options)
        moments = [name for name in vars(Callback) if not name.startswith("_")]
        for name in vars(cls):
            if name.startswith(("on_", "want")) and name not in moments:
                near = get_close_matches(name, moments, 1)
                raise TypeError(
                    f"{cls.__name__}.{name} is no moment of training, so it would never be called; "
                    + (f"did you mean {near[0]}?" if near else f"the moments are {', '.join(moments)}")
                )
            if name in moments:
                _check_arguments(f"{cls.__name__}.{name}", getattr(cls, name), getattr(Callback, name))

    def on_train_start(self, run: TrainingRun) -> None:
        """Training begins; `run.state.iteration` iterations are done."""

    def on_step_start(self, run: TrainingRun) -> None:
        """Iteration `run.state.iteration` + 1 begins. It may be undone: then there is no `on_step_end`, but `on_rollback`."""

    def on_batch_wait(self, run: TrainingRun) -> None:
        """The step begins to wait for its next micro-batch. Ranks come here at different times: no collectives."""

    def on_batch(self, run: TrainingRun, seconds: float) -> None:
        """The micro-batch is there, after a wait of `seconds`. No collectives."""

    def on_step_end(self, run: TrainingRun, result: "StepResult | None") -> None:
        """Iteration `run.state.iteration` is done; no result where it was skipped without being computed."""

    def on_pause_start(self, run: TrainingRun, activity: str) -> None:
        """Something begins that is no step and may take long, such as a save."""

    def on_pause_end(self, run: TrainingRun, seconds: float) -> None:
        """Training goes on after `seconds` of something else."""

    def wants_record(self, run: TrainingRun) -> bool:
        """Return whether this callback asks for a record of the iteration just done; the same on every rank."""
        return False

    def on_measure(self, run: TrainingRun, record: Record) -> None:
        """Add to the record of the iteration just done, where any callback wants one: numbers, or dicts of numbers by name."""

    def on_record(self, run: TrainingRun, record: Record) -> None:
        """The record is complete: write or show it."""

    def on_rollback(self, run: TrainingRun) -> None:
        """The run has returned to an earlier checkpoint; what was done after it will be done again."""

    def on_train_end(self, run: TrainingRun) -> None:
        """Training is over, everything is saved: close what is open. Not called when an error ends the run."""


def _check_arguments(name: str, method: Callable[..., Any], moment: Callable[..., Any]) -> None:
    """Raise TypeError where `method` cannot be called with the arguments of `moment`."""
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
        """Call one moment, such as `Callback.on_step_start`, of every callback; returns what each returns."""
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
        """Call the moments around an activity that is no training."""
        self.call(Callback.on_pause_start, activity)
        start = time.perf_counter()
        yield
        self.call(Callback.on_pause_end, time.perf_counter() - start)

    def observe(self, batches: "list[Iterator[Batch]]") -> "list[Iterator[Batch]]":
        """Return the same micro-batches, an iterator for each model chunk, with the moments around each wait."""
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
        """Make, complete and hand out the record of the iteration just done, if any callback wants one."""
        if any(self.call(Callback.wants_record)):
            record = _position(self.run.state, result)
            self.call(Callback.on_measure, record)
            self.call(Callback.on_record, record)


def _position(state: "TrainState", result: "StepResult | None") -> Record:
    """Return the first keys of a record: the iteration, its loss and gradient norm where they are finite, and the position.

    A skipped iteration has neither loss nor gradient norm.
    """
    return {
        "iteration": state.iteration,
        "lm_loss": None if result is None else _finite(result.lm_loss),
        "grad_norm": None if result is None else _finite(result.grad_norm),
        "lr": state.optimizer.param_groups[0]["lr"],
        "consumed_train_samples": state.consumed_train_samples,
        "consumed_train_tokens": state.consumed_train_tokens,
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None

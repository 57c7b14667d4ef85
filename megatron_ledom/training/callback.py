"""Callbacks: what a run does beside training. The training loop calls each of them at a few named moments.

The moments of one iteration: `on_step_start`, the step, `on_step_end`, the save if one is due, then, where any callback wants a
record of the iteration, `on_measure` of all callbacks and `on_record` of all callbacks. `megatron_ledom/callbacks` has the callbacks
of this project, and says how to add one.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_ledom.storage.records import Record

if TYPE_CHECKING:
    from megatron_ledom.data.dataset.batch import Batch
    from megatron_ledom.training.history import RunHistory
    from megatron_ledom.training.state import TrainState
    from megatron_ledom.training.step_policy import StepResult

EVALUATIONS = ("validation", "test", "tasks")
"""Keys of a record under which evaluations put their results, by set or task."""


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


class Callback:
    """A duty beside training. Each method is one moment and does nothing here: override those you need.

    Every rank calls the same moments in the same order, so a callback may use collectives. An error of a callback ends the run.
    """

    def on_train_start(self, run: TrainingRun) -> None:
        """Training begins; `run.state.iteration` iterations are done."""

    def wrap_batches(self, run: TrainingRun, batches: "list[Iterator[Batch]]") -> "list[Iterator[Batch]]":
        """Return the same micro-batches, an iterator for each model chunk, to observe how they are read."""
        return batches

    def on_step_start(self, run: TrainingRun) -> None:
        """Iteration `run.state.iteration` + 1 begins."""

    def on_step_end(self, run: TrainingRun, result: "StepResult | None") -> None:
        """Iteration `run.state.iteration` is done; no result where it was skipped without being computed."""

    def on_activity(self, run: TrainingRun, activity: str) -> None:
        """Something begins that is no step and may take long, such as a save."""

    def on_pause_end(self, run: TrainingRun, seconds: float) -> None:
        """Training goes on after `seconds` of something else."""

    def wants_record(self, run: TrainingRun) -> bool:
        """Return whether this callback asks for a record of the iteration just done; the same on every rank."""
        return False

    def on_measure(self, run: TrainingRun, record: Record) -> None:
        """Add to the record of the iteration just done."""

    def on_record(self, run: TrainingRun, record: Record) -> None:
        """The record is complete: write or show it."""

    def on_rollback(self, run: TrainingRun) -> None:
        """The run has returned to an earlier checkpoint; what was done after it will be done again."""

    def on_train_end(self, run: TrainingRun) -> None:
        """Training is over, everything is saved: close what is open. Not called when an error ends the run."""


class CallbackList:
    """The callbacks of one run, called in order at each moment."""

    def __init__(self, callbacks: Sequence[Callback], state: "TrainState", history: "RunHistory") -> None:
        self.callbacks = callbacks
        self.run = TrainingRun(state, history, self.pause)

    def on_train_start(self) -> None:
        """Training begins."""
        self._call("on_train_start")

    def wrap_batches(self, batches: "list[Iterator[Batch]]") -> "list[Iterator[Batch]]":
        """Return the micro-batches as the callbacks wrap them; the first callback is nearest to the data."""
        for callback in self.callbacks:
            batches = self._call_one(callback, "wrap_batches", batches)
        return batches

    def on_step_start(self) -> None:
        """The next iteration begins."""
        self._call("on_step_start")

    def on_step_end(self, result: "StepResult | None") -> None:
        """An iteration is done."""
        self._call("on_step_end", result)

    def on_activity(self, activity: str) -> None:
        """Something begins that may take long."""
        self._call("on_activity", activity)

    @contextmanager
    def pause(self, activity: str) -> Iterator[None]:
        """Announce an activity that is no training, and leave the time inside out of the throughput."""
        self.on_activity(activity)
        start = time.perf_counter()
        yield
        self._call("on_pause_end", time.perf_counter() - start)

    def record(self, result: "StepResult | None") -> None:
        """Make, complete and hand out the record of the iteration just done, if any callback wants one.

        A skipped iteration has no loss or gradient norm: its record is handed out only when it holds an evaluation.
        """
        if not any(self._call_one(callback, "wants_record") for callback in self.callbacks):
            return
        record = _position(self.run.state, result)
        self._call("on_measure", record)
        if result is not None or any(name in record for name in EVALUATIONS):
            self._call("on_record", record)

    def on_rollback(self) -> None:
        """The run has returned to an earlier checkpoint."""
        self._call("on_rollback")

    def on_train_end(self) -> None:
        """Training is over."""
        self._call("on_train_end")

    def _call(self, moment: str, *arguments: Any) -> None:
        for callback in self.callbacks:
            self._call_one(callback, moment, *arguments)

    def _call_one(self, callback: Callback, moment: str, *arguments: Any) -> Any:
        try:
            return getattr(callback, moment)(self.run, *arguments)
        except Exception as error:
            error.add_note(f"raised in {type(callback).__name__}.{moment}, a callback of the training loop")
            raise


def _position(state: "TrainState", result: "StepResult | None") -> Record:
    """Return the first keys of a record: the iteration, its loss and gradient norm where they are finite, and the position."""
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

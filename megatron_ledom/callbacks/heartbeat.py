"""Tell the watchdog of each rank what its main thread does."""

from collections.abc import Iterator

from megatron_ledom.data.dataset.batch import Batch
from megatron_ledom.training.callback import Callback, TrainingRun
from megatron_ledom.training.watchdog import Watchdog


class Heartbeat(Callback):
    """Reports every activity of the run to the watchdog, and every forward pass."""

    def __init__(self, watchdog: Watchdog) -> None:
        self.watchdog = watchdog

    def on_train_start(self, run: TrainingRun) -> None:
        """Count every forward pass as progress."""
        self.watchdog.watch_model(run.state.model)

    def wrap_batches(self, run: TrainingRun, batches: list[Iterator[Batch]]) -> list[Iterator[Batch]]:
        """Report the wait for each micro-batch."""
        return [self._reported(iterator) for iterator in batches]

    def _reported(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        while True:
            self.watchdog.set_activity("waiting for data")
            try:
                batch = next(batches)
            except StopIteration:
                return
            self.watchdog.set_activity("forward and backward")
            yield batch

    def on_step_start(self, run: TrainingRun) -> None:
        """Report a step."""
        self.watchdog.set_activity("a step", run.state.iteration + 1)

    def on_activity(self, run: TrainingRun, activity: str) -> None:
        """Report the activity, and be patient."""
        self.watchdog.set_activity(activity, run.state.iteration, patient=True)

    def on_pause_end(self, run: TrainingRun, seconds: float) -> None:
        """Report that training goes on."""
        self.watchdog.set_activity("training", run.state.iteration)

    def on_rollback(self, run: TrainingRun) -> None:
        """Be patient while the other callbacks close their files."""
        self.on_activity(run, "closing the reports")

    def on_train_end(self, run: TrainingRun) -> None:
        """Be patient while the other callbacks close: a trace, what Weights & Biases has still to send."""
        self.on_activity(run, "closing the reports")

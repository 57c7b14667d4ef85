"""Report the activity of each rank's main thread to its watchdog."""

from megatron_ledom.training.callback import Callback, TrainingRun
from megatron_ledom.training.watchdog import Watchdog


class Heartbeat(Callback):
    """Reports every activity of the run and every forward pass to the watchdog."""

    def __init__(self, watchdog: Watchdog) -> None:
        self.watchdog = watchdog

    def on_train_start(self, run: TrainingRun) -> None:
        """Count every forward pass as progress."""
        self.watchdog.watch_model(run.state.model)

    def on_step_start(self, run: TrainingRun) -> None:
        """Report a step."""
        self.watchdog.set_activity("a step", run.state.iteration + 1)

    def on_batch_wait(self, run: TrainingRun) -> None:
        """Report the wait for a micro-batch."""
        self.watchdog.set_activity("waiting for data")

    def on_batch(self, run: TrainingRun, seconds: float) -> None:
        """Report that the micro-batch has arrived and is being computed."""
        self.watchdog.set_activity("forward and backward")

    def on_pause_start(self, run: TrainingRun, activity: str) -> None:
        """Report the activity, and that it may take a long time."""
        self.watchdog.set_activity(activity, run.state.iteration, patient=True)

    def on_pause_end(self, run: TrainingRun, seconds: float) -> None:
        """Report that training continues."""
        self.watchdog.set_activity("training", run.state.iteration)

    def on_rollback(self, run: TrainingRun) -> None:
        """Report that the other callbacks close their files, which may take a long time."""
        self.on_pause_start(run, "closing the logs")

    def on_train_end(self, run: TrainingRun) -> None:
        """Report that the other callbacks close: a trace, unsent records of Weights & Biases. This may take a long time."""
        self.on_pause_start(run, "closing the logs")

"""Tell the watchdog of each rank the activity of its main thread."""

from megatron_ledom.training.callback import Callback, TrainingRun
from megatron_ledom.training.watchdog import Watchdog


class Heartbeat(Callback):
    """Reports every activity of the run to the watchdog, and every forward pass."""

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
        """Report that the micro-batch is computed."""
        self.watchdog.set_activity("forward and backward")

    def on_pause_start(self, run: TrainingRun, activity: str) -> None:
        """Report the activity, and be patient."""
        self.watchdog.set_activity(activity, run.state.iteration, patient=True)

    def on_pause_end(self, run: TrainingRun, seconds: float) -> None:
        """Report that training goes on."""
        self.watchdog.set_activity("training", run.state.iteration)

    def on_rollback(self, run: TrainingRun) -> None:
        """Be patient while the other callbacks close their files."""
        self.on_pause_start(run, "closing the reports")

    def on_train_end(self, run: TrainingRun) -> None:
        """Be patient while the other callbacks close: a trace, what Weights & Biases has still to send."""
        self.on_pause_start(run, "closing the reports")

"""The training loop: step, log, validate, save, until the run is done or told to stop."""

from megatron_ledom.training.iteration import run_iteration
from megatron_ledom.training.recovery import Recovery
from megatron_ledom.training.reporting import Reporter, TaskEvaluation
from megatron_ledom.training.resilience import StopRequest
from megatron_ledom.training.state import TrainState, save_checkpoint
from megatron_ledom.training.watchdog import Watchdog


def train(state: TrainState, stop: StopRequest, watchdog: Watchdog, evaluate_tasks: TaskEvaluation | None = None) -> None:
    """Train from the state's iteration to the end of the run, or to a stop; whatever was done is saved.

    evaluate_tasks: what every `train.task_interval` iterations gives figures for the metrics, called on every rank.
    """
    config = state.config
    recovery = Recovery.of_run(state, watchdog)
    reporter = Reporter(state, recovery.history, watchdog, evaluate_tasks)
    batches = reporter.open_batches()
    while state.iteration < config.train.train_iters:
        reporter.begin_step()
        result = run_iteration(state, batches, recovery.policy, recovery.history.left_out)
        if not recovery.accept(result):  # back at the last checkpoint
            reporter.take_position()
            batches = reporter.open_batches()
            continue
        reporter.end_step(result)
        stopping = stop.agreed(state.platform.device, state.store.seconds_to_finish()) or _is_multiple(
            state.iteration, config.train.exit_interval
        )
        if (
            stopping
            or state.iteration == config.train.train_iters
            or _is_multiple(state.iteration, config.checkpoint.save_interval)
        ):
            with reporter.apart("saving"):
                recovery.history.sync()
                save_checkpoint(state)
        reporter.report(result)  # behind the save: it is written while validation runs, and counts when that is recorded
        watchdog.tell("looking after the pending checkpoint", patient=True)  # which rank 0 may be finishing
        state.store.poll()
        if stopping:
            break
    with reporter.apart("finishing the last checkpoint"):
        state.store.finish()
    recovery.history.close()
    reporter.close()


def _is_multiple(iteration: int, interval: int | None) -> bool:
    return interval is not None and iteration % interval == 0

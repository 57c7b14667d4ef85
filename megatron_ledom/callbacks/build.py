"""Build the list of callbacks of a run from its config."""

from megatron_ledom.callbacks.console import Console
from megatron_ledom.callbacks.heartbeat import Heartbeat
from megatron_ledom.callbacks.metrics import Metrics
from megatron_ledom.callbacks.multi_token import MultiTokenLosses
from megatron_ledom.callbacks.profiling import Profiling
from megatron_ledom.callbacks.timing import RankTimes, Throughput
from megatron_ledom.callbacks.validation import FinalTest, Validation
from megatron_ledom.training.callback import Callback
from megatron_ledom.training.held_out import TaskHashes
from megatron_ledom.training.state import TrainState
from megatron_ledom.training.watchdog import Watchdog


def build_callbacks(state: TrainState, watchdog: Watchdog, task_hashes: TaskHashes) -> list[Callback]:
    """Return the callbacks of a run in calling order, which is also the order of the keys of a record. Call on every rank.

    task_hashes: sha256 of the files of `train.tasks` when they were checked.
    """
    metrics = Metrics()
    callbacks = [Heartbeat(watchdog), Profiling(state.config), Throughput(), RankTimes(state.platform), metrics, Validation()]
    if (num_modules := state.config.model.mtp_num_layers) is not None:
        callbacks.insert(0, MultiTokenLosses(num_modules))
    if state.config.train.tasks:
        from megatron_ledom.callbacks.tasks import TaskEvaluation, load_task_set  # transformers takes seconds to import

        callbacks.append(TaskEvaluation(load_task_set(state, task_hashes)))
    return [*callbacks, FinalTest(), Console(metrics)]

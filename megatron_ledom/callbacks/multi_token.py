"""Report the losses of the modules of multi-token prediction."""

import torch.distributed as dist

from megatron_ledom.config.derived import num_microbatches
from megatron_ledom.model.multi_token import clear_mtp_losses, mtp_losses
from megatron_ledom.storage.records import Record
from megatron_ledom.training.callback import Callback, TrainingRun
from megatron_ledom.training.step_policy import StepResult


class MultiTokenLosses(Callback):
    """Adds `mtp_loss` to a record: by module, the loss of the iteration in nats per token, without its weight."""

    def __init__(self, num_modules: int) -> None:
        self.num_modules, self.is_computed = num_modules, False

    def on_step_start(self, run: TrainingRun) -> None:
        """Forget the losses of the last step."""
        clear_mtp_losses()

    def on_step_end(self, run: TrainingRun, result: StepResult | None) -> None:
        """Note if the iteration was skipped: it has no losses then."""
        self.is_computed = result is not None

    def on_measure(self, run: TrainingRun, record: Record) -> None:
        """Add the losses by module, counted from 1."""
        if self.is_computed:
            state = run.state
            count = num_microbatches(state.config, dist.get_world_size(), state.last_batch_size)
            found = mtp_losses(self.num_modules, count, state.groups, state.platform.device)
            record["mtp_loss"] = {str(number): loss for number, loss in enumerate(found, 1)}

"""After a bad step: keep what is known of it, and stop or return to the last checkpoint if the policy says so."""

import logging
import os
from dataclasses import dataclass
from typing import NoReturn

import torch.distributed as dist

from megatron_ledom.data.dataset.dataset import sample_origins
from megatron_ledom.errors import StoppedError
from megatron_ledom.storage.records import BAD_STEPS, plain
from megatron_ledom.training.history import RunHistory
from megatron_ledom.training.state import TrainState, load_checkpoint
from megatron_ledom.training.step_policy import Action, StepPolicy, StepResult
from megatron_ledom.training.watchdog import Watchdog

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Recovery:
    """Judging, remembering and undoing of one run's steps. The same calls on every rank."""

    state: TrainState
    policy: StepPolicy
    history: RunHistory
    watchdog: Watchdog

    @classmethod
    def of_run(cls, state: TrainState, watchdog: Watchdog) -> "Recovery":
        """Of the run at its present position, with what its folder remembers of the steps before."""
        train = state.config.train
        policy = StepPolicy(train, state.platform.device)
        recovery = cls(state, policy, RunHistory(state.config.run_dir, train.skip_iterations), watchdog)
        recovery.take_position()
        return recovery

    def take_position(self) -> None:
        """Remember the steps up to the state's iteration, and those alone."""
        self.policy.remember(self.history.go_on_from(self.state.iteration, self.policy.past.maxlen or 0))
        self._keep_for_replay()

    def _keep_for_replay(self) -> None:
        """Rank 0 retires checkpoints; those before the newest bad steps stay."""
        if dist.get_rank() == 0:
            self.state.store.keep_for_replay(list(self.history.newest_bad or ()))

    def accept(self, result: StepResult | None) -> bool:
        """Whether the iteration counts; if not, the state is that of the last checkpoint. Raises StoppedError on a stop."""
        if result is None:
            return True
        verdict = result.verdict
        iteration = self.state.iteration + (0 if verdict.goes_on else 1)
        if verdict.goes_on:
            self.history.write(self.policy.past[-1])
        if verdict.action is not Action.UPDATE:
            self._keep(iteration, result)
            log.warning("iteration %d: %s (%s)", iteration, verdict.reason, verdict.action.name.lower())
        if not verdict.goes_on:
            self.watchdog.tell("what follows a bad step", iteration, patient=True)
        if verdict.action is Action.STOP:
            self._stop(iteration, verdict.reason)
        if verdict.action is Action.ROLL_BACK:
            self._roll_back(iteration, verdict.reason)
        return verdict.goes_on

    def _keep(self, iteration: int, result: StepResult) -> None:
        if dist.get_rank() != 0:
            return
        state, batch = self.state, self.state.config.train.global_batch_size
        last = state.consumed_train_samples + (0 if result.verdict.goes_on else batch)
        self.history.write_bad(
            {
                "iteration": iteration,
                "action": result.verdict.action.name.lower(),
                "reason": result.verdict.reason,
                "lm_loss": plain(result.lm_loss),
                "grad_norm": plain(result.grad_norm),
                "score": result.verdict.score,
                "world_size": dist.get_world_size(),
                "left_out": sorted(self.history.left_out),
                "first_sample": last - batch,
                "last_sample": last - 1,
                "launch": self.history.launch,
                "samples": sample_origins(state.train_dataset, range(last - batch, last)),
            }
        )
        self._keep_for_replay()

    def _stop(self, iteration: int, reason: str) -> NoReturn:
        """Nothing is saved: the steps before a bad one may have spoilt the weights already, the last checkpoint is good."""
        self.state.store.finish()  # what is being written is good
        run_dir = self.state.config.run_dir
        raise StoppedError(
            f"iteration {iteration}: {reason}. Nothing was updated or saved; its samples are listed in"
            f" {os.path.join(run_dir, BAD_STEPS)}. Look at it with tools/replay_step.py --run {run_dir} --iteration {iteration};"
            f" then lower optimizer.lr, or leave it out with train.skip_iterations=[{iteration}]: the same command goes on from the"
            " last checkpoint"
        )

    def _roll_back(self, iteration: int, reason: str) -> None:
        """Return to the last checkpoint, and leave out everything since the spike began."""
        state, limit = self.state, self.state.config.train.max_roll_backs
        state.store.finish()
        latest = state.store.latest()
        if latest is None:
            self._stop(iteration, f"{reason}; there is no checkpoint to return to")
        manifest = state.store.load_manifest(latest)
        if manifest.weights_only:  # it has no moments to return to
            self._stop(iteration, f"{reason}; there is no checkpoint of this run to return to, only the imported weights")
        checkpoint = manifest.iteration
        if self.history.num_roll_backs(checkpoint) >= limit:
            self._stop(iteration, f"{reason}, after {limit} returns to {latest} (train.max_roll_backs)")
        began = max(self.policy.spike_began(iteration), checkpoint + 1)
        self.history.plan_skips(range(began, iteration + 1), checkpoint)
        log.warning("returning to iteration %d; iterations %d to %d will be left out", checkpoint, began, iteration)
        load_checkpoint(state, latest)
        self.take_position()

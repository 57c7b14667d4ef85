"""Record the steps of a run; after a bad step, stop or return to the last checkpoint, as the policy decides."""

import logging
import os
from dataclasses import dataclass
from typing import NoReturn

import torch.distributed as dist

from megatron_ledom.data.dataset.blend_samples import sample_origins
from megatron_ledom.errors import StoppedError
from megatron_ledom.storage.records import BAD_STEPS, plain
from megatron_ledom.training.history import RunHistory
from megatron_ledom.training.state import TrainState, load_checkpoint
from megatron_ledom.training.step_policy import Action, StepPolicy, StepResult, Verdict

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Recovery:
    """The policy and the history of one run, and the return to a checkpoint. Make the same calls on every rank."""

    state: TrainState
    policy: StepPolicy
    history: RunHistory

    @classmethod
    def resume(cls, state: TrainState) -> "Recovery":
        """Return the recovery of a run at its present position, with the steps recorded in its folder."""
        train = state.config.train
        policy = StepPolicy(train, state.platform.device)
        recovery = cls(state, policy, RunHistory(state.config.run_dir, train.skip_iterations))
        recovery._resume()
        return recovery

    def _resume(self) -> None:
        """Forget the steps after the state's iteration."""
        self.policy.resume_from(self.history.resume_from(self.state.iteration, self.policy.past.maxlen or 0))
        self._keep_replay_checkpoints()

    def _keep_replay_checkpoints(self) -> None:
        """Keep the checkpoints before the newest bad steps when rank 0 removes old ones."""
        if dist.get_rank() == 0:
            self.state.store.keep_for_replay(list(self.history.newest_bad_steps or ()))

    def record(self, result: StepResult | None) -> None:
        """Record the step just judged, and log it if it is bad. Does nothing for a skipped iteration (None)."""
        if result is None:
            return
        verdict = result.verdict
        if verdict.is_accepted:
            self.history.write_step(self.policy.past[-1])
        if verdict.action is not Action.UPDATE:
            self._record_bad_step(result)
            log.warning("iteration %d: %s (%s)", self._iteration(verdict), verdict.reason, verdict.action.name.lower())

    def roll_back(self, result: StepResult) -> None:
        """After a step that was not accepted, load the last checkpoint and skip the iterations since the spike began.

        Raises StoppedError if the run must stop.
        """
        iteration, reason = self._iteration(result.verdict), result.verdict.reason
        if result.verdict.action is Action.STOP:
            self._stop(iteration, reason)
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
        began = max(self.policy.spike_start(iteration), checkpoint + 1)
        self.history.add_skips(range(began, iteration + 1), checkpoint)
        log.warning("returning to iteration %d; iterations %d to %d will be skipped", checkpoint, began, iteration)
        load_checkpoint(state, latest)
        self._resume()

    def _iteration(self, verdict: Verdict) -> int:
        """Return the iteration of the step just judged; the state has counted it only if it was accepted."""
        return self.state.iteration + (0 if verdict.is_accepted else 1)

    def _record_bad_step(self, result: StepResult) -> None:
        if dist.get_rank() != 0:
            return
        state, is_counted = self.state, result.verdict.is_accepted
        batch = state.last_batch_size if is_counted else state.next_batch_size
        last = state.consumed_train_samples + (0 if is_counted else batch)
        self.history.write_bad_step(
            {
                "iteration": self._iteration(result.verdict),
                "action": result.verdict.action.name.lower(),
                "reason": result.verdict.reason,
                "lm_loss": plain(result.lm_loss),
                "grad_norm": plain(result.grad_norm),
                "score": result.verdict.score,
                "world_size": dist.get_world_size(),
                "left_out": sorted(self.history.skip_iterations),
                "first_sample": last - batch,
                "last_sample": last - 1,
                "launch": self.history.launch,
                "samples": sample_origins(state.train_dataset, range(last - batch, last)),
            }
        )
        self._keep_replay_checkpoints()

    def _stop(self, iteration: int, reason: str) -> NoReturn:
        """Raise StoppedError without saving: earlier steps may already have damaged the weights; the last checkpoint is good."""
        self.state.store.finish()  # the checkpoint being written is good
        run_dir = self.state.config.run_dir
        raise StoppedError(
            f"iteration {iteration}: {reason}. Nothing was updated or saved; its samples are listed in"
            f" {os.path.join(run_dir, BAD_STEPS)}. Examine it with ledom replay-step --run {run_dir} --iteration {iteration};"
            f" then lower optimizer.lr, or skip it with train.skip_iterations=[{iteration}]. The same command resumes from the"
            " last checkpoint"
        )

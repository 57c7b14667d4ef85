"""Judge each step before its update, and choose the action for a loss or gradient norm that is not finite or is a spike.

The score of a value is its distance above the median of the last iterations, in standard deviations. The standard deviation is
estimated from the median deviation, so an earlier spike does not hide a later one. For the gradient norm, the logarithm is scored.
"""

import math
import statistics
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import IntEnum

import torch
import torch.distributed as dist

from megatron_ledom.config.schema import TrainConfig

NORMAL_DEVIATION = 1.4826
"""Ratio of the standard deviation of normal noise to its median deviation."""
SMALLEST_DEVIATION = 1e-3
"""Smallest deviation as a fraction of the median: in a nearly constant loss, a change of a thousandth is not a spike."""


class Action(IntEnum):
    """The treatment of a step. If ranks disagree, all take the strictest action."""

    UPDATE = 0
    WARN = 1
    SKIP = 2
    ROLL_BACK = 3
    STOP = 4


ACTIONS = {"warn": Action.WARN, "skip": Action.SKIP, "roll_back": Action.ROLL_BACK, "stop": Action.STOP}
"""Actions by the values of `train.on_nonfinite` and `train.on_spike`."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """The decision on one step."""

    action: Action
    reason: str = ""
    """The problem of the step; empty for an ordinary one."""
    score: float | None = None
    """The larger of the scores of loss and gradient norm; None if they are not finite or the window is too short."""

    @property
    def is_applied(self) -> bool:
        """Return True if the optimizer makes the update."""
        return self.action <= Action.WARN

    @property
    def is_accepted(self) -> bool:
        """Return True if the iteration counts as done, with or without its update."""
        return self.action <= Action.SKIP


@dataclass(frozen=True, slots=True)
class StepResult:
    """Loss and gradient norm of one step, and the decision on it."""

    lm_loss: float
    """Mean negative log-likelihood of the tokens that the loss mask keeps, in nats."""
    grad_norm: float
    """Global gradient norm before clipping."""
    verdict: Verdict
    """The decision on the step, with its reason."""
    auxiliary_loss: float | None = None
    """Mean of the unweighted auxiliary loss over the positions that have one; None without `train.auxiliary.kind`."""


@dataclass(frozen=True, slots=True)
class PastStep:
    """Loss, gradient norm and score of a past iteration, with which later steps are compared."""

    iteration: int
    lm_loss: float
    grad_norm: float
    score: float | None
    skipped: bool


@dataclass(slots=True)
class StepPolicy:
    """The judge of steps, by `train.on_nonfinite`, `train.on_spike` and their limits. Make the same calls on every rank."""

    settings: TrainConfig
    device: torch.device
    past: deque[PastStep] = field(init=False)

    def __post_init__(self) -> None:
        self.past = deque(maxlen=max(self.settings.spike_window, self.settings.max_skips))

    def resume_from(self, steps: Iterable[PastStep]) -> None:
        """Compare later steps with these past steps from now on."""
        self.past.clear()
        self.past.extend(steps)

    def judge(self, iteration: int, lm_loss: float, grad_norm: float) -> Verdict:
        """Decide on the step of `iteration`, and remember an accepted one. Call on every rank."""
        verdict = self._strictest(self._judge_locally(lm_loss, grad_norm))
        if verdict.is_accepted:
            self.past.append(PastStep(iteration, lm_loss, grad_norm, verdict.score, not verdict.is_applied))
        return verdict

    def spike_start(self, iteration: int) -> int:
        """Return the iteration at which the spike of a bad iteration began.

        It is the first of the iterations directly before the bad one whose scores were at least half of a spike's; the bad
        one itself if there are none.
        """
        for step in reversed(self.past):
            if step.iteration != iteration - 1 or (step.score or 0.0) < self.settings.spike_score / 2:
                break
            iteration = step.iteration
        return iteration

    def _judge_locally(self, lm_loss: float, grad_norm: float) -> Verdict:
        settings = self.settings
        if not (math.isfinite(lm_loss) and math.isfinite(grad_norm)):
            reason = f"the loss is {lm_loss}, the gradient norm {grad_norm}"
            return self._limit_skips(Verdict(ACTIONS[settings.on_nonfinite], reason))
        score = self._score(lm_loss, grad_norm)
        if score is None or score < settings.spike_score:
            return Verdict(Action.UPDATE, score=score)
        reason = f"spike: loss {lm_loss:.4f}, gradient norm {grad_norm:.4g}, {score:.1f} deviations above the last iterations"
        return self._limit_skips(Verdict(ACTIONS[settings.on_spike], reason, score))

    def _limit_skips(self, verdict: Verdict) -> Verdict:
        """Return a stop instead of a skip if the last `train.max_skips` updates were already skipped."""
        limit = self.settings.max_skips
        last = list(self.past)[-limit:]
        if verdict.action is Action.SKIP and len(last) == limit and all(step.skipped for step in last):
            return Verdict(Action.STOP, f"{verdict.reason}, after {limit} skipped updates in a row", verdict.score)
        return verdict

    def _score(self, lm_loss: float, grad_norm: float) -> float | None:
        window = list(self.past)[-self.settings.spike_window :]
        losses = [step.lm_loss for step in window if math.isfinite(step.lm_loss)]
        norms = [_log_norm(step.grad_norm) for step in window if math.isfinite(step.grad_norm)]
        if min(len(losses), len(norms)) < self.settings.spike_window // 2:
            return None
        return max(deviations_above(lm_loss, losses), deviations_above(_log_norm(grad_norm), norms))

    def _strictest(self, verdict: Verdict) -> Verdict:
        """Return the verdict with the strictest action of all ranks, whose values may differ in the last bit."""
        if dist.get_world_size() == 1:
            return verdict
        action = torch.tensor(int(verdict.action), dtype=torch.int32, device=self.device)
        dist.all_reduce(action, op=dist.ReduceOp.MAX)
        strictest = Action(int(action.item()))
        if strictest is verdict.action:
            return verdict
        return Verdict(strictest, verdict.reason or "another rank found this step bad", verdict.score)


def deviations_above(value: float, window: list[float]) -> float:
    """Return the distance of `value` above the median of `window` in standard deviations; negative if below."""
    middle = statistics.median(window)
    deviation = NORMAL_DEVIATION * statistics.median([abs(other - middle) for other in window])
    return (value - middle) / max(deviation, SMALLEST_DEVIATION * abs(middle), 1e-12)


def _log_norm(grad_norm: float) -> float:
    return math.log(max(grad_norm, 1e-30))

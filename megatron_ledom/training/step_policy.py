"""Judge each step before its update: what happens when its loss or gradient norm is not finite or is a spike.

A score is robust: distance from the median of the last iterations in standard deviations, which are estimated from the median
deviation, so that an earlier spike in the window hides no later one. The gradient norm is scored by its logarithm.
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
"""Standard deviation of normal noise over its median deviation."""
SMALLEST_DEVIATION = 1e-3
"""Smallest deviation as a share of the median: a loss that hardly moves has no spikes of a thousandth."""


class Action(IntEnum):
    """The treatment of a step; where ranks disagree, the strictest action holds for all."""

    UPDATE = 0
    WARN = 1
    SKIP = 2
    ROLL_BACK = 3
    STOP = 4


ACTIONS = {"warn": Action.WARN, "skip": Action.SKIP, "roll_back": Action.ROLL_BACK, "stop": Action.STOP}
"""By the value of `train.on_nonfinite` and `train.on_spike`."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """The decision on one step."""

    action: Action
    reason: str = ""
    """The fault of the step; empty for an ordinary one."""
    score: float | None = None
    """The larger of the scores of loss and gradient norm; None while the window is too short, or without finite values."""

    @property
    def is_applied(self) -> bool:
        """Return whether the optimizer makes the update."""
        return self.action <= Action.WARN

    @property
    def is_accepted(self) -> bool:
        """Return whether the iteration counts as done, with or without its update."""
        return self.action <= Action.SKIP


@dataclass(frozen=True, slots=True)
class StepResult:
    """The numbers of one optimizer step, and the decision on it."""

    lm_loss: float
    """Mean negative log-likelihood of the tokens the mask keeps, in nats."""
    grad_norm: float
    """Global gradient norm before clipping."""
    verdict: Verdict
    """The decision on the update, with its reason."""


@dataclass(frozen=True, slots=True)
class PastStep:
    """The numbers of a past iteration, against which later steps are judged."""

    iteration: int
    lm_loss: float
    grad_norm: float
    score: float | None
    skipped: bool


@dataclass(slots=True)
class StepPolicy:
    """Judges steps by `train.on_nonfinite`, `on_spike` and their limits. The same calls on every rank."""

    settings: TrainConfig
    device: torch.device
    past: deque[PastStep] = field(init=False)

    def __post_init__(self) -> None:
        self.past = deque(maxlen=max(self.settings.spike_window, self.settings.max_skips))

    def resume_from(self, steps: Iterable[PastStep]) -> None:
        """Judge from now on against these past steps."""
        self.past.clear()
        self.past.extend(steps)

    def judge(self, iteration: int, lm_loss: float, grad_norm: float) -> Verdict:
        """Decide on the step of `iteration`, and remember an accepted one. Call on every rank."""
        verdict = self._strictest(self._judge_locally(lm_loss, grad_norm))
        if verdict.is_accepted:
            self.past.append(PastStep(iteration, lm_loss, grad_norm, verdict.score, not verdict.is_applied))
        return verdict

    def spike_start(self, iteration: int) -> int:
        """Return the first of the iterations before a bad one that were already half a spike, without a gap; else the bad one."""
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
        reason = f"a spike: loss {lm_loss:.4f}, gradient norm {grad_norm:.4g}, {score:.1f} deviations above the last iterations"
        return self._limit_skips(Verdict(ACTIONS[settings.on_spike], reason, score))

    def _limit_skips(self, verdict: Verdict) -> Verdict:
        """Return a stop instead of one more skip when the last `train.max_skips` updates were skipped."""
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
        """Return the verdict with the strictest action of all ranks: values that differ in a last bit must not separate them."""
        if dist.get_world_size() == 1:
            return verdict
        action = torch.tensor(int(verdict.action), dtype=torch.int32, device=self.device)
        dist.all_reduce(action, op=dist.ReduceOp.MAX)
        strictest = Action(int(action.item()))
        if strictest is verdict.action:
            return verdict
        return Verdict(strictest, verdict.reason or "another rank found this step bad", verdict.score)


def deviations_above(value: float, window: list[float]) -> float:
    """Return how many standard deviations `value` lies above the median of `window`, negative below."""
    middle = statistics.median(window)
    deviation = NORMAL_DEVIATION * statistics.median([abs(other - middle) for other in window])
    return (value - middle) / max(deviation, SMALLEST_DEVIATION * abs(middle), 1e-12)


def _log_norm(grad_norm: float) -> float:
    return math.log(max(grad_norm, 1e-30))

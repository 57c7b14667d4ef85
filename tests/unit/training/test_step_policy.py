"""Scores by hand, the action of each policy, and the limits."""

import math
from typing import Any

import pytest
import torch

from megatron_ledom.config.schema import TrainConfig
from megatron_ledom.training import step_policy
from megatron_ledom.training.step_policy import Action, PastStep, StepPolicy, deviations_above

WINDOW = 16


def policy(monkeypatch: pytest.MonkeyPatch, **settings: Any) -> StepPolicy:
    monkeypatch.setattr(step_policy.dist, "get_world_size", lambda: 1)
    return StepPolicy(TrainConfig(train_iters=100, global_batch_size=8, spike_window=WINDOW, **settings), torch.device("cpu"))


def filled(monkeypatch: pytest.MonkeyPatch, **settings: Any) -> StepPolicy:
    """Return a policy after `WINDOW` steps with losses 2.9, 3.1, 2.9, ... and gradient norms of 1."""
    made = policy(monkeypatch, **settings)
    made.resume_from(PastStep(number, 3.0 + 0.1 * (-1) ** number, 1.0, None, False) for number in range(1, WINDOW + 1))
    return made


def test_deviations_by_hand() -> None:
    """Median 3, absolute deviations 2 1 0 1 2, their median 1: (7 - 3) / 1.4826."""
    assert deviations_above(7.0, [1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(4 / 1.4826)
    assert deviations_above(1.0, [1.0, 2.0, 3.0, 4.0, 5.0]) < 0


def test_an_earlier_spike_does_not_hide_a_later_one() -> None:
    calm = [3.0 + 0.1 * (-1) ** number for number in range(16)]
    assert deviations_above(9.0, [*calm, 9.0, 9.0]) > 15  # by mean and standard deviation it would be 2.8


def test_a_constant_loss_has_no_spike_of_a_thousandth() -> None:
    assert deviations_above(3.003, [3.0] * 20) == pytest.approx(1.0)


def test_there_is_no_score_before_half_a_window(monkeypatch: pytest.MonkeyPatch) -> None:
    young = policy(monkeypatch)
    verdicts = [young.judge(number, 3.0 + 0.1 * (-1) ** number, 1.0) for number in range(1, WINDOW // 2 + 1)]
    assert [verdict.score for verdict in verdicts] == [None] * (WINDOW // 2)
    assert young.judge(WINDOW // 2 + 1, 3.0, 1.0).score is not None


@pytest.mark.parametrize("lm_loss", [math.nan, math.inf, 3.0])
def test_a_step_that_is_not_finite_follows_its_policy(monkeypatch: pytest.MonkeyPatch, lm_loss: float) -> None:
    grad_norm = math.inf if lm_loss == 3.0 else 1.0
    for name, action in (("stop", Action.STOP), ("skip", Action.SKIP), ("roll_back", Action.ROLL_BACK)):
        verdict = filled(monkeypatch, on_nonfinite=name, on_spike="warn").judge(17, lm_loss, grad_norm)
        assert verdict.action is action
        assert not verdict.is_applied
        assert verdict.is_accepted == (name == "skip")


@pytest.mark.parametrize(("lm_loss", "grad_norm"), [(6.0, 1.0), (3.0, 50.0)])
def test_a_spike_of_loss_or_gradient_follows_its_policy(
    monkeypatch: pytest.MonkeyPatch, lm_loss: float, grad_norm: float
) -> None:
    for name, action in (("warn", Action.WARN), ("stop", Action.STOP), ("skip", Action.SKIP), ("roll_back", Action.ROLL_BACK)):
        verdict = filled(monkeypatch, on_nonfinite="stop", on_spike=name).judge(17, lm_loss, grad_norm)
        assert verdict.action is action
        assert verdict.score is not None
        assert verdict.score > 8
    assert filled(monkeypatch, on_spike="stop").judge(17, 3.2, 1.0).action is Action.UPDATE


def test_only_skips_in_a_row_count_towards_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    made = filled(monkeypatch, on_nonfinite="skip", max_skips=2)
    losses = [math.nan, 3.0, math.nan, math.nan, math.nan]
    actions = [made.judge(17 + number, loss, 1.0).action for number, loss in enumerate(losses)]
    assert actions == [Action.SKIP, Action.UPDATE, Action.SKIP, Action.SKIP, Action.STOP]


def test_a_spike_begins_with_the_first_half_spike_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    made = filled(monkeypatch)
    made.resume_from([PastStep(number, 3.0, 1.0, score, False) for number, score in ((7, 5.0), (8, 1.0), (9, 4.5), (10, 6.0))])
    assert made.spike_start(11) == 9
    assert made.spike_start(13) == 13  # 12 is unknown: it was skipped


def test_ranks_that_disagree_take_the_strictest(monkeypatch: pytest.MonkeyPatch) -> None:
    made = filled(monkeypatch, on_spike="skip")
    monkeypatch.setattr(step_policy.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(step_policy.dist, "all_reduce", lambda action, op: action.fill_(int(Action.SKIP)))
    verdict = made.judge(17, 3.0, 1.0)
    assert verdict.action is Action.SKIP
    assert made.past[-1].skipped

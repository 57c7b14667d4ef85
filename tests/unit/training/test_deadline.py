"""A run exits before the job's end, or after a set time, with time for one more step as long as the longest so far."""

from collections.abc import Callable

import pytest

from megatron_ledom.config.schema import TrainConfig
from megatron_ledom.errors import UsageError
from megatron_ledom.training import resilience
from megatron_ledom.training.resilience import Deadline, find_deadline


class Clock:
    """A clock that the test sets, and a job that ends at a time on it."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.job_end: float | None = None
        self.num_queries = 0

    def job_left(self) -> float | None:
        self.num_queries += 1
        return None if self.job_end is None else self.job_end - self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(resilience.time, "monotonic", lambda: clock.now)
    monkeypatch.setattr(resilience, "seconds_until_job_end", clock.job_left)
    return clock


def seconds_trained(
    clock: Clock, deadline: Deadline, step_seconds: Callable[[int], float] = lambda _: 10, seconds_to_save: float = 0
) -> float:
    """Take steps until the deadline is reached; return the seconds that they took."""
    began = clock.now
    for step in range(20_000):
        clock.now += step_seconds(step)
        if deadline.reached(seconds_to_save):
            return clock.now - began
    raise AssertionError("the deadline never came")


def train_config(**keys: int) -> TrainConfig:
    return TrainConfig(train_iters=1, global_batch_size=1, **keys)


@pytest.mark.parametrize(
    ("job_seconds", "keys", "trained"),
    [
        (48 * 3600, {}, 48 * 3600 - 600 - 10),  # the margin is 600 s, and a step of 10 s would end too late
        (1000, {}, 1000 - 100 - 10),
        (1000, {"exit_before_limit_seconds": 305}, 690),
        (1000, {"exit_before_limit_seconds": 0, "exit_duration_seconds": 500}, 490),
        (1000, {"exit_duration_seconds": 500}, 490),
        (None, {"exit_duration_seconds": 500}, 490),
        (1000, {"exit_duration_seconds": 5000}, 890),
    ],
)
def test_last_step_ends_before_the_deadline(
    clock: Clock, job_seconds: int | None, keys: dict[str, int], trained: float
) -> None:
    clock.job_end = job_seconds and clock.now + job_seconds
    assert seconds_trained(clock, find_deadline(train_config(**keys))) == trained


def test_a_step_that_once_took_long_may_do_so_again(clock: Clock) -> None:
    """It may have had a save or a validation. The first step, which compiles and warms up, does not count."""
    clock.job_end = clock.now + 1000
    steps = {0: 500.0, 3: 90.0}
    deadline = find_deadline(train_config(exit_before_limit_seconds=100))
    assert seconds_trained(clock, deadline, lambda step: steps.get(step, 10.0)) == 810


def test_a_run_waits_for_an_asynchronous_save_at_the_end(clock: Clock) -> None:
    """An asynchronous save does not lengthen the steps, so its time is added."""
    clock.job_end = clock.now + 1000
    deadline = find_deadline(train_config(exit_before_limit_seconds=100))
    assert seconds_trained(clock, deadline, seconds_to_save=200) == 1000 - 100 - 200 - 10
    assert "and saving 200.0 s" in deadline.describe()


def test_without_a_limit_a_run_never_exits(clock: Clock) -> None:
    for keys in ({}, {"exit_before_limit_seconds": 60}):
        deadline = find_deadline(train_config(**keys))
        clock.now += 1e9
        assert not deadline.reached(1.0)


def test_an_extended_limit_is_used_and_slurm_is_not_queried_at_every_step(clock: Clock) -> None:
    clock.job_end = clock.now + 1000
    deadline = find_deadline(train_config(exit_before_limit_seconds=100))
    clock.job_end += 1000
    assert seconds_trained(clock, deadline) == 1890
    assert clock.num_queries < 6


def test_slurm_that_does_not_answer_at_the_end_does_not_extend_the_limit(clock: Clock) -> None:
    clock.job_end = clock.now + 1000
    deadline = find_deadline(train_config(exit_before_limit_seconds=100, exit_duration_seconds=5000))
    clock.job_end = None
    assert seconds_trained(clock, deadline) == 890


def test_a_job_shorter_than_its_margin_is_refused(clock: Clock) -> None:
    clock.job_end = clock.now + 300
    with pytest.raises(UsageError, match=r"train.exit_before_limit_seconds=600, but SLURM ends this job in 300 s;"):
        find_deadline(train_config(exit_before_limit_seconds=600))

"""The check of the planner fails for a plan that is clearly wrong, and names the part."""

import math

import pytest

from megatron_ledom.hardware_check.planner import KERNEL_ERROR, MEMORY_FACTOR, STEP_FACTOR, judge


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_a_plan_that_is_a_little_off_is_accepted(device: str) -> None:
    """Errors of published runs, a layer's bytes and the fit are about 5 %, 1 % and 20 %."""
    assert judge(device, step_ratio=0.95, kernel_error=0.2, memory_ratio=1.01) == []
    assert judge(device, step_ratio=1.06, kernel_error=0.2, memory_ratio=None) == []


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("wrong", [100.0, math.nan, math.inf])
@pytest.mark.parametrize(
    ("part", "named"),
    [
        ("step_ratio", "the planned time of a step is"),
        ("memory_ratio", "the planned memory is"),
        ("kernel_error", "kernels that the fit has not seen are"),
    ],
)
def test_a_wrong_plan_is_named(device: str, wrong: float, part: str, named: str) -> None:
    right = {"step_ratio": 1.0, "kernel_error": 0.1, "memory_ratio": 1.0}
    problems = judge(device, **{**right, part: wrong})
    assert len(problems) == 1
    assert problems[0].startswith(named)


@pytest.mark.parametrize(
    ("device", "plan"),
    [
        ("cuda", {"step_ratio": 1.6}),
        ("cuda", {"step_ratio": 0.6}),
        ("cuda", {"memory_ratio": 1.3}),
        ("cuda", {"memory_ratio": 0.75}),
        ("cuda", {"kernel_error": 0.6}),
        ("cpu", {"step_ratio": 11.0}),
        ("cpu", {"step_ratio": 0.09}),
        ("cpu", {"kernel_error": 10.5}),
    ],
)
def test_each_tolerance_has_two_sides_and_is_narrower_on_a_gpu(device: str, plan: dict[str, float]) -> None:
    assert len(judge(device, **{"step_ratio": 1.0, "kernel_error": 0.1, "memory_ratio": 1.0, **plan})) == 1
    assert STEP_FACTOR["cuda"] < STEP_FACTOR["cpu"]
    assert KERNEL_ERROR["cuda"] < KERNEL_ERROR["cpu"]


def test_all_wrong_parts_are_named() -> None:
    problems = judge("cuda", step_ratio=3, kernel_error=2, memory_ratio=0.5)
    assert len(problems) == 3
    assert "the planned memory is 0.50 of the measured one (allowed 0.80 to 1.25)" in problems
    assert MEMORY_FACTOR == 1.25

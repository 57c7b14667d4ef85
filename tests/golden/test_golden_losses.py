"""A refactor keeps these losses; a commit that changes the numbers updates them and says why.

The CPU that recorded them reproduces them bit for bit. Other CPUs add in another order (other vector widths, other matrix
kernels), so the test allows a relative difference of 1e-5; a real change of the mathematics is far larger.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from megatron_ledom.hardware_check import golden
from megatron_ledom.hardware_check.check import Status
from megatron_ledom.hardware_check.curves import Difference
from tests.golden.record import LOSSES, golden_run, hardware_check_run
from tests.support.tiny_runs import Record, TinyData

TOLERANCE = 1e-5


def check_steps(found: Sequence[Record], expected: Sequence[Record]) -> None:
    """Compare every step with the recorded one."""
    assert [record["iteration"] for record in found] == [record["iteration"] for record in expected] == list(range(1, 11))
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        assert one["lm_loss"] == pytest.approx(other["lm_loss"], rel=TOLERANCE)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=10 * TOLERANCE)
        assert one.get("validation", []) == pytest.approx(other.get("validation", []), rel=TOLERANCE)


def test_losses_equal_the_recorded_ones(data: TinyData, tmp_path: Path) -> None:
    found = golden_run(data, tmp_path)
    check_steps(found, json.loads(LOSSES.read_text()))
    assert [record["iteration"] for record in found if "validation" in record] == [5, 10]


def test_losses_of_the_hardware_check_equal_the_recorded_ones(tmp_path: Path) -> None:
    found, record = hardware_check_run(tmp_path / "run"), golden.recorded()
    assert found.data_sha256 == record.data_sha256
    check_steps(found.steps, record.steps)
    assert Difference(TOLERANCE, 10 * TOLERANCE) == golden.RECORD_TOLERANCE
    assert golden.judge(found, {"torch": found.steps}, record, "cuda").status is Status.PASSED

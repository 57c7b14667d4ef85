"""A refactor keeps these losses; a commit that changes the numbers updates them and says why.

The CPU that recorded them reproduces them bit for bit. Other CPUs add in another order (other vector widths, other matrix
kernels), so the test allows a relative difference of 1e-5; a real change of the mathematics is far larger.
"""

import json
from pathlib import Path

import pytest

from tests.golden.record import LOSSES, golden_run
from tests.support.tiny_runs import TinyData

TOLERANCE = 1e-5


def test_losses_equal_the_recorded_ones(data: TinyData, tmp_path: Path) -> None:
    found, expected = golden_run(data, tmp_path), json.loads(LOSSES.read_text())
    assert [record["iteration"] for record in found] == [record["iteration"] for record in expected] == list(range(1, 11))
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        assert one["lm_loss"] == pytest.approx(other["lm_loss"], rel=TOLERANCE)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=10 * TOLERANCE)
        assert one.get("validation", []) == pytest.approx(other.get("validation", []), rel=TOLERANCE)
    assert [record["iteration"] for record in found if "validation" in record] == [5, 10]

"""Ranks send the bytes that the formulas of the communication benchmark compute: nothing is sent twice."""

from pathlib import Path

import pytest

from tests.benchmarks.bench_communication import TOLERANCE, measure
from tests.support.tiny_runs import TinyData


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_ranks_send_what_the_formulas_say(data: TinyData, tmp_path: Path, dtype: str) -> None:
    for name, (counted, computed) in measure(data, tmp_path, dtype).items():
        assert counted == pytest.approx(computed, rel=TOLERANCE), name

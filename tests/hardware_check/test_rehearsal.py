"""A rehearsal of `ledom check-hardware` on the CPU: the same code as on GPUs, with small sizes."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from megatron_ledom.hardware_check.catalogue import CHECKS
from megatron_ledom.hardware_check.runner import Request, limit_of
from tests.support.paths import ROOT

MINUTES = 15
"""Wider than the default, because a suite may run beside this test: at a load of ten on two cores the checks took 633 s.
With two free cores they need two minutes, and the test then compares them with the default limits."""
BUSY = 1.5
"""Load for each core, above which seconds say nothing of the checks: this test has 1, and one more program on two cores has 0.5."""
NEED_A_MACHINE = {"nodes", "transformer_engine", "fp8"}
"""Checks that a CPU skips."""


def late_checks(seconds: Sequence[float]) -> list[str]:
    """Return the checks that the default limits would end."""
    left, found = 60 * Request(output="").minutes, []
    for index, (check, taken) in enumerate(zip(CHECKS, seconds, strict=True)):
        if taken > limit_of(CHECKS, index, left):
            found.append(check.name)
        left -= taken
    return found


def test_late_checks_are_found() -> None:
    seconds = dict.fromkeys((check.name for check in CHECKS), 5.0)
    assert late_checks(list(seconds.values())) == []
    assert late_checks(list({**seconds, "kernels": 60.0}.values())) == ["kernels"]
    assert late_checks([40.0] * len(CHECKS)) != []


@pytest.mark.parametrize("starts", [pytest.param("real", marks=pytest.mark.slow), "forked"])
def test_all_checks_pass_on_a_cpu_or_are_skipped_with_a_reason(tmp_path: Path, python: Path, starts: str) -> None:
    """With forks, the times that are compared with the default limits lack the imports of thirty processes."""
    output = tmp_path / "rehearsal"
    command = ["tools/check_hardware.py", "--device", "cpu", "--minutes", str(MINUTES), "--output", str(output)]
    done = subprocess.run(
        [python if starts == "forked" else sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((output / "report.json").read_text())
    checks = {check["name"]: check for check in report["checks"]}
    assert list(checks) == [check.name for check in CHECKS]
    assert report["is_complete"]
    load = max(os.getloadavg()[:2]) / len(os.sched_getaffinity(0))
    assert load > BUSY or late_checks([check["seconds"] for check in report["checks"]]) == []
    assert {name for name, check in checks.items() if check["status"] == "skipped"} <= NEED_A_MACHINE
    assert all(check["reason"] for check in checks.values())
    assert report["machine"]["device"] == "cpu"
    assert max(row["error_by_tolerance"] for row in checks["kernels"]["numbers"]["errors"]) <= 1
    assert checks["bandwidth"]["numbers"]["copy_gb_per_second"] > 0
    mfu = checks["speed"]["numbers"]["mfu"]
    assert mfu > 0
    assert load > BUSY or mfu < 1  # other programs may take the cores while the peak is measured
    assert checks["speed"]["numbers"]["last_loss"] < checks["speed"]["numbers"]["first_loss"]
    assert checks["golden"]["numbers"]["data_of_the_record"]
    planner = checks["planner"]["numbers"]
    assert planner["planned_step_seconds"] > 0
    assert 0 < planner["collective_efficiency"] <= 1
    assert all(row["seconds"] > 0 and row["planned_seconds"] > 0 for row in planner["collectives"])
    assert "all-reduces of 2 ranks reach" in checks["planner"]["reason"]
    assert f"{report['passed']} passed, 0 failed" in done.stdout
    assert str(tmp_path) not in (output / "report.md").read_text()

"""A rehearsal of `ledom check-hardware` on the CPU: the same code as on GPUs, with small sizes."""

import json
import subprocess
import sys
from pathlib import Path

from megatron_ledom.hardware_check.catalogue import CHECKS
from tests.support.paths import ROOT

MOST_SECONDS = 480
"""The default limits hold: with two free cores the checks need two minutes, and beside other programs several."""
NEED_A_MACHINE = {"nodes", "transformer_engine", "fp8"}
"""Checks that a CPU skips."""


def test_all_checks_pass_on_a_cpu_or_are_skipped_with_a_reason(tmp_path: Path) -> None:
    output = tmp_path / "rehearsal"
    command = ["tools/check_hardware.py", "--device", "cpu", "--output", str(output)]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((output / "report.json").read_text())
    checks = {check["name"]: check for check in report["checks"]}
    assert list(checks) == [check.name for check in CHECKS]
    assert report["is_complete"]
    assert 60 * report["minutes"] == MOST_SECONDS
    assert sum(check["seconds"] for check in report["checks"]) < MOST_SECONDS
    assert {name for name, check in checks.items() if check["status"] == "skipped"} <= NEED_A_MACHINE
    assert all(check["reason"] for check in checks.values())
    assert report["machine"]["device"] == "cpu"
    assert max(row["error_by_tolerance"] for row in checks["kernels"]["numbers"]["errors"]) <= 1
    assert checks["bandwidth"]["numbers"]["copy_gb_per_second"] > 0
    assert 0 < checks["speed"]["numbers"]["mfu"] < 1
    assert checks["speed"]["numbers"]["last_loss"] < checks["speed"]["numbers"]["first_loss"]
    assert checks["golden"]["numbers"]["data_of_the_record"]
    planner = checks["planner"]["numbers"]
    assert planner["planned_step_seconds"] > 0
    assert 0 < planner["collective_efficiency"] <= 1
    assert all(row["seconds"] > 0 and row["planned_seconds"] > 0 for row in planner["collectives"])
    assert "all-reduces of 2 ranks reach" in checks["planner"]["reason"]
    assert f"{report['passed']} passed, 0 failed" in done.stdout
    assert str(tmp_path) not in (output / "report.md").read_text()

"""Every command line has the same results on small inputs as when the reference was recorded; see `record.py`."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.inventory.commands import STEPS
from tests.inventory.compare import differences
from tests.inventory.record import REFERENCE, ROOT, record_all

Record = dict[str, Any]


@pytest.fixture(scope="session")
def reference() -> Record:
    """The recorded results."""
    kept: Record = json.loads(REFERENCE.read_text("utf-8"))
    return kept


@pytest.fixture(scope="session")
def found(request: pytest.FixtureRequest, python: Path) -> Record:
    """Results of the commands now. The steps of the selected tests run once, with their needs, before the first comparison."""
    here = [item for item in request.session.items if item.path == Path(__file__) and hasattr(item, "callspec")]
    selected = [item.callspec.params["step"].name for item in here]
    checkout = Path(os.environ.get("LEDOM_INVENTORY_CHECKOUT", ROOT))
    chosen = os.environ.get("LEDOM_INVENTORY_PYTHON", python if checkout == ROOT else sys.executable)
    made, _ = record_all(checkout, Path(chosen), selected)
    again: Record = json.loads(json.dumps(made))
    return again


def test_the_reference_has_every_step(reference: Record) -> None:
    assert {name: step["command"] for name, step in reference["steps"].items()} == {step.name: step.command for step in STEPS}


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)
def test_a_command_has_the_recorded_results(step: Any, reference: Record, found: Record) -> None:
    is_exact = not step.is_computed or reference["machine"] == found["machine"]
    tolerance = 0.0 if is_exact else step.tolerance
    lines = differences(reference["steps"][step.name], found["steps"][step.name], tolerance=tolerance)
    assert not lines, f"{step.name} ({step.command}):\n" + "\n".join(lines)

"""No kernel reads or writes outside its tensors and shared memory, none has undefined behaviour, none a data race."""

from pathlib import Path

import pytest
import torch

from tests.kernels.build import op_names
from tests.kernels.catalogue import is_slow, op_module
from tests.kernels.emulator import SCHEDULES
from tests.kernels.sanitized import SANITIZERS, run_sanitized


@pytest.mark.parametrize("sanitizer", SANITIZERS)
@pytest.mark.parametrize("op", op_names())
def test_kernels_are_clean_under_the_sanitizer(op: str, sanitizer: str, tmp_path: Path) -> None:
    cases = [make(torch.bfloat16) for name, make in op_module(op).CASES.items() if not is_slow(op, name)]
    assert run_sanitized(op, cases, sanitizer, 7, tmp_path) == ""


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("sanitizer", SANITIZERS)
@pytest.mark.parametrize("op", op_names())
def test_all_cases_are_clean_under_the_sanitizer(op: str, sanitizer: str, schedule: int, tmp_path: Path) -> None:
    cases = [make(torch.bfloat16) for make in op_module(op).CASES.values()]
    assert run_sanitized(op, cases, sanitizer, schedule, tmp_path) == ""

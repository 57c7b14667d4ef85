"""Every case of every kernel, in all types, under three schedules of the emulator, against float64 torch."""

import pytest
import torch

from tests.kernels.cases import check_outputs
from tests.kernels.catalogue import DTYPES, case_names, op_module
from tests.kernels.emulator import SCHEDULES, run_emulated


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("op", "name"), case_names())
def test_emulated_kernel_is_within_its_bound_and_the_same_under_every_schedule(op: str, name: str, dtype: torch.dtype) -> None:
    case = op_module(op).CASES[name](dtype)
    runs = [run_emulated(op, case, schedule) for schedule in SCHEDULES]
    check_outputs(case, runs[0])
    for outputs in runs[1:]:
        for output, found in outputs.items():
            assert torch.equal(found.view(torch.uint8), runs[0][output].view(torch.uint8)), output

"""The compiled kernels and host code give the expected results: the real library over a runtime that interprets its PTX."""

import pytest
import torch

from tests.kernels.build import nvcc
from tests.kernels.cases import check_outputs
from tests.kernels.catalogue import DTYPES, marked_cases, op_module
from tests.kernels.interpreter import run_interpreted

pytestmark = pytest.mark.skipif(nvcc() is None, reason="no nvcc: install a CUDA toolkit, or set CUDA_HOME")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("op", "name"), marked_cases())
def test_compiled_kernel_is_within_its_bound_and_moves_the_bytes_that_its_formula_says(
    op: str, name: str, dtype: torch.dtype
) -> None:
    case = op_module(op).CASES[name](dtype)
    outputs, traffic = run_interpreted(op, case)
    check_outputs(case, outputs)
    if "documents" not in name:  # the search for their beginning has a number of steps that no formula gives
        moved = op_module(op).moved(case.function, case.arguments)
        assert (traffic.read, traffic.written) == (moved.read, moved.written)

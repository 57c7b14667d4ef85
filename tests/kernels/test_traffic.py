"""The table of bytes moved in csrc/README.md is what the kernels do: its formulas agree with what the interpreter counts."""

import pytest
import torch

from tests.kernels.build import nvcc, op_names
from tests.kernels.catalogue import case_names, is_slow, op_module
from tests.kernels.interpreter import run_interpreted
from tests.kernels.traffic import README, with_table

GOAL = 1.1


def counted_cases() -> list[tuple[str, str]]:
    """A document's beginning is searched for, in a number of steps that no formula tells."""
    return [(op, name) for op, name in case_names() if not is_slow(op, name) and "documents" not in name]


@pytest.mark.skipif(nvcc() is None, reason="no nvcc: install a CUDA toolkit, or set CUDA_HOME")
@pytest.mark.parametrize(("op", "name"), counted_cases())
def test_formula_agrees_with_the_bytes_that_the_interpreter_counts(op: str, name: str) -> None:
    case = op_module(op).CASES[name](torch.bfloat16)
    _, traffic = run_interpreted(op, case)
    moved = op_module(op).moved(case.function, case.arguments)
    assert (traffic.read, traffic.written) == (moved.read, moved.written)


@pytest.mark.parametrize("op", op_names())
def test_real_shapes_move_little_more_than_they_must(op: str) -> None:
    for row in op_module(op).TRAFFIC_ROWS:
        ratio = op_module(op).moved(row.function, row.arguments).ratio
        assert ratio >= 1.0
        assert ratio <= GOAL or row.why, row.label


def test_table_in_the_readme_is_current() -> None:
    text = README.read_text(encoding="utf-8")
    assert with_table(text) == text, "run python -m tests.kernels.traffic"

"""The table of bytes moved in csrc/README.md is current; test_compiled_code.py compares its formulas with the interpreter."""

import pytest

from tests.kernels.build import op_names
from tests.kernels.catalogue import op_module
from tests.kernels.traffic import README, with_table

GOAL = 1.1


@pytest.mark.parametrize("op", op_names())
def test_real_shapes_move_little_more_than_they_must(op: str) -> None:
    for row in op_module(op).TRAFFIC_ROWS:
        ratio = op_module(op).moved(row.function, row.arguments).ratio
        assert ratio >= 1.0
        assert ratio <= GOAL or row.why, row.label


def test_table_in_the_readme_is_current() -> None:
    text = README.read_text(encoding="utf-8")
    assert with_table(text) == text, "run python -m tests.kernels.traffic"

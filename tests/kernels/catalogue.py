"""The ops that have kernels, and the modules of tests/kernels/ops with their cases."""

from importlib import import_module
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.kernels.build import op_names

DTYPES = (torch.bfloat16, torch.float16)


def op_module(op: str) -> ModuleType:
    """Return the module with an op's cases and planted bugs; README.md lists its names."""
    return import_module(f"tests.kernels.ops.{op}")


def case_names() -> list[tuple[str, str]]:
    """Return (op, case) for every case."""
    return [(op, name) for op in op_names() for name in op_module(op).CASES]


def is_slow(op: str, name: str) -> bool:
    """Return True if the interpreter and the sanitizers run this case only in the slow suite."""
    return name.endswith(tuple(getattr(op_module(op), "SLOW_CASES", ())))


def marked_cases() -> list[Any]:
    """Return (op, case) for every case, with marks on the slow ones."""
    return [pytest.param(*pair, marks=[pytest.mark.slow] if is_slow(*pair) else []) for pair in case_names()]

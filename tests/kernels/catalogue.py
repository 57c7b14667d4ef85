"""The ops that have kernels, and the module of tests/kernels/ops that has each one's cases."""

from importlib import import_module
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.kernels.build import op_names

DTYPES = (torch.bfloat16, torch.float16)


def op_module(op: str) -> ModuleType:
    """Its cases, planted bugs, and what its machine code may hold; README.md says which names."""
    return import_module(f"tests.kernels.ops.{op}")


def case_names() -> list[tuple[str, str]]:
    """(op, case) for every case."""
    return [(op, name) for op in op_names() for name in op_module(op).CASES]


def is_slow(op: str, name: str) -> bool:
    """Whether the interpreter and the sanitizers take this case in the slow suite only."""
    return name.endswith(tuple(getattr(op_module(op), "SLOW_CASES", ())))


def marked_cases() -> list[Any]:
    """(op, case) for every case, the slow ones marked."""
    return [pytest.param(*pair, marks=[pytest.mark.slow] if is_slow(*pair) else []) for pair in case_names()]

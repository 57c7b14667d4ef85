"""The cases catch planted bugs on the emulator, so the tests can fail; a kernel without a bug passes them."""

from pathlib import Path
from typing import Any

import pytest

from tests.kernels.build import CSRC, emulated_library, op_names
from tests.kernels.catalogue import is_slow, op_module
from tests.kernels.mutants import Mutant, is_caught, plant

FEWEST = 3


def mutants() -> list[Any]:
    return [pytest.param(op, mutant, id=f"{op}-{mutant}") for op in op_names() for mutant in op_module(op).MUTANTS]


@pytest.mark.parametrize("op", op_names())
def test_every_op_has_planted_bugs_that_fit_its_source(op: str, tmp_path: Path) -> None:
    planted = op_module(op).MUTANTS
    assert len(planted) >= FEWEST
    for mutant in planted:
        assert plant(mutant, tmp_path / mutant.name.replace(" ", "_")).exists()


@pytest.mark.slow
@pytest.mark.parametrize(("op", "mutant"), mutants())
def test_planted_bug_is_caught(op: str, mutant: Mutant, tmp_path: Path) -> None:
    csrc = plant(mutant, tmp_path)
    emulated_library(op, csrc)  # it must compile to prove anything
    assert is_caught(op, op_module(op).CASES, csrc), mutant.name


@pytest.mark.slow
@pytest.mark.parametrize("op", op_names())
def test_kernel_without_a_bug_is_not_caught(op: str) -> None:
    quick = {name: make for name, make in op_module(op).CASES.items() if not is_slow(op, name)}
    assert not is_caught(op, quick, CSRC)

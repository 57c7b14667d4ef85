"""A launcher refuses unsupported calls before it launches; an empty call is success."""

import pytest
import torch

from tests.kernels.build import op_names
from tests.kernels.cases import Case, KernelError, c_arguments, pointers
from tests.kernels.catalogue import op_module
from tests.kernels.emulator import emulated, run_emulated
from tests.kernels.interface import functions


def refusals() -> list[tuple[str, str]]:
    return [(op, name) for op in op_names() for name in op_module(op).REFUSED]


def changed(op: str, name: str) -> Case:
    base, changes = op_module(op).REFUSED[name]
    case = op_module(op).CASES[base](torch.bfloat16)
    assert changes.keys() <= case.arguments.keys()
    return Case(case.function, {**case.arguments, **changes}, {}, frozenset())


@pytest.mark.parametrize(("op", "name"), refusals())
def test_launcher_refuses_what_it_cannot_do(op: str, name: str) -> None:
    with pytest.raises(KernelError, match=r"returned (1|716): $"):
        run_emulated(op, changed(op, name))


@pytest.mark.parametrize("op", op_names())
def test_launcher_refuses_pointers_off_the_16_byte_grid_and_unknown_types(op: str) -> None:
    cases = [make(torch.bfloat16) for make in op_module(op).CASES.values()]
    last_of_each = {case.function: case for case in cases}
    for name, case in last_of_each.items():
        function, call = functions(op)[name], getattr(emulated(op), name)
        addresses = {pointer: tensor.data_ptr() for pointer, tensor in pointers(case).items()}
        for pointer in addresses:
            assert call(*c_arguments(function, case, {**addresses, pointer: 2})) == 716, f"{name} {pointer}"
        if "dtype" not in case.arguments:
            continue
        case.arguments["dtype"] = 2
        assert call(*c_arguments(function, case, addresses)) == 1, f"{name} dtype"

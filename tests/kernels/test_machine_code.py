"""The machine code for three generations of GPUs uses no local memory, and all hot global accesses have 128 bits."""

import pytest

from tests.kernels.build import nvcc, op_names
from tests.kernels.catalogue import op_module
from tests.kernels.machine_code import ARCHITECTURES, MAX_REGISTERS, disassembler, kernels, short_name

pytestmark = [
    pytest.mark.skipif(nvcc() is None, reason="no nvcc: install a CUDA toolkit, or set CUDA_HOME"),
    pytest.mark.skipif(disassembler() is None, reason="no nvdisasm: pip install megatron-ledom[test]"),
]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("op", op_names())
def test_machine_code_spills_nothing_and_moves_128_bits_at_a_time(op: str, architecture: str) -> None:
    narrow_allowed: dict[str, int] = getattr(op_module(op), "NARROW_ACCESSES", {})
    found = kernels(op, architecture)
    assert found
    for symbol, kernel in found.items():
        assert (kernel.stack_bytes, kernel.spilled_bytes, kernel.local) == (0, 0, []), symbol
        assert kernel.registers <= MAX_REGISTERS, symbol
        assert kernel.wide > 0, symbol
        assert len(kernel.narrow) <= narrow_allowed.get(short_name(symbol), 0), f"{symbol}: {kernel.narrow}"

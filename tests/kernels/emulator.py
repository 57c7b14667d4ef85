"""Runs cases on the CPU emulator: the source of kernels and launchers, compiled as C++ (csrc/emulation)."""

import ctypes
from functools import cache
from pathlib import Path

import torch

from tests.kernels.build import CSRC, emulated_library
from tests.kernels.cases import Case, KernelError, c_arguments, pointers
from tests.kernels.interface import functions, load

SCHEDULES = (0, 1, 7)
"""First to last, last to first, shuffled with this seed."""
GUARD_BYTES = 256
FILL = 0xFF  # NaN in every type: reads outside a tensor return it


class Guarded:
    """A copy of a tensor between guard bytes, at an address that is a multiple of 16."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.bytes = tensor.numel() * tensor.element_size()
        self.memory = torch.full((self.bytes + 2 * GUARD_BYTES + 16,), FILL, dtype=torch.uint8)
        self.offset = GUARD_BYTES + -(self.memory.data_ptr() + GUARD_BYTES) % 16
        inside = self.memory[self.offset : self.offset + self.bytes]
        self.tensor = inside.view(tensor.dtype).view(tensor.shape) if self.bytes else tensor
        self.tensor.copy_(tensor)
        self.before = inside.clone()

    def check(self, name: str, may_change: bool) -> None:
        """Raise KernelError if the call wrote outside the tensor, or into one that it must only read."""
        inside = slice(self.offset, self.offset + self.bytes)
        around = torch.cat((self.memory[: inside.start], self.memory[inside.stop :]))
        if not (around == FILL).all():
            raise KernelError(f"wrote outside of {name}")
        if not may_change and not torch.equal(self.memory[inside], self.before):
            raise KernelError(f"wrote into {name}, which it must only read")


@cache
def emulated(op: str, csrc: Path = CSRC) -> ctypes.CDLL:
    """Return the op's library for the emulator."""
    library = load(emulated_library(op, csrc), op, csrc)
    library.ledom_emulation_error.restype = ctypes.c_char_p
    library.ledom_emulation_set_schedule.argtypes = [ctypes.c_int]
    return library


def run_emulated(op: str, case: Case, schedule: int = 0, csrc: Path = CSRC) -> dict[str, torch.Tensor]:
    """Return the case's outputs. Raises KernelError for an error code, an error found by the emulator, or a forbidden write."""
    library, function = emulated(op, csrc), functions(op, csrc)[case.function]
    library.ledom_emulation_set_schedule(schedule)
    tensors = pointers(case)
    by_identity = {id(tensor): Guarded(tensor) for tensor in tensors.values()}
    guarded = {name: by_identity[id(tensor)] for name, tensor in tensors.items()}
    addresses = {name: copy.tensor.data_ptr() for name, copy in guarded.items()}
    code = getattr(library, case.function)(*c_arguments(function, case, addresses))
    if code:
        raise KernelError(f"{case.function} returned {code}: {library.ledom_emulation_error().decode()}")
    written = {id(guarded[name]) for name in (*case.expected, *case.scratch)}
    for name, copy in guarded.items():
        copy.check(name, id(copy) in written)
    return {name: guarded[name].tensor.clone() for name in case.expected}

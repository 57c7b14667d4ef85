"""Runs cases on the output of nvcc: the real host code, with kernels interpreted from the PTX (ptx_machine.py)."""

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch

from tests.kernels.build import CSRC, library_without_gpu, ptx
from tests.kernels.cases import Case, KernelError, c_arguments, pointers
from tests.kernels.emulator import Guarded
from tests.kernels.interface import functions, load
from tests.kernels.ptx_machine import Region, Traffic, run_grid
from tests.kernels.ptx_program import Program, PtxError, read_program

FAILED = 999
CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint), ctypes.POINTER(ctypes.c_void_p))


class InterpretedLibrary:
    """An op's library; `regions` are the tensors that the current call may access."""

    def __init__(self, op: str, csrc: Path) -> None:
        self.library = load(library_without_gpu(op, csrc), op, csrc)
        self.text = ptx(op, csrc).read_text(encoding="utf-8")
        self.programs: dict[str, Program] = {}
        self.regions: list[Region] = []
        self.traffic = Traffic()
        self.error = ""
        self.callback = CALLBACK(self.launch)
        self.library.set_launch_callback(self.callback)

    def launch(self, name: bytes, sizes: Any, arguments: Any) -> int:
        """Run a launch in place of a GPU; called by the runtime."""
        try:
            program = self.program(name.decode())
            space = bytearray(program.parameter_bytes)
            for i, parameter in enumerate(program.parameters):
                space[parameter.offset : parameter.offset + parameter.size] = ctypes.string_at(arguments[i], parameter.size)
            found = run_grid(program, tuple(sizes[0:3]), tuple(sizes[3:6]), bytes(space), self.regions)
        except PtxError as error:
            self.error = str(error)
            return FAILED
        self.traffic.read += found.read
        self.traffic.written += found.written
        return 0

    def program(self, name: str) -> Program:
        """Return the kernel of this mangled name."""
        if name not in self.programs:
            self.programs[name] = read_program(self.text, name)
        return self.programs[name]


@cache
def interpreted_library(op: str, csrc: Path = CSRC) -> InterpretedLibrary:
    """Return the op's library, loaded once."""
    return InterpretedLibrary(op, csrc)


def run_interpreted(op: str, case: Case, csrc: Path = CSRC) -> tuple[dict[str, torch.Tensor], Traffic]:
    """Return the case's outputs and the bytes that its launches moved. Raises KernelError for an error code or an error."""
    runner, function = interpreted_library(op, csrc), functions(op, csrc)[case.function]
    tensors = pointers(case)
    by_identity = {id(tensor): Guarded(tensor) for tensor in tensors.values()}
    guarded = {name: by_identity[id(tensor)] for name, tensor in tensors.items()}
    addresses = {name: copy.tensor.data_ptr() for name, copy in guarded.items()}
    runner.regions = [
        Region(copy.tensor.data_ptr(), copy.memory[copy.offset : copy.offset + copy.bytes].numpy())
        for copy in by_identity.values()
        if copy.bytes
    ]
    runner.traffic, runner.error = Traffic(), ""
    code = getattr(runner.library, case.function)(*c_arguments(function, case, addresses))
    if code:
        raise KernelError(f"{case.function} returned {code}: {runner.error}")
    written = {id(guarded[name]) for name in (*case.expected, *case.scratch)}
    for name, copy in guarded.items():
        copy.check(name, id(copy) in written)
    return {name: guarded[name].tensor.clone() for name in case.expected}, runner.traffic

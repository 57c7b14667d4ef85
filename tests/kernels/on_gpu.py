"""Runs an op's cases on a GPU, with the launchers as built by nvcc for this machine.

python -m tests.kernels.on_gpu OP      prints a line for each wrong case; exit code 1 if there is one
"""

import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch

from tests.kernels.build import CSRC, GPU_FLAGS, compiled, gpu_compiler
from tests.kernels.cases import Case, KernelError, c_arguments, check_outputs, pointers
from tests.kernels.catalogue import DTYPES, op_module
from tests.kernels.interface import functions, load


@cache
def gpu_library(op: str, csrc: Path = CSRC) -> Any:
    """Return the op's launchers, built for the GPU of this machine."""
    command = [gpu_compiler(), *GPU_FLAGS, "-arch=native", "-Xcompiler=-fPIC,-fvisibility=hidden", "-shared"]
    return load(compiled(f"{op}-gpu.so", command, [csrc / op / f"{op}.cu"], csrc), op, csrc)


def run_on_gpu(op: str, case: Case) -> dict[str, torch.Tensor]:
    """Return the case's outputs, on the CPU. Raises KernelError for an error code."""
    tensors = pointers(case)
    by_identity = {id(tensor): tensor.cuda() for tensor in tensors.values()}
    copies = {name: by_identity[id(tensor)] for name, tensor in tensors.items()}
    addresses = {name: copy.data_ptr() for name, copy in copies.items()}
    torch.cuda.synchronize()
    code = getattr(gpu_library(op), case.function)(*c_arguments(functions(op)[case.function], case, addresses))
    if code:
        raise KernelError(f"{case.function} returned {code}")
    torch.cuda.synchronize()
    return {name: copies[name].cpu() for name in case.expected}


def problems(op: str) -> list[str]:
    """Return the problems: an exceeded bound, an error, or two runs that differ in a bit."""
    found = []
    for name, make in op_module(op).CASES.items():
        for dtype in DTYPES:
            case = make(dtype)
            try:
                first, second = run_on_gpu(op, case), run_on_gpu(op, case)
                check_outputs(case, first)
                for output in first:
                    assert torch.equal(first[output].view(torch.uint8), second[output].view(torch.uint8)), f"{output} differs"
            except (AssertionError, KernelError) as error:
                found.append(f"{name} {dtype}: {error}")
    return found


if __name__ == "__main__":
    wrong = problems(sys.argv[1])
    print("\n".join(wrong))
    raise SystemExit(bool(wrong))

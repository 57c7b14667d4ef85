"""Loads the compiled CPU operators of csrc/cpu_ops, or finds the reason why they cannot be used."""

import ctypes
import functools
import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class CpuOps:
    """The extension module, and a line for the log."""

    module: Any
    """None if it cannot be used."""
    state: str


@functools.cache
def find_cpu_ops() -> CpuOps:
    """Load the operators and let them use torch's thread pool.

    They are not used without AVX2, because they are then no faster than torch's own, nor with torch before 2.10, which does not
    share its threads.
    """
    try:
        module = importlib.import_module("megatron_ledom._cpu_ops")
    except ImportError:
        return CpuOps(None, "not built; install the package again, with a C++ compiler")
    if module.isa() == "baseline":
        return CpuOps(None, "this processor has no AVX2")
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    if not hasattr(library, "torch_parallel_for"):
        return CpuOps(None, f"torch {torch.__version__} does not share its threads (2.10 does)")
    module.use_parallel_for(ctypes.cast(library.torch_parallel_for, ctypes.c_void_p).value)
    return CpuOps(module, f"compiled for {module.isa()}")

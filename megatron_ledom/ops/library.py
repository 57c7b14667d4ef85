"""The namespace `torch.ops.ledom`: where each operator's kernels come from, and what runs on which device.

Each operator is defined in a file of its own here, with a PyTorch reference beside it. Its kernels are CUDA's (csrc, bound
through torch's stable ABI), those of csrc/cpu_ops, or none; without one the reference runs.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_ledom.platform.cpu_ops import find_cpu_ops

NAMES = ("rms_norm", "swiglu", "rope", "cross_entropy")
"""Operators that a training step may use."""
DTYPES = {"cuda": (torch.bfloat16, torch.float16), "cpu": (torch.bfloat16, torch.float32)}
"""What the kernels of a device take; fp32 stays inside."""
LIBRARY = torch.library.Library("ledom", "DEF")  # type: ignore[no-untyped-call]
Kernel = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Backend:
    """The kernels of one type of device."""

    usable: bool
    name: str
    """What the log calls it."""
    state: str
    """What is built, or why not."""


def define(schema: str, fake: Kernel, cpu: Kernel) -> None:
    """Define `ledom::name`: its schema, the shapes it gives, and what runs on CPU tensors. CUDA's kernel is in csrc/bindings."""
    name = schema.partition("(")[0]
    LIBRARY.define(schema)  # type: ignore[no-untyped-call]
    LIBRARY.impl(name, cpu, "CPU")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"ledom::{name}", fake, lib=LIBRARY)


def define_gradient(name: str, backward: Kernel, setup_context: Kernel) -> None:
    """Register the backward pass of `ledom::name`."""
    torch.library.register_autograd(f"ledom::{name}", backward, setup_context=setup_context, lib=LIBRARY)


@functools.cache
def backend(device_type: str) -> Backend:
    """What there is for `cuda` or `cpu`; CUDA's kernels are loaded by the first call."""
    if device_type == "cuda":
        return _cuda_backend()
    found = find_cpu_ops()
    return Backend(found.module is not None, "cpu", found.state)


def extension_path() -> Path:
    """Where the build puts the CUDA operators."""
    return Path(__file__).parents[1] / "_cuda_ops.so"


def _cuda_backend() -> Backend:
    if not extension_path().exists():
        return Backend(False, "cuda", "CUDA kernels not built (LEDOM_CUDA=1 pip install . says why)")
    try:
        torch.ops.load_library(str(extension_path()))  # type: ignore[no-untyped-call]
    except OSError as problem:
        return Backend(False, "cuda", f"CUDA kernels do not load: {problem}")
    return Backend(True, "cuda", "CUDA kernels loaded; not yet run on hardware by us")


def runs_kernel(*tensors: torch.Tensor) -> bool:
    """Whether these arguments go to a kernel: one device that has them, one type that they take, rows of whole 16 bytes on CUDA."""
    first = tensors[0]
    kind = first.device.type
    if kind not in DTYPES or first.dtype not in DTYPES[kind] or not backend(kind).usable:
        return False
    alike = all(tensor.dtype == first.dtype and tensor.device == first.device for tensor in tensors)
    return alike and (kind == "cpu" or all(tensor.shape[-1] % 8 == 0 for tensor in tensors))


def cpu_kernels() -> Any:
    """The module of CPU operators. Raises RuntimeError where it cannot be used."""
    found = find_cpu_ops()
    if found.module is None:
        raise RuntimeError(f"no CPU kernels: {found.state}")
    return found.module


def is_bf16(tensor: torch.Tensor) -> bool:
    """What the CPU kernels ask; every argument of a call has the type of the first. Raises TypeError for a type they lack."""
    if tensor.dtype not in DTYPES["cpu"]:
        raise TypeError(f"expected a tensor of bfloat16 or float32, found {tensor.dtype}")
    return tensor.dtype == torch.bfloat16


def check_alike(*tensors: torch.Tensor) -> None:
    """Contiguous CPU tensors of one type, which is what a kernel's addresses stand for. Raises ValueError."""
    for tensor in tensors:
        if tensor.device.type != "cpu" or not tensor.is_contiguous() or tensor.dtype != tensors[0].dtype:
            raise ValueError(f"expected contiguous CPU tensors of {tensors[0].dtype}, found {tensor.dtype} on {tensor.device}")


def check_shape(name: str, tensor: torch.Tensor, expected: tuple[int, ...]) -> None:
    """Raises ValueError."""
    if tuple(tensor.shape) != expected:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {expected}")


def describe(device: torch.device, implementation: str) -> str:
    """The one line of the log that says what runs for which operator under a choice of layers, and why."""
    there = backend(device.type) if device.type in DTYPES else Backend(False, device.type, "no kernels")
    ours = there.name if there.usable and implementation != "torch" else "torch"
    in_layers = ours if implementation == "fused" else implementation
    runs = {name: ours if name == "cross_entropy" else in_layers for name in NAMES}
    return f"ops: {' '.join(f'{name}={where}' for name, where in runs.items())} ({there.state})"

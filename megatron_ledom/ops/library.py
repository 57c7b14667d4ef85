"""The namespace `torch.ops.ledom`: the kernels of each operator, and the choice for each device.

Each operator has its own file with its PyTorch reference. Its kernels are for CUDA (csrc, bound through torch's stable ABI), for
CPUs (csrc/cpu_ops), or missing; without a kernel the reference runs.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_ledom.platform.cpu_ops import find_cpu_ops

NAMES = ("rms_norm", "swiglu", "rope", "cross_entropy")
"""Operators that `describe` lists."""
DTYPES = {"cuda": (torch.bfloat16, torch.float16), "cpu": (torch.bfloat16, torch.float32)}
"""Types that the kernels of a device accept; they compute in fp32."""
LIBRARY = torch.library.Library("ledom", "DEF")  # type: ignore[no-untyped-call]
Kernel = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Backend:
    """The kernels of one type of device."""

    usable: bool
    name: str
    """Name in the log."""
    state: str
    """State of the kernels for the log: loaded, or the reason why not."""


def define(schema: str, fake: Kernel, cpu: Kernel) -> None:
    """Define `ledom::name` by its schema, its result shapes and its CPU function. csrc/bindings has the CUDA kernel."""
    name = schema.partition("(")[0]
    LIBRARY.define(schema)  # type: ignore[no-untyped-call]
    LIBRARY.impl(name, cpu, "CPU")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"ledom::{name}", fake, lib=LIBRARY)


def define_gradient(name: str, backward: Kernel, setup_context: Kernel) -> None:
    """Register the backward pass of `ledom::name`."""
    torch.library.register_autograd(f"ledom::{name}", backward, setup_context=setup_context, lib=LIBRARY)


@functools.cache
def backend(device_type: str) -> Backend:
    """Return the kernels for `cuda` or `cpu`. The first call loads those of CUDA."""
    if device_type == "cuda":
        return _cuda_backend()
    found = find_cpu_ops()
    return Backend(found.module is not None, "cpu", found.state)


def extension_path() -> Path:
    """Return the path at which the build stores the CUDA operators."""
    return Path(__file__).parents[1] / "_cuda_ops.so"


def _cuda_backend() -> Backend:
    if not extension_path().exists():
        return Backend(False, "cuda", "CUDA kernels not built (LEDOM_CUDA=1 pip install . reports why)")
    try:
        torch.ops.load_library(str(extension_path()))  # type: ignore[no-untyped-call]
    except OSError as problem:
        return Backend(False, "cuda", f"CUDA kernels do not load: {problem}")
    return Backend(True, "cuda", "CUDA kernels loaded; not yet run on hardware by us")


def runs_kernel(*tensors: torch.Tensor) -> bool:
    """Return True if a kernel supports these arguments: one device and type, and on CUDA rows of multiples of 16 bytes."""
    first = tensors[0]
    kind = first.device.type
    if kind not in DTYPES or first.dtype not in DTYPES[kind] or not backend(kind).usable:
        return False
    alike = all(tensor.dtype == first.dtype and tensor.device == first.device for tensor in tensors)
    return alike and (kind == "cpu" or all(tensor.shape[-1] % 8 == 0 for tensor in tensors))


def cpu_kernels() -> Any:
    """Return the module of CPU operators. Raises RuntimeError if it cannot be used."""
    found = find_cpu_ops()
    if found.module is None:
        raise RuntimeError(f"no CPU kernels: {found.state}")
    return found.module


def is_bf16(tensor: torch.Tensor) -> bool:
    """Return True for bfloat16, False for float32. Raises TypeError for a type that the CPU kernels do not support."""
    if tensor.dtype not in DTYPES["cpu"]:
        raise TypeError(f"expected a tensor of bfloat16 or float32, found {tensor.dtype}")
    return tensor.dtype == torch.bfloat16


def check_alike(*tensors: torch.Tensor) -> None:
    """Raise ValueError unless all are contiguous CPU tensors of one type, as the kernels assume."""
    for tensor in tensors:
        if tensor.device.type != "cpu" or not tensor.is_contiguous() or tensor.dtype != tensors[0].dtype:
            raise ValueError(f"expected contiguous CPU tensors of {tensors[0].dtype}, found {tensor.dtype} on {tensor.device}")


def check_shape(name: str, tensor: torch.Tensor, expected: tuple[int, ...]) -> None:
    """Raise ValueError if a tensor has another shape than expected."""
    if tuple(tensor.shape) != expected:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {expected}")


def describe(device: torch.device, implementation: str) -> str:
    """Return the log line with the kernel of each operator for a choice of layers, and the reason."""
    found = backend(device.type) if device.type in DTYPES else Backend(False, device.type, "no kernels")
    ours = found.name if found.usable and implementation != "torch" else "torch"
    in_layers = ours if implementation == "fused" else implementation
    runs = {name: ours if name == "cross_entropy" else in_layers for name in NAMES}
    return f"ops: {' '.join(f'{name}={where}' for name, where in runs.items())} ({found.state})"

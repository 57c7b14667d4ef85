"""The stable-ABI binding over the emulated kernels: `torch.ops.ledom` on CPU tensors, with the code for a GPU.

`load_emulated_ops` replaces the CPU kernels of this process permanently; call it in a process of its own.
"""

from pathlib import Path

import torch

from tests.kernels.build import CSRC, compiled, emulated_library, op_names

TORCH = Path(torch.__file__).parent


def emulated_binding() -> Path:
    """Return the library of csrc/bindings over the emulated libraries of all ops."""
    include, emulated = f"-I{TORCH}/include", "-DLEDOM_EMULATED"
    flags = ["-std=c++17", "-O1", "-fPIC", "-fno-gnu-unique", emulated, include]
    sources = sorted((CSRC / "bindings").glob("*.cpp"))
    objects = [compiled(f"{source.stem}.o", ["g++", *flags, "-c"], [source]) for source in sources]
    libraries = [emulated_library(op) for op in op_names()]
    link = ["g++", "-shared", f"-L{TORCH}/lib", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu"]
    inputs = [str(path) for path in (*objects, *libraries)]  # their names contain hashes
    return compiled("emulated_binding.so", [*link[:2], *inputs, *link[2:]], [])


def load_emulated_ops() -> None:
    """Let the emulated kernels process 16-bit CPU tensors from now on, as the real ones process CUDA tensors."""
    from megatron_ledom.ops import causal_softmax, cross_entropy, library, multi_tensor, rms_norm, rope, swiglu
    from megatron_ledom.platform.cpu_ops import CpuOps

    defined = (causal_softmax, cross_entropy, multi_tensor, rms_norm, rope, swiglu)
    assert all(defined)  # the binding implements their operators
    torch.ops.load_library(str(emulated_binding()))
    library.DTYPES["cpu"] = library.DTYPES["cuda"]
    library.find_cpu_ops = lambda: CpuOps(True, "CUDA kernels on the emulator")
    library.backend.cache_clear()


def train_on_emulated_optimizer() -> None:
    """Give megatron-core the emulated kernels of AdamW, norm and clipping, as on a GPU."""
    from megatron_ledom.ops.fused_adam import FusedAdam, MultiTensorKernels
    from megatron_ledom.platform.core_fixes import install_core_fixes, use_optimizer_kernels

    load_emulated_ops()
    install_core_fixes()
    kernels = MultiTensorKernels()
    assert use_optimizer_kernels(FusedAdam, kernels.norm, kernels.scale) == "adamw=cuda norm=cuda scale=cuda"

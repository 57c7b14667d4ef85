"""Device and backend of this rank: CUDA with NCCL, or a CPU with gloo. Chosen here once; the caller logs the choice."""

import os
import time
from dataclasses import dataclass

import torch

from megatron_ledom.errors import UsageError
from megatron_ledom.platform.adam import find_apex
from megatron_ledom.platform.core_fixes import install_core_fixes
from megatron_ledom.platform.core_on_cpu import install_core_on_cpu
from megatron_ledom.platform.launch import Launch, read_launch

DENSE_BF16_TFLOPS = {
    "A100": 312.0,
    "A800": 312.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "H800": 989.0,
    "H200": 989.0,
    "GH200": 989.0,
    "B200": 2250.0,
    "L40S": 362.0,
    "A10": 125.0,
    "RTX 4090": 165.0,
}
"""Peak dense bf16 throughput stated by the maker, in 1e12 FLOP/s, by a part of the device's name."""


@dataclass(frozen=True, slots=True)
class Platform:
    """The device of this rank, its collective backend, and its number of CPU threads."""

    device: torch.device
    backend: str
    num_threads: int

    def describe(self) -> str:
        """Return a line for the log."""
        if self.device.type == "cuda":
            return f"{torch.cuda.get_device_name(self.device)} with {self.backend}, {find_apex().state}"
        return f"CPU ({self.num_threads} threads per rank) with {self.backend}, {find_apex().state}"

    def synchronize(self) -> None:
        """Wait until the device has finished, so that a time measured next is correct."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def prepare_platform(num_threads: int | None, launch: Launch | None = None) -> Platform:
    """Choose the device of this rank and patch megatron-core for it. Call before building anything of megatron-core.

    launch: the ranks of this run; by default read from the launcher's variables.
    """
    install_core_fixes()
    launch = launch or read_launch()
    threads = num_threads or max(1, len(os.sched_getaffinity(0)) // launch.local_world_size)
    torch.set_num_threads(threads)
    if torch.cuda.is_available():
        local_rank, num_devices = launch.local_rank, torch.cuda.device_count()
        if local_rank >= num_devices:
            raise UsageError(
                f"this is local rank {local_rank} of a machine with {num_devices} GPUs; launch at most {num_devices} ranks per"
                " machine, or hide the GPUs with CUDA_VISIBLE_DEVICES= to run on the CPU"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        return Platform(device, "nccl", threads)
    install_core_on_cpu()
    return Platform(torch.device("cpu"), "gloo", threads)


def peak_flops(platform: Platform, dtype: torch.dtype) -> tuple[float, str]:
    """Return the peak FLOP/s of this rank's device for matrix products of `dtype`, and the source of the number."""
    if platform.device.type == "cuda":
        name = torch.cuda.get_device_name(platform.device)
        for part in sorted(DENSE_BF16_TFLOPS, key=len, reverse=True):
            if part in name:
                return DENSE_BF16_TFLOPS[part] * 1e12, f"bf16 peak of {part}"
    return measured_matmul_flops(platform, dtype), "measured, 1024^3 matrix product"


def measured_matmul_flops(platform: Platform, dtype: torch.dtype, side: int = 1024, seconds: float = 0.25) -> float:
    """Return the best FLOP/s of repeated [side, side] matrix products within `seconds`."""
    a = torch.randn(side, side, device=platform.device).to(dtype)
    torch.mm(a, a)
    best, end = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        platform.synchronize()
        start = time.perf_counter()
        torch.mm(a, a)
        platform.synchronize()
        best = max(best, 2 * side**3 / (time.perf_counter() - start))
    return best


def preferred_params_dtype(platform: Platform) -> str:
    """Return `bf16` if this device multiplies it faster than fp32 (recent GPUs, CPUs with AMX or AVX512-BF16), else `fp32`."""
    if platform.device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    fast = measured_matmul_flops(platform, torch.bfloat16) > 1.2 * measured_matmul_flops(platform, torch.float32)
    return "bf16" if fast else "fp32"

"""Measurements of this machine for the planner: kernels of several shapes, and collectives between the launched ranks.

Efficiencies are fitted on every second shape. The other shapes show the error of the model of kernels on this machine.
"""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
import yaml

from megatron_ledom.config.schema import ParallelConfig
from megatron_ledom.parallel.groups import start_distributed, stop_distributed
from megatron_ledom.planning.hardware import Hardware, load_hardware
from megatron_ledom.planning.step_time import Group, all_reduce_seconds, flash_seconds, matmul_seconds, memory_seconds
from megatron_ledom.platform.device import Platform, measured_matmul_flops, prepare_platform
from megatron_ledom.platform.launch import Launch, read_launch
from megatron_ledom.storage.files import write_file
from megatron_ledom.storage.locks import output_file_lock

SIDES = {"cuda": (1024, 2048, 4096, 6144, 8192, 12288), "cpu": (128, 192, 256, 384, 512, 768)}
"""Rows, columns and depths of the measured matrix products."""
REPEATS = 5
DEPTHS = (16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0)
"""Values that the fit tries for `matmul_half_depth`."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """One kernel or collective: its measured seconds, and the function that plans them."""

    name: str
    seconds: float
    planned: Callable[[Hardware], float]
    is_fitted: bool

    def error(self, hardware: Hardware) -> float:
        """Return the relative error: 0.1 if the plan is ten per cent too slow."""
        return self.planned(hardware) / self.seconds - 1


def calibrate(start_from: str, output: str) -> str:
    """Measure this machine, write the hardware file `output`, and return the planner's errors as text.

    Only rank 0 writes the file and returns the text; the others return "". start_from: the hardware file that supplies
    peaks, links, prices and memory. On a CPU the peaks are measured too.
    """
    launch = read_launch()
    platform = prepare_platform(1 if launch.world_size > 1 or not torch.cuda.is_available() else None, launch)
    hardware, measurements = measure_hardware(load_hardware(start_from), platform, launch)
    if launch.rank != 0:
        return ""
    with output_file_lock(output):
        write_file(output, _yaml(hardware))
    return describe(hardware, measurements, output)


def measure_hardware(hardware: Hardware, platform: Platform, launch: Launch) -> tuple[Hardware, list[Measurement]]:
    """Return the hardware with the efficiencies measured here, and the measurements. Call on every rank.

    On a CPU the peaks are measured too.
    """
    if platform.device.type == "cpu":
        hardware = _cpu_peaks(hardware, platform)
    measurements = [*measure_products(platform), *measure_memory(platform), *measure_attention(platform)]
    if launch.world_size > 1:
        measurements += measure_between_ranks(platform, launch)
    return fit_kernels(hardware, measurements), measurements


def measure_between_ranks(platform: Platform, launch: Launch) -> list[Measurement]:
    """Connect the launched ranks, measure the collectives, and disconnect them. Call on every rank."""
    start_distributed(platform, ParallelConfig(), launch)
    measurements = measure_collectives(platform, launch.local_world_size)
    stop_distributed()
    return measurements


def _seconds(platform: Platform, run: Callable[[], Any]) -> float:
    """Return the median seconds of `REPEATS` calls after a first one."""
    run()
    found = []
    for _ in range(REPEATS):
        platform.synchronize()
        start = time.perf_counter()
        run()
        platform.synchronize()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def _cpu_peaks(hardware: Hardware, platform: Platform) -> Hardware:
    """Measure the peaks of one CPU rank: the fastest matrix product, and a copy that fits no cache."""
    large = torch.zeros(1 << 24)
    target = torch.empty_like(large)
    speed = 2 * large.nbytes / _seconds(platform, lambda: target.copy_(large)) / 1e9
    peak = measured_matmul_flops(platform, torch.bfloat16) / 1e12
    return replace(hardware, peak_tflops=peak, memory_gb_per_second=speed)


def measure_products(platform: Platform) -> list[Measurement]:
    """Measure bf16 matrix products: every pair of neighbouring sides, deep and shallow."""
    sides, found = SIDES[platform.device.type], []
    for index, (rows, columns) in enumerate(zip(sides, sides[1:] + sides[:1], strict=True)):
        for depth in (sides[0], columns):
            a, b = (torch.randn(*shape, device=platform.device).bfloat16() for shape in ((rows, depth), (depth, columns)))
            seconds = _seconds(platform, partial(torch.mm, a, b))

            def planned(hardware: Hardware, shape: tuple[int, int, int] = (rows, columns, depth)) -> float:
                return matmul_seconds(hardware, *shape)

            found.append(Measurement(f"product {rows} x {columns} x {depth}", seconds, planned, index % 2 == 0))
    return found


def measure_memory(platform: Platform) -> list[Measurement]:
    """Measure additions of bf16 tensors, which read two elements and write one."""
    found = []
    for index, exponent in enumerate((27, 26, 25) if platform.device.type == "cuda" else (24, 23, 22)):
        a = torch.randn(1 << exponent, device=platform.device).bfloat16()
        result = torch.empty_like(a)
        seconds = _seconds(platform, partial(torch.add, a, a, out=result))
        num_bytes = 2 * a.nbytes

        def planned(hardware: Hardware, num_bytes: int = num_bytes) -> float:
            return memory_seconds(hardware, num_bytes)

        found.append(Measurement(f"addition of {a.numel():,} elements", seconds, planned, index % 2 == 0))
    return found


def measure_attention(platform: Platform) -> list[Measurement]:
    """Measure causal attention without dropout, forward and backward."""
    length, heads = (8192, 16) if platform.device.type == "cuda" else (512, 2)
    shape = (1, heads, length, 128)
    q, k, v = (torch.randn(*shape, device=platform.device).bfloat16().requires_grad_() for _ in range(3))
    flops = 4.0 * length * length * heads * 128 / 2

    def forward() -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def both() -> None:
        torch.autograd.backward(forward().sum())

    ahead, whole = _seconds(platform, forward), _seconds(platform, both)
    return [
        Measurement("attention forwards", ahead, lambda hardware: flash_seconds(hardware, flops)[0], True),
        Measurement("attention backwards", max(whole - ahead, 1e-9), lambda hardware: flash_seconds(hardware, flops)[1], True),
    ]


def measure_collectives(platform: Platform, in_node: int) -> list[Measurement]:
    """Measure all-reduces between all ranks."""
    ranks, found = Group(dist.get_world_size(), min(in_node, dist.get_world_size())), []
    for index, exponent in enumerate((26, 24, 22, 18) if platform.device.type == "cuda" else (22, 20, 18, 14)):
        tensor = torch.zeros(1 << exponent, device=platform.device, dtype=torch.bfloat16)
        seconds = _seconds(platform, partial(dist.all_reduce, tensor))

        def planned(hardware: Hardware, num_bytes: int = tensor.nbytes) -> float:
            return all_reduce_seconds(hardware, ranks, num_bytes)

        found.append(Measurement(f"all-reduce of {tensor.nbytes:,} bytes", seconds, planned, index % 2 == 0))
    return found


def fit_kernels(hardware: Hardware, measurements: list[Measurement]) -> Hardware:
    """Return the hardware with fitted efficiencies and `matmul_half_depth`; those of kinds without a measurement stay.

    With these efficiencies the planned seconds of the fitted kernels are right on average. The depth is the one with which
    the errors on matrix products differ least.
    """
    kinds = {
        "product": "matmul_efficiency",
        "addition": "memory_efficiency",
        "attention forwards": "attention_efficiency",
        "attention backwards": "attention_backward_efficiency",
        "all-reduce": "collective_efficiency",
    }
    products = [one for one in measurements if one.name.startswith("product") and one.is_fitted]
    if products:
        unhindered = replace(hardware, memory_efficiency=1.0)
        half_depth = min(DEPTHS, key=lambda depth: _spread(replace(unhindered, matmul_half_depth=depth), products))
        hardware = replace(hardware, matmul_half_depth=half_depth)
    for start, key in kinds.items():
        chosen = [one for one in measurements if one.name.startswith(start) and one.is_fitted]
        if chosen:
            ideal = replace(hardware, **_only(key, 1.0))
            efficiency = math.exp(statistics.mean(math.log(one.planned(ideal) / one.seconds) for one in chosen))
            hardware = replace(hardware, **_only(key, min(max(efficiency, 1e-3), 1.0)))
    return hardware


def _only(key: str, value: float) -> dict[str, Any]:
    return {key: value}


def _spread(hardware: Hardware, measurements: list[Measurement]) -> float:
    """Return the standard deviation of log(planned / measured) over several kernels."""
    return statistics.pstdev(math.log(one.planned(hardware) / one.seconds) for one in measurements)


def describe(hardware: Hardware, measurements: list[Measurement], output: str) -> str:
    """Return a table of measured and planned seconds, then the errors on fitted and on other kernels."""
    lines = [f"{'kernel':<36}  {'measured s':>10}  {'planned s':>10}  {'error':>7}"]
    for one in measurements:
        mark = "" if one.is_fitted else "  not fitted"
        lines.append(
            f"{one.name:<36}  {one.seconds:>10.6f}  {one.planned(hardware):>10.6f}  {one.error(hardware):>+7.1%}{mark}"
        )
    for words, is_fitted in (("fitted", True), ("not fitted", False)):
        mean, largest = mean_and_largest_error(hardware, measurements, is_fitted=is_fitted)
        lines.append(f"{words}: {mean:.1%} off on average, {largest:.1%} at most")
    return "\n".join([*lines, f"{output}: ledom plan-run --hardware {output}"]) + "\n"


def mean_and_largest_error(hardware: Hardware, measurements: list[Measurement], *, is_fitted: bool) -> tuple[float, float]:
    """Return the mean and the largest relative error, without sign, on the fitted kernels or on the others."""
    found = [abs(one.error(hardware)) for one in measurements if one.is_fitted == is_fitted]
    return statistics.mean(found), max(found)


def _yaml(hardware: Hardware) -> str:
    values = {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in asdict(hardware).items()}
    values["source"] = f"measured by ledom calibrate-hardware; the other numbers are those of {hardware.name}"
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=1000)

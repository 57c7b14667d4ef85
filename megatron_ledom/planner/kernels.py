"""Seconds of one kernel or collective on given hardware: a roofline whose height depends on the shape."""

import math
from dataclasses import dataclass
from functools import cache

from megatron_ledom.planner.hardware import Hardware

TILES = ((256, 128), (128, 256), (128, 128), (256, 64), (64, 256))
"""Rows and columns of the tiles that libraries cut a product into; the smaller ones reuse less of what they load."""


@dataclass(frozen=True, slots=True)
class Group:
    """Ranks of one collective: how many, and how many of them share a node."""

    size: int
    in_node: int

    def bandwidth(self, hardware: Hardware) -> float:
        """Bytes a second of a ring: inside a node its links; between nodes the cards of all the members there."""
        inside = hardware.node_gb_per_second
        between = min(inside, hardware.network_gb_per_second * self.in_node)
        return (inside if self.size <= self.in_node else between) * hardware.collective_efficiency * 1e9


def group(size: int, stride: int, hardware: Hardware) -> Group:
    """Ranks that are `stride` apart, as megatron-core lays groups out: tensor, then context, data, pipeline."""
    return Group(size, max(1, min(size, hardware.gpus_per_node // stride)))


@cache
def shape_share(rows: int, columns: int, depth: int, multiprocessors: int, half_depth: float) -> float:
    """What of the best efficiency a product [rows, depth] x [depth, columns] can have: its tiles fill whole waves of units."""
    best = 0.0
    for high, wide in TILES:
        tiles = math.ceil(rows / high) * math.ceil(columns / wide)
        filled = (rows * columns) / (high * wide * multiprocessors * math.ceil(tiles / multiprocessors))
        reuse = (high * wide / (high + wide)) / (256 * 128 / (256 + 128))
        best = max(best, filled * reuse**0.25)
    return best * depth / (depth + half_depth)


def matmul_seconds(hardware: Hardware, rows: int, columns: int, depth: int, element_bytes: int = 2, added: int = 0) -> float:
    """A product [rows, depth] x [depth, columns]; `added`: bytes besides, such as a gradient that is read and added to."""
    share = shape_share(rows, columns, depth, hardware.multiprocessors, hardware.matmul_half_depth)
    compute = 2 * rows * columns * depth / (hardware.peak_tflops * 1e12 * hardware.matmul_efficiency * share)
    return max(compute, memory_seconds(hardware, element_bytes * (rows * depth + depth * columns + rows * columns) + added))


def memory_seconds(hardware: Hardware, num_bytes: float) -> float:
    """A kernel that is as fast as its bytes."""
    return num_bytes / (hardware.memory_gb_per_second * 1e9 * hardware.memory_efficiency)


def flash_seconds(hardware: Hardware, forward_flops: float) -> tuple[float, float]:
    """Flash attention forwards and backwards, by the FLOPs of scores and values that a causal mask leaves."""
    peak = hardware.peak_tflops * 1e12
    backward = 2.5 * forward_flops / (peak * hardware.attention_backward_efficiency)
    return forward_flops / (peak * hardware.attention_efficiency), backward


def gather_seconds(hardware: Hardware, ranks: Group, whole_bytes: float) -> float:
    """All-gather to, or reduce-scatter from, `whole_bytes` on each rank, by a ring."""
    if ranks.size == 1:
        return 0.0
    return (ranks.size - 1) * (whole_bytes / ranks.size / ranks.bandwidth(hardware) + hardware.latency_us * 1e-6)


def all_reduce_seconds(hardware: Hardware, ranks: Group, num_bytes: float) -> float:
    """All-reduce of `num_bytes`: a reduce-scatter, then an all-gather."""
    return 2 * gather_seconds(hardware, ranks, num_bytes)


def exposed(hardware: Hardware, collective: float, beside: float) -> float:
    """What of a collective is left when `beside` seconds of kernels run meanwhile."""
    return max(0.0, collective - hardware.overlap_efficiency * beside)

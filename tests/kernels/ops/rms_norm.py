"""Cases of RMSNorm. Bound: 1 ulp of the output's type, 2 for the weight's gradient; if terms cancel, also fp32's rounding.

Shape letters: R rows, H hidden, P partial sums.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from tests.kernels.cases import Case, CaseMaker, Expected, blank, values
from tests.kernels.mutants import Mutant
from tests.kernels.traffic import Moved, Row

EPS = 1e-5
FP32 = 2.0**-22
"""Rounding of a few fp32 operations, relative to the largest term."""
SHAPES = {
    "narrow": (5, 8),
    "one_warp": (7, 1024),
    "tail_of_a_block": (3, 1032),
    "2048": (6, 2048),
    "3072": (3, 3072),
    "4096": (3, 4096),
    "odd": (4, 8 * 397),
    "wider_than_registers": (2, 16392),
    "more_rows_than_blocks": (1030, 16),
    "one_row": (1, 264),
}
SLOW_CASES = {"2048", "3072", "4096", "wider_than_registers", "more_rows_than_blocks", "rows_share_a_block", "and_have_a_tail"}
"""Endings of the names of cases that run on the interpreter and the sanitizers only in the slow suite."""


def inputs(rows: int, hidden: int, dtype: torch.dtype) -> torch.Tensor:
    """Return rows, the first so small that eps counts."""
    input_RH = values(rows, hidden, dtype=dtype, seed=1)
    input_RH[0] *= 2.0**-9
    return input_RH


def forward(rows: int, hidden: int, has_residual: bool, dtype: torch.dtype) -> Case:
    """Return a case of output, and of sum with a residual."""
    input_RH, weight_H = inputs(rows, hidden, dtype), values(hidden, dtype=dtype, seed=2)
    residual_RH = values(rows, hidden, dtype=dtype, seed=3, scale=3.0) if has_residual else None
    expected = {}
    normed_RH = input_RH.double()
    if residual_RH is not None:
        sum_RH = input_RH.double() + residual_RH.double()
        expected["sum"] = Expected(sum_RH, ulps=0.5)
        normed_RH = sum_RH.float().to(dtype).double()
    output_RH = normed_RH * (normed_RH.square().mean(1, keepdim=True) + EPS).rsqrt() * weight_H.double()
    expected["output"] = Expected(output_RH, ulps=1.0)
    arguments = {"input": input_RH, "residual": residual_RH, "weight": weight_H, "output": blank(rows, hidden, dtype=dtype)}
    arguments["sum"] = residual_RH  # in place
    return Case("ledom_rms_norm_forward", {**arguments, "eps": EPS, "rows": rows, "hidden": hidden, "dtype": dtype}, expected)


def backward(rows: int, hidden: int, has_sum_gradient: bool, dtype: torch.dtype) -> Case:
    """Return a case of input_gradient and weight_gradient."""
    input_RH, weight_H = inputs(rows, hidden, dtype), values(hidden, dtype=dtype, seed=2)
    gradient_RH = values(rows, hidden, dtype=dtype, seed=4)
    passed_RH = values(rows, hidden, dtype=dtype, seed=5) if has_sum_gradient else None
    x, w, g = input_RH.double(), weight_H.double(), gradient_RH.double()
    reciprocal = (x.square().mean(1, keepdim=True) + EPS).rsqrt()
    direct = reciprocal * g * w
    along = x * reciprocal**3 * (g * w * x).mean(1, keepdim=True)
    passed = torch.zeros_like(x) if passed_RH is None else passed_RH.double()
    mean_of_sizes = (g * w * x).abs().mean(1, keepdim=True)
    noise = FP32 * (direct.abs() + along.abs() + passed.abs() + (x * reciprocal**3).abs() * mean_of_sizes)
    terms = g * x * reciprocal
    partials = min(rows, 256)
    in_place = has_sum_gradient
    return Case(
        "ledom_rms_norm_backward",
        {
            "output_gradient": gradient_RH,
            "sum_gradient": passed_RH,
            "input": input_RH,
            "weight": weight_H,
            "input_gradient": passed_RH if in_place else blank(rows, hidden, dtype=dtype),
            "weight_gradient": blank(hidden, dtype=dtype),
            "partials": blank(partials, hidden, dtype=torch.float32),
            "eps": EPS,
            "rows": rows,
            "hidden": hidden,
            "dtype": dtype,
        },
        {
            "input_gradient": Expected(direct - along + passed, ulps=1.0, noise=noise),
            "weight_gradient": Expected(terms.sum(0), ulps=1.0, noise=FP32 * terms.abs().sum(0)),
        },
        frozenset({"partials"}),
    )


CASES: dict[str, CaseMaker] = {
    **{
        f"{direction.__name__}-{'residual' if flag else 'alone'}-{name}": partial(direction, *shape, flag)
        for direction in (forward, backward)
        for flag in (False, True)
        for name, shape in SHAPES.items()
    },
    "forward-rows_share_a_block": partial(forward, 1026, 1032, False),
    "backward-rows_share_a_block": partial(backward, 260, 1032, True),
    "backward-rows_share_a_block-and_have_a_tail": partial(backward, 257, 8200, False),
}

REFUSED = {
    "hidden is not a multiple of 8": ("forward-alone-narrow", {"hidden": 12}),
    "hidden is 0": ("backward-alone-narrow", {"hidden": 0}),
    "negative rows": ("forward-alone-narrow", {"rows": -1}),
    "residual without sum": ("forward-residual-narrow", {"sum": None}),
    "no output": ("forward-alone-narrow", {"output": None}),
    "no input": ("backward-alone-narrow", {"input": None}),
    "no partials": ("backward-alone-narrow", {"partials": None}),
}

FILE = "rms_norm/rms_norm.cu"
MUTANTS = [
    Mutant("a barrier is missing", "common/reduce.h", "  __syncthreads();\n", ""),
    Mutant("a warp sums only half of its lanes", "common/reduce.h", "distance = WARP / 2", "distance = WARP / 4"),
    Mutant("one scratch for all rows", FILE, ", turn ^= 1) {", ") {"),
    Mutant("eps is forgotten", FILE, "* inverse + eps)", "* inverse + 0.f * eps)"),
    Mutant("the sum's gradient is dropped", FILE, " - row.along * x[i] + p[i]", " - row.along * x[i] + 0.f * p[i]"),
    Mutant("partial sums are skipped", FILE, "row += SLICES", "row += 2 * SLICES"),
    Mutant("the last group is not read", FILE, "threads < groups) x[i] = read(", "threads < groups - 1) x[i] = read("),
    Mutant("only the first row counts for the weight", FILE, "total[i] += g[i]", "total[i] = g[i]"),
    Mutant("the tail's part begins with every row", FILE, "part, row == blockIdx.x)", "part, true)"),
]


def moved(function: str, a: Mapping[str, Any]) -> Moved:
    """Count the rows, and the weight once per block; backward also partial sums, one row per block, written and read."""
    rows, hidden = a["rows"], a["hidden"]
    row_bytes, weight_bytes = rows * hidden * 2, hidden * 2
    if function == "ledom_rms_norm_forward":
        tensors = 1 if a["residual"] is None else 2
        tail_bytes = max(0, hidden - 16384) * 2  # read twice, and its weight for every row
        blocks = min(rows, 1024)
        read = tensors * row_bytes + blocks * (weight_bytes - tail_bytes) + 2 * rows * tail_bytes
        return Moved(read, tensors * row_bytes, tensors * row_bytes + weight_bytes, tensors * row_bytes)
    tensors = 2 if a["sum_gradient"] is None else 3
    tail_bytes = max(0, hidden - 8192) * 2
    blocks = min(rows, 256)
    partial_bytes = blocks * hidden * 4
    read = tensors * row_bytes + blocks * (weight_bytes - tail_bytes) + rows * tail_bytes * 4 + partial_bytes
    tail_partials = (rows - blocks) * tail_bytes * 2  # added in memory
    least = tensors * row_bytes + weight_bytes
    return Moved(
        read + tail_partials, row_bytes + partial_bytes + weight_bytes + tail_partials, least, row_bytes + weight_bytes
    )


SIZES = {"rows": 8192, "hidden": 4096}
WEIGHT = "weight, once for each of 1,024 blocks"
PARTIALS = "weight and partial sums, a row for each of 256 blocks"
TRAFFIC_ROWS = [
    Row("RMSNorm forward, 8192 x 4096", "ledom_rms_norm_forward", {**SIZES, "residual": None}, WEIGHT),
    Row("RMSNorm with residual forward, 8192 x 4096", "ledom_rms_norm_forward", {**SIZES, "residual": True}, WEIGHT),
    Row("RMSNorm backward, 8192 x 4096", "ledom_rms_norm_backward", {**SIZES, "sum_gradient": None}, PARTIALS),
    Row("RMSNorm with residual backward, 8192 x 4096", "ledom_rms_norm_backward", {**SIZES, "sum_gradient": True}, PARTIALS),
]

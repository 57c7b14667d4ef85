"""Cases of SwiGLU. Bound: 1 ulp of the output's type; fp32's rounding if 1 + gate * (1 - sigmoid) cancels.

Shape letters: R rows, W width of gate and of up.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from tests.kernels.cases import Case, CaseMaker, Expected, blank, values
from tests.kernels.mutants import Mutant
from tests.kernels.traffic import Moved, Row

FP32 = 2.0**-21
SHAPES = {
    "narrow": (5, 8),
    "one_warp": (3, 512),
    "odd": (4, 8 * 67),
    "one_block": (2, 2048),
    "blocks_a_row": (2, 5632),
    "odd_blocks_a_row": (3, 2056),
    "many_rows": (301, 24),
}
EDGES = (0.0, -0.0, 20.0, -20.0, 89.0, -89.0, 1e4, -1e4)
"""Return values at which the sigmoid saturates, or exp leaves fp32's range."""


def gates_and_ups(rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    input_R2W = values(rows, 2 * width, dtype=dtype, seed=1, scale=3.0)
    input_R2W[0, : len(EDGES)] = torch.tensor(EDGES)
    input_R2W[0, width : width + len(EDGES)] = 1.0
    return input_R2W


def forward(rows: int, width: int, dtype: torch.dtype) -> Case:
    """output."""
    input_R2W = gates_and_ups(rows, width, dtype)
    gate_RW, up_RW = input_R2W.double().chunk(2, 1)
    output_RW = gate_RW * gate_RW.sigmoid() * up_RW
    arguments = {"input": input_R2W, "output": blank(rows, width, dtype=dtype), "rows": rows, "width": width, "dtype": dtype}
    return Case("ledom_swiglu_forward", arguments, {"output": Expected(output_RW, ulps=1.0, noise=1e-30)})


def backward(rows: int, width: int, in_place: bool, dtype: torch.dtype) -> Case:
    """input_gradient."""
    input_R2W, gradient_RW = gates_and_ups(rows, width, dtype), values(rows, width, dtype=dtype, seed=2)
    gradient_RW[0, : len(EDGES)] = 1.0
    gate_RW, up_RW = input_R2W.double().chunk(2, 1)
    g, s = gradient_RW.double(), gate_RW.sigmoid()
    silu = gate_RW * s
    expected = torch.cat((g * up_RW * (s + silu * (1 - s)), g * silu), 1)
    noise = torch.cat((FP32 * (g * up_RW).abs() * (s + (silu * (1 - s)).abs()), torch.zeros_like(g)), 1) + 1e-30
    arguments = {
        "output_gradient": gradient_RW,
        "input": input_R2W,
        "input_gradient": input_R2W if in_place else blank(rows, 2 * width, dtype=dtype),
    }
    return Case(
        "ledom_swiglu_backward",
        {**arguments, "rows": rows, "width": width, "dtype": dtype},
        {"input_gradient": Expected(expected, ulps=1.0, noise=noise)},
    )


CASES: dict[str, CaseMaker] = {
    **{f"forward-{name}": partial(forward, *shape) for name, shape in SHAPES.items()},
    **{f"backward-{name}": partial(backward, *shape, False) for name, shape in SHAPES.items()},
    "backward-in_place": partial(backward, *SHAPES["odd"], True),
}

REFUSED = {
    "width is not a multiple of 8": ("forward-narrow", {"width": 12}),
    "width is 0": ("backward-narrow", {"width": 0}),
    "negative rows": ("backward-narrow", {"rows": -1}),
    "more rows than a grid has": ("forward-narrow", {"rows": 1 << 31}),
    "no output": ("forward-narrow", {"output": None}),
}

FILE = "swiglu/swiglu.cu"
MUTANTS = [
    Mutant("up's gradient lacks a factor gate", FILE, "up[i] = gradient[i] * silu", "up[i] = gradient[i] * s"),
    Mutant("the sigmoid's slope is wrong", FILE, "silu * (1.f - s)", "silu * s"),
    Mutant("up is read from gate's position", FILE, "load_pack(gates + width,", "load_pack(gates,"),
    Mutant("a store without its guard", FILE, "if (first + i * threads < groups) store_pack(row", "store_pack(row"),
    Mutant("blocks of a row overlap", FILE, "blockIdx.y * LOADS * threads", "blockIdx.y * threads"),
    Mutant("the gradients are exchanged", FILE, "packed_gate = Pack<T>::pack(gate)", "packed_gate = Pack<T>::pack(up)"),
]


def moved(function: str, a: Mapping[str, Any]) -> Moved:
    """Count every value once."""
    part = a["rows"] * a["width"] * 2
    read, written = (2, 1) if function == "ledom_swiglu_forward" else (3, 2)
    return Moved(read * part, written * part, read * part, written * part)


TRAFFIC_ROWS = [
    Row(f"SwiGLU {direction}, 8192 x 2 x 14336", f"ledom_swiglu_{direction}", {"rows": 8192, "width": 14336})
    for direction in ("forward", "backward")
]

"""Cases of RoPE. Bound: 1 ulp of the output's type, and fp32's rounding of the two products and of sine and cosine.

Shape letters: S length, B batch, H heads, G groups, U heads of a group (queries, key, value), D head width, E rotated width.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from tests.kernels.cases import Case, CaseMaker, Expected, blank, values
from tests.kernels.mutants import Mutant
from tests.kernels.traffic import Moved, Row

FP32 = 2.0**-21
FARTHEST = 200_000
"""Position of the last token of a case."""


def angles(length: int, rotated: int, first: int = 0) -> torch.Tensor:
    """Return megatron-core's tensor of angles: [S, E] in fp32, with two equal halves."""
    inverse = 10_000.0 ** -(torch.arange(0, rotated, 2).float() / rotated)
    positions = torch.arange(first, first + length).float()
    return torch.outer(positions, inverse).repeat(1, 2)


def rotation(x_SBHD: torch.Tensor, freqs_SE: torch.Tensor, scale: float, inverse: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rotated tensor in float64, and the error of fp32."""
    rotated = freqs_SE.shape[1]
    x, rest = x_SBHD.double().split((rotated, x_SBHD.shape[-1] - rotated), -1)
    cosine, sine = (f(freqs_SE.double())[:, None, None] * scale for f in (torch.cos, torch.sin))
    first, second = x.chunk(2, -1)
    other = torch.cat((second, -first) if inverse else (-second, first), -1)
    noise = FP32 * scale * (x.abs() + other.abs())
    return torch.cat((x * cosine + other * sine, rest), -1), torch.cat((noise, torch.zeros_like(rest)), -1)


def plain(
    shape: tuple[int, int, int, int], rotated: int, in_place: bool, inverse: bool, scale: float, first: int, dtype: torch.dtype
) -> Case:
    """Return a case of one tensor of heads."""
    length, batch, heads, width = shape
    input_SBHD, freqs_SE = values(*shape, dtype=dtype, seed=1), angles(length, rotated, first)
    wanted, noise = rotation(input_SBHD, freqs_SE, scale, inverse)
    arguments = {
        "input": input_SBHD,
        "freqs": freqs_SE,
        "output": input_SBHD if in_place else blank(*shape, dtype=dtype),
        "scale": scale,
        "length": length,
        "batch": batch,
        "heads": heads,
        "head_dim": width,
        "rotated": rotated,
        "input_token_stride": heads * width,
        "input_head_stride": width,
        "output_token_stride": heads * width,
        "output_head_stride": width,
        "inverse": int(inverse),
        "dtype": dtype,
    }
    return Case("ledom_rope", arguments, {"output": Expected(wanted, ulps=1.0, noise=noise)})


def strided_key(length: int, groups: int, queries: int, width: int, dtype: torch.dtype) -> Case:
    """Return a case of the keys in a fused projection, copied to their own tensor."""
    fused_SBGUD = values(length, 1, groups, queries + 2, width, dtype=dtype, seed=1)
    case = plain((length, 1, groups, width), width, False, False, 1.0, 0, dtype)
    wanted, noise = rotation(fused_SBGUD[:, :, :, queries], angles(length, width), 1.0, False)
    case.arguments["input"] = fused_SBGUD.flatten()[queries * width :]
    case.arguments["input_head_stride"] = (queries + 2) * width
    case.arguments["input_token_stride"] = groups * (queries + 2) * width
    return Case(case.function, case.arguments, {"output": Expected(wanted, ulps=1.0, noise=noise)})


def fused_qkv(layout: str, shape: tuple[int, int, int, int, int], rotated: int, inverse: bool, dtype: torch.dtype) -> Case:
    """Return a case of qkv [S, B, G, queries + 2, D]: in place, to separate tensors ("split"), or from them ("join")."""
    length, batch, groups, queries, width = shape
    qkv, freqs_SE = (
        values(length, batch, groups, queries + 2, width, dtype=dtype, seed=1),
        angles(length, rotated, FARTHEST - length),
    )
    heads, noise = rotation(qkv.flatten(2, 3), freqs_SE, 1.0, inverse)
    wanted, noise = (t.view(qkv.shape).clone() for t in (heads, noise))
    wanted[:, :, :, -1], noise[:, :, :, -1] = qkv[:, :, :, -1].double(), 0.0
    expected = Expected(wanted, ulps=1.0, noise=noise)
    slots = {"query": slice(0, queries), "key": slice(queries, queries + 1), "value": slice(queries + 1, queries + 2)}
    sizes = {"length": length, "batch": batch, "groups": groups, "queries": queries, "head_dim": width, "rotated": rotated}
    rest = {"freqs": freqs_SE, "scale": 1.0, **sizes, "inverse": int(inverse), "dtype": dtype}
    if layout == "in_place":
        return Case("ledom_rope_qkv", {"qkv": qkv, **rest}, {"qkv": expected})
    parts = {name: qkv[:, :, :, slot].flatten(2, 3).contiguous() for name, slot in slots.items()}
    if layout == "join":
        return Case("ledom_rope_join_qkv", {**parts, "qkv": blank(*qkv.shape, dtype=dtype), **rest}, {"qkv": expected})
    outputs = {name: blank(*part.shape, dtype=dtype) for name, part in parts.items()}
    apart = {
        name: Expected(wanted[:, :, :, slot].flatten(2, 3), ulps=1.0, noise=noise[:, :, :, slot].flatten(2, 3))
        for name, slot in slots.items()
    }
    return Case("ledom_rope_split_qkv", {"qkv": qkv, **outputs, **rest}, apart)


HEADS = {"8_1": (8, 1), "16_16": (16, 16), "32_8": (32, 8)}
WIDTHS = (64, 128, 192, 256)
CASES: dict[str, CaseMaker] = {
    **{
        f"plain-{count}x{width}": partial(plain, (5, 2, count, width), width, False, False, 1.0, 0)
        for count in (1, 8, 16, 32)
        for width in WIDTHS
    },
    "plain-in_place": partial(plain, (7, 3, 5, 64), 64, True, False, 1.0, 1000),
    "plain-back": partial(plain, (3, 1, 4, 128), 128, False, True, 1.0, 50),
    "plain-scaled": partial(plain, (3, 1, 4, 64), 64, False, False, 1.25, 0),
    "plain-part_of_a_head": partial(plain, (3, 2, 4, 128), 32, False, False, 1.0, 0),
    "plain-part_of_a_head_in_place": partial(plain, (3, 2, 4, 64), 16, True, True, 1.0, 0),
    "plain-far": partial(plain, (4, 1, 2, 64), 64, False, False, 1.0, FARTHEST),
    "plain-more_positions_than_a_block": partial(plain, (70, 1, 1, 64), 64, False, False, 1.0, 0),
    "key_in_qkv": partial(strided_key, 9, 2, 4, 64),
    **{
        f"qkv-{layout}-{name}x{width}": partial(
            fused_qkv, layout, (3, 2, groups, heads // groups, width), width, layout == "join"
        )
        for layout, width in (("in_place", 128), ("split", 64), ("join", 192))
        for name, (heads, groups) in HEADS.items()
    },
    "qkv-split-part_of_a_head": partial(fused_qkv, "split", (5, 2, 2, 3, 64), 32, False),
    "qkv-in_place-part_of_a_head": partial(fused_qkv, "in_place", (5, 2, 2, 3, 256), 64, True),
}

REFUSED = {
    "an odd half": ("plain-8x64", {"rotated": 24}),
    "more rotated than the head has": ("plain-8x64", {"rotated": 128}),
    "too much rotated": ("plain-8x64", {"rotated": 528, "head_dim": 528}),
    "stride off the grid": ("plain-8x64", {"input_token_stride": 516}),
    "in place with two strides": ("plain-in_place", {"output_token_stride": 640}),
    "no heads": ("qkv-in_place-8_1x128", {"queries": 0}),
    "no angles": ("qkv-split-8_1x64", {"freqs": None}),
    "head width is not a multiple of 8": ("qkv-join-8_1x192", {"head_dim": 196}),
}

FILE = "rope/rope.cu"
MUTANTS = [
    Mutant("a reflection instead of a rotation", FILE, "x * cosines[i] - y * sines[i]", "x * cosines[i] + y * sines[i]"),
    Mutant("the barrier is missing", FILE, "  __syncthreads();\n", ""),
    Mutant("values are rotated", FILE, "is_rotated = slot <= shape.queries", "is_rotated = slot <= shape.queries + 1"),
    Mutant("cosine takes the sine's sign", FILE, "if ((quadrant + 1) & 2)", "if (quadrant & 2)"),
    Mutant("pi is too short", FILE, "  r = fmaf(quarters, -7.54978942e-08f, r);\n", ""),
    Mutant("the rest of a head is not copied", FILE, "if (from != to)", "if (from == nullptr)"),
    Mutant("the first position's table for all", FILE, "threadIdx.z * half + lane", "0 * half + lane"),
    Mutant("samples change places", FILE, "position * shape.batch + sample", "sample * shape.length + position"),
    Mutant("the scale is forgotten", FILE, "c.x * scale, c.y * scale", "c.x, c.y"),
]


def moved(function: str, a: Mapping[str, Any]) -> Moved:
    """Count every value once, and half of each position's angles; in place, only rotated values."""
    tokens, angle_bytes = a["length"] * a["batch"], a["length"] * a["rotated"] * 2
    if function == "ledom_rope":
        is_in_place = a["input"] is a["output"]
        heads = a["heads"] * tokens
        values = heads * (a["rotated"] if is_in_place else a["head_dim"])
    elif function == "ledom_rope_qkv":
        values = tokens * a["groups"] * (a["queries"] + 1) * a["rotated"]
    else:
        values = tokens * a["groups"] * (a["queries"] + 2) * a["head_dim"]
    return Moved(values * 2 + angle_bytes, values * 2, values * 2 + angle_bytes, values * 2)


SIZES = {"length": 4096, "batch": 2, "groups": 8, "queries": 4, "head_dim": 128, "rotated": 128}
TRAFFIC_ROWS = [
    Row("RoPE of fused QKV in place, 4096 x 2, 32/8 heads of 128", "ledom_rope_qkv", SIZES),
    Row("RoPE of fused QKV, separate outputs", "ledom_rope_split_qkv", SIZES),
    Row("RoPE of queries, not in place", "ledom_rope", {**SIZES, "heads": 32, "input": 0, "output": 1}),
]

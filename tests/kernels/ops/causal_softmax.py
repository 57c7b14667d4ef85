"""Cases of the causal softmax. Bound: 1 ulp of the output's type; in the backward pass also fp32's rounding if the gradient and its
mean cancel; fp16's smallest number, below which probabilities round to 0.

Shape letters: B batch, H heads, Q queries, K keys.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from tests.kernels.cases import Case, CaseMaker, Expected, blank, values
from tests.kernels.mutants import Mutant
from tests.kernels.traffic import Moved, Row

FP32 = 2.0**-20
SCALE = 0.125
SHAPES = {
    "small": (2, 3, 8, 8),
    "odd_rows": (1, 2, 5, 64),
    "more_keys_than_queries": (2, 2, 3, 32),
    "square": (1, 1, 40, 40),
    "264": (1, 1, 9, 264),
    "warp_1024": (1, 2, 5, 1024),
    "longest_of_a_warp": (1, 1, 5, 2048),
    "shortest_of_a_block": (1, 1, 6, 2056),
    "longer_than_registers": (1, 1, 2, 8 * 1537),
}
DOCUMENTS = {
    "small": (2, 3, 8, 8),
    "square": (2, 2, 40, 40),
    "warp_1024": (1, 1, 9, 1024),
    "block": (2, 1, 5, 2056),
    "longer_than_registers": (1, 1, 3, 8 * 1537),
}


def document_numbers(batch: int, keys: int) -> torch.Tensor:
    """Return int32 [B, K]: sample b has runs of b + 1, b + 2, ... positions from the end, so that all rows begin differently."""
    numbers = torch.zeros(batch, keys, dtype=torch.int32)
    for sample in range(batch):
        end, length = keys, sample + 1
        while end > 0:
            numbers[sample, max(0, end - length) : end] = -length
            end, length = end - length, length + 1
    return numbers - numbers.min()


def seen(queries: int, keys: int, documents_BK: torch.Tensor | None) -> torch.Tensor:
    """Return a mask of the keys visible to each query: [B or 1, 1, Q, K]."""
    causal_QK = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    if documents_BK is None:
        return causal_QK[None, None]
    return (causal_QK & (documents_BK[:, keys - queries :, None] == documents_BK[:, None]))[:, None]


def forward(shape: tuple[int, int, int, int], has_documents: bool, in_place: bool, dtype: torch.dtype) -> Case:
    """output."""
    batch, heads, queries, keys = shape
    scores_BHQK = values(*shape, dtype=dtype, seed=1, scale=24.0)
    documents_BK = document_numbers(batch, keys) if has_documents else None
    masked = (scores_BHQK.double() * SCALE).masked_fill(~seen(queries, keys, documents_BK), -torch.inf)
    arguments = {
        "scores": scores_BHQK,
        "documents": documents_BK,
        "output": scores_BHQK if in_place else blank(*shape, dtype=dtype),
    }
    sizes = {"scale": SCALE, "batch": batch, "heads": heads, "queries": queries, "keys": keys, "dtype": dtype}
    return Case("ledom_causal_softmax_forward", {**arguments, **sizes}, {"output": Expected(masked.softmax(-1), ulps=1.0)})


def backward(shape: tuple[int, int, int, int], has_documents: bool, in_place: bool, dtype: torch.dtype) -> Case:
    """scores_gradient."""
    batch, heads, queries, keys = shape
    documents_BK = document_numbers(batch, keys) if has_documents else None
    is_seen = seen(queries, keys, documents_BK)
    scores = values(*shape, dtype=dtype, seed=1, scale=24.0).double() * SCALE
    output_BHQK = scores.masked_fill(~is_seen, -torch.inf).softmax(-1).to(dtype)
    gradient_BHQK = values(*shape, dtype=dtype, seed=2)
    gradient_BHQK.masked_fill_(~is_seen, torch.inf)  # may have any value at keys that are not visible
    y, g = output_BHQK.double(), gradient_BHQK.double().masked_fill(~is_seen, 0.0)
    mean = (y * g).sum(-1, keepdim=True)
    noise = FP32 * SCALE * y * (g.abs() + (y * g).abs().sum(-1, keepdim=True))
    arguments = {
        "output_gradient": gradient_BHQK,
        "output": output_BHQK,
        "documents": documents_BK,
        "scores_gradient": gradient_BHQK if in_place else blank(*shape, dtype=dtype),
    }
    sizes = {"scale": SCALE, "batch": batch, "heads": heads, "queries": queries, "keys": keys, "dtype": dtype}
    expected = Expected(SCALE * y * (g - mean), ulps=1.0, noise=noise)
    return Case("ledom_causal_softmax_backward", {**arguments, **sizes}, {"scores_gradient": expected})


CASES: dict[str, CaseMaker] = {
    f"{direction.__name__}-{'documents' if flag else 'causal'}-{name}": partial(direction, shape, flag, name == "square")
    for direction in (forward, backward)
    for flag, shapes in ((False, SHAPES), (True, DOCUMENTS))
    for name, shape in shapes.items()
}

REFUSED = {
    "keys are not a multiple of 8": ("forward-causal-small", {"keys": 12}),
    "more queries than keys": ("backward-causal-small", {"queries": 16}),
    "no heads": ("forward-causal-small", {"heads": 0}),
    "more heads than a grid has": ("forward-causal-small", {"heads": 65536}),
    "negative batch": ("backward-causal-small", {"batch": -1}),
    "no output": ("backward-causal-small", {"output": None}),
}

NARROW_ACCESSES = {"causal_softmax_forward": 2, "causal_softmax_backward": 2}
"""Return the bytes of the search for a document's beginning: its number, and one probe per step."""

FILE = "causal_softmax/causal_softmax.cu"
MUTANTS = [
    Mutant("one key too many", FILE, "key < end", "key <= end"),
    Mutant("the queries begin with the keys", FILE, "query + shape.keys - shape.queries", "query"),
    Mutant("a barrier is missing", "common/reduce.h", "  __syncthreads();\n", ""),
    Mutant("the running sum is not scaled", FILE, "sum * exp2f(largest - new_largest) + added", "sum + added"),
    Mutant("the tail's sum is not scaled", FILE, "running.sum * exp2f(running.largest - largest)", "running.sum"),
    Mutant("the search goes a step too far", FILE, "(hit - 1) * step + 1, high)", "hit * step + 1, high)"),
    Mutant("keys that are not visible keep their gradient", FILE, "if (!seen.has(begin + i)) values[i] = 0.f;", ""),
    Mutant(
        "the gradient lacks the scale", FILE, "scale * a[i] * (b[i] - product)", "(1.f + 0.f * scale) * a[i] * (b[i] - product)"
    ),
    Mutant("documents are of the first sample", FILE, "static_cast<int64_t>(blockIdx.z) * shape.keys, last", "0, last"),
    Mutant("zeros are not written", FILE, "< groups) store_pack(output", "< end) store_pack(output"),
]


def moved(function: str, a: Mapping[str, Any]) -> Moved:
    """Count the visible groups of eight keys of each row as read, all as written. Above 8,192 keys a row is read twice."""
    queries, keys = a["queries"], a["keys"]
    rows, in_registers = a["batch"] * a["heads"], 8192 if keys > 2048 else keys
    tensors = 1 if function == "ledom_causal_softmax_forward" else 2
    seen_keys = [query + keys - queries + 1 for query in range(queries)]
    groups = [(seen_key + 7) // 8 * 8 for seen_key in seen_keys]
    read = sum(group + max(0, group - in_registers) for group in groups)
    written = rows * queries * keys * 2
    return Moved(rows * tensors * read * 2, written, rows * tensors * sum(seen_keys) * 2, written)


def traffic_row(direction: str, length: int, why: str = "") -> Row:
    sizes = {"batch": 1, "heads": 8, "queries": length, "keys": length}
    return Row(f"causal softmax {direction}, 8 heads, {length} x {length}", f"ledom_causal_softmax_{direction}", sizes, why)


TRAFFIC_ROWS = [
    *(traffic_row(direction, length) for length in (2048, 8192) for direction in ("forward", "backward")),
    *(traffic_row(way, 16384, "keys beyond 8,192 are read again") for way in ("forward", "backward")),
]

"""Cases of the multi-tensor optimizer, against torch.optim.AdamW on doubles. Bound: 2 ulp of the output's type, and
fp32's rounding if terms cancel.

A list is one buffer with gaps between its tensors; the gaps must not change. Shape letters: N numbers of a buffer, C chunks.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from tests.kernels.cases import Case, CaseMaker, Expected, blank, values
from tests.kernels.mutants import Mutant
from tests.kernels.traffic import Moved, Row

FP32 = 2.0**-22
"""Rounding of a few fp32 operations, relative to the largest term."""
BETAS = (0.9, 0.95)
EPS = 1e-8
CHUNK, BETWEEN = 4096, 16
Layout = tuple[list[tuple[int, int]], int]
"""(begin, size) of each tensor, in elements, and the buffer's length."""
SIZES = {
    "one": [8],
    "odd_sizes": [1, 7, 8, 9, 0, 255, 2049],
    "many": [3 * i % 97 + 1 for i in range(150)],
    "several_chunks": [3 * CHUNK + 5, CHUNK, CHUNK - 8],
}
SLOW_CASES = {"many", "several_chunks"}
"""Endings of the names of cases that run on the interpreter and the sanitizers only in the slow suite."""


def layout(sizes: Sequence[int], shift: int = 0) -> Layout:
    """Return the positions of tensors at multiples of 16 elements, or `shift` elements after them."""
    pieces, at = [], 0
    for size in sizes:
        at = -(-at // 16) * 16 + shift
        pieces.append((at, size))
        at += size + BETWEEN
    return pieces, at


def chunk_table(pieces: Sequence[tuple[int, int]], element_bytes: Sequence[int]) -> torch.Tensor:
    """Return int64 [C, 1 + lists]; every list has its tensors at the same elements."""
    rows = [
        [min(CHUNK, begin + size - at), *(at * width for width in element_bytes)]
        for begin, size in pieces
        for at in range(begin, begin + size, CHUNK)
    ]
    return torch.tensor(rows, dtype=torch.int64).view(-1, 1 + len(element_bytes))


def inside(pieces: Sequence[tuple[int, int]], length: int) -> torch.Tensor:
    """Return bool [N]: True for elements of a tensor."""
    mask = torch.zeros(length, dtype=torch.bool)
    for begin, size in pieces:
        mask[begin : begin + size] = True
    return mask


def stepped(
    lists: Sequence[torch.Tensor], step: int, lr: float, weight_decay: float, is_decoupled: bool
) -> tuple[torch.Tensor, ...]:
    """Return master, exp_avg and exp_avg_sq after this step of torch's optimizer, in double."""
    gradient, exp_avg, exp_avg_sq, master = (each.double() for each in lists)
    master = master.clone().requires_grad_()
    master.grad = gradient
    kind = torch.optim.AdamW if is_decoupled else torch.optim.Adam
    optimizer = kind([master], lr=lr, betas=BETAS, eps=EPS, weight_decay=weight_decay)
    state = {"step": torch.tensor(float(step - 1)), "exp_avg": exp_avg.clone(), "exp_avg_sq": exp_avg_sq.clone()}
    optimizer.state[master] = state
    optimizer.step()
    return master.detach(), state["exp_avg"], state["exp_avg_sq"]


def adamw(
    where: Layout,
    step: int,
    dtype: torch.dtype,
    has_weights: bool = True,
    are_16_bit: bool = False,
    is_decoupled: bool = True,
    weight_decay: float = 0.1,
) -> Case:
    """Return a case of exp_avgs, exp_avg_sqs, masters and weights after a step; a few gradients are 0."""
    pieces, length = where
    lr = 0.02
    gradients = values(length, dtype=dtype if are_16_bit else torch.float32, seed=1, scale=0.1)
    gradients[::5] = 0.0
    masters = values(length, dtype=torch.float32, seed=2)
    has_history = float(step > 1)
    exp_avgs = values(length, dtype=torch.float32, seed=3, scale=0.1 * has_history)
    exp_avg_sqs = values(length, dtype=torch.float32, seed=4, scale=0.1 * has_history).square()
    master, exp_avg, exp_avg_sq = stepped((gradients, exp_avgs, exp_avg_sqs, masters), step, lr, weight_decay, is_decoupled)
    gradient = gradients.double() + (0.0 if is_decoupled else weight_decay) * masters.double()
    terms = BETAS[0] * exp_avgs.double().abs() + (1 - BETAS[0]) * (
        gradients.double().abs() + (gradient - gradients.double()).abs()
    )
    root = (exp_avg_sq / (1 - BETAS[1] ** step)).sqrt() + EPS
    noise = FP32 * (masters.double().abs() + lr / (1 - BETAS[0] ** step) * terms / root)
    mask = inside(pieces, length)
    expected = {
        "exp_avgs": Expected(torch.where(mask, exp_avg, exp_avgs.double()), 2.0, FP32 * terms),
        "exp_avg_sqs": Expected(torch.where(mask, exp_avg_sq, exp_avg_sqs.double()), 2.0, FP32 * terms.square()),
        "masters": Expected(torch.where(mask, master, masters.double()), 2.0, noise),
    }
    weights = None
    if has_weights:
        weights = torch.full((length,), 7.0).to(dtype)
        expected["weights"] = Expected(torch.where(mask, master, 7.0), 0.5, noise)
    chunks = chunk_table(pieces, (gradients.element_size(), 4, 4, 4, 2))
    scalars = {"lr": lr, "beta1": BETAS[0], "beta2": BETAS[1], "eps": EPS, "weight_decay": weight_decay}
    scalars |= {f"correction{i + 1}": 1 - beta**step for i, beta in enumerate(BETAS)}
    lists = {"gradients": gradients, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs, "masters": masters, "weights": weights}
    flags = {"is_decoupled": int(is_decoupled), "gradients_are_16_bit": int(are_16_bit), "dtype": dtype}
    return Case(
        "ledom_multi_tensor_adamw", {"chunks": chunks, **lists, **scalars, "num_chunks": len(chunks), **flags}, expected
    )


def norm(where: Layout, dtype: torch.dtype, are_16_bit: bool = False) -> Case:
    """Return a case of the norm; gaps between tensors do not count."""
    pieces, length = where
    tensors = values(length, dtype=dtype if are_16_bit else torch.float32, seed=5)
    chunks = chunk_table(pieces, (tensors.element_size(),))
    wanted = tensors.double()[inside(pieces, length)].norm().view(1)
    arguments = {
        "chunks": chunks,
        "tensors": tensors,
        "norm": blank(1, dtype=torch.float32),
        "partials": blank(max(1, len(chunks)), dtype=torch.float32),
        "num_chunks": len(chunks),
        "are_16_bit": int(are_16_bit),
        "dtype": dtype,
    }
    return Case("ledom_multi_tensor_norm", arguments, {"norm": Expected(wanted, 2.0, FP32 * wanted)}, frozenset({"partials"}))


def scale(where: Layout, is_in_place: bool, dtype: torch.dtype, from_16_bit: bool = False, to_16_bit: bool = False) -> Case:
    """targets."""
    pieces, length = where
    sources = values(length, dtype=dtype if from_16_bit else torch.float32, seed=6)
    targets = sources if is_in_place else torch.full((length,), 7.0).to(dtype if to_16_bit else torch.float32)
    chunks = chunk_table(pieces, (sources.element_size(), targets.element_size()))
    wanted = torch.where(inside(pieces, length), sources.double() * 0.3, targets.double())
    arguments = {
        "chunks": chunks,
        "sources": sources,
        "targets": targets,
        "scale": 0.3,
        "num_chunks": len(chunks),
        "sources_are_16_bit": int(from_16_bit),
        "targets_are_16_bit": int(to_16_bit),
        "dtype": dtype,
    }
    return Case("ledom_multi_tensor_scale", arguments, {"targets": Expected(wanted, 1.0)})


ODD, SHIFTED = layout(SIZES["odd_sizes"]), layout([5, 9, 300], shift=3)
CASES: dict[str, CaseMaker] = {
    **{f"norm-{name}": partial(norm, layout(sizes)) for name, sizes in SIZES.items()},
    "norm-no_tensors": partial(norm, layout([])),
    "norm-off_the_grid": partial(norm, SHIFTED),
    "norm-16_bit": partial(norm, ODD, are_16_bit=True),
    "scale-in_place": partial(scale, ODD, True),
    "scale-off_the_grid": partial(scale, SHIFTED, False),
    "scale-to_16_bit": partial(scale, ODD, False, to_16_bit=True),
    "scale-from_16_bit": partial(scale, ODD, False, from_16_bit=True),
    "scale-16_bit": partial(scale, SHIFTED, False, from_16_bit=True, to_16_bit=True),
    "adamw-no_weights": partial(adamw, ODD, 5, has_weights=False),
    "adamw-16_bit_gradients": partial(adamw, ODD, 5, are_16_bit=True),
    "adamw-16_bit_gradients_no_weights": partial(adamw, SHIFTED, 2, has_weights=False, are_16_bit=True),
    "adamw-l2": partial(adamw, ODD, 3, is_decoupled=False),
    "adamw-no_decay": partial(adamw, layout([40]), 1000, weight_decay=0.0),
    "adamw-off_the_grid": partial(adamw, SHIFTED, 2),
    "adamw-weights_alone_off_the_grid": partial(adamw, layout([5, 9, 300], shift=4), 2),
    **{f"adamw-first_step-{name}": partial(adamw, layout(sizes), 1) for name, sizes in SIZES.items()},
}

REFUSED = {
    "negative chunks": ("adamw-no_weights", {"num_chunks": -1}),
    "more chunks than a grid": ("norm-one", {"num_chunks": 1 << 31}),
    "a correction of 0": ("adamw-no_weights", {"correction2": 0.0}),
    "no gradients": ("adamw-no_weights", {"gradients": None}),
    "no table": ("scale-in_place", {"chunks": None}),
    "no partials": ("norm-one", {"partials": None}),
    "no targets": ("scale-off_the_grid", {"targets": None}),
}

NARROW_ACCESSES = {"multi_tensor_adamw": 14, "multi_tensor_squares": 4, "multi_tensor_root": 2, "multi_tensor_scale": 5}
"""Accesses to the table's row, and to elements after groups of eight or not aligned; for sums the last three, and the result."""

FILE = "multi_tensor/multi_tensor.cu"
MUTANTS = [
    Mutant("the second moment is not corrected", FILE, "sqrtf(second) * s.root", "sqrtf(second) * (0.f * s.root + 1.f)"),
    Mutant("decoupled decay goes into the moments", FILE, "is_decoupled ? 0. : weight_decay", "weight_decay"),
    Mutant("L2 decays the weights, too", FILE, "1. - lr * weight_decay : 1.", "1. - lr * weight_decay : 1. - lr * weight_decay"),
    Mutant("eps is forgotten", FILE, "* s.root + s.eps", "* s.root + 1e-20f + 0.f * s.eps"),
    Mutant("the end of a row is skipped", FILE, "int i = groups * PACK + thread; i < count;", "int i = groups * PACK + thread; i < groups;"),
    Mutant("a row ends one element late", FILE, "i < count; i += THREADS) {\n    float first", "i <= count; i += THREADS) {\n    float first"),
    Mutant("weights are not rounded masters", FILE, "store_one(weight + i, p);", "store_one(weight + i, first);"),
    Mutant("the last sums are not added", FILE, "thread < count % 4", "thread < count % 4 - 1"),
    Mutant("a block's sum is one warp's", FILE, "scratch, 0, thread, THREADS)", "scratch, 0, thread, WARP)"),
    Mutant("in every row the first tensor", FILE, "+ row[1 + list]", "+ (row[1 + list] & 63)"),
]  # fmt: skip


def moved(function: str, a: Mapping[str, Any]) -> Moved:
    """Count the elements, and the table, which each of a block's 8 warps reads; for the norm also a sum per row."""
    table = a.get("chunks")
    elements = a["elements"] if table is None else int(table[:, 0].sum())
    rows = a["num_chunks"]
    if function == "ledom_multi_tensor_norm":
        read, written, columns = 2 if a["are_16_bit"] else 4, 0, 2
    elif function == "ledom_multi_tensor_scale":
        read, written = (2 if a[f"{name}_are_16_bit"] else 4 for name in ("sources", "targets"))
        columns = 3
    else:
        has_weights = a["weights"] is not None
        read, written = 12 + (2 if a["gradients_are_16_bit"] else 4), 12 + 2 * has_weights
        columns = 5 + has_weights
    table_bytes = rows * 8 * columns * 8
    sums, result = (rows * 4, 4) if function == "ledom_multi_tensor_norm" else (0, 0)
    return Moved(
        elements * read + table_bytes + sums, elements * written + sums + result, elements * read, elements * written + result
    )


BILLION = {"elements": 1 << 30, "num_chunks": 1 << 17}
LISTS = {"weights": None, "gradients_are_16_bit": 0}
TRAFFIC_ROWS = [
    Row("AdamW of 2^30 parameters, fp32", "ledom_multi_tensor_adamw", {**BILLION, **LISTS}),
    Row("AdamW of 2^30 parameters, 16-bit weights written", "ledom_multi_tensor_adamw", {**BILLION, **LISTS, "weights": True}),
    Row("norm of 2^30 fp32 gradients", "ledom_multi_tensor_norm", {**BILLION, "are_16_bit": 0}),
    Row(
        "scaling of 2^30 fp32 gradients",
        "ledom_multi_tensor_scale",
        {**BILLION, "sources_are_16_bit": 0, "targets_are_16_bit": 0},
    ),
]

"""Cases of the vocabulary-parallel cross-entropy. Bound: 1 ulp of the logits' type for the gradient; for the terms fp32's rounding,
also of a sum over the vocabulary.

Shape letters: N rows, V logits of a row.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from tests.kernels.cases import Case, CaseMaker, Expected, blank, values
from tests.kernels.mutants import Mutant
from tests.kernels.traffic import Moved, Row

FP32 = 2.0**-21
ELSEWHERE = -1
SHAPES = {  # rows, stride, counted
    "one_group": (5, 8, 8),
    "a_part_of_a_group": (4, 8, 3),
    "padded": (3, 128, 101),
    "groups_that_only_pad": (3, 1024, 17),
    "more_than_a_load": (2, 8 * 256 * 4 + 8, 8 * 256 * 4 + 1),
    "two_passes": (2, 8 * 256 * 9, 8 * 256 * 9 - 13),
    "many_rows": (67, 64, 50),
}


def logits_and_labels(
    rows: int, stride: int, counted: int, spread: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits and labels; padding is far larger than real logits, so errors show; every third label is another rank's."""
    logits_NV = values(rows, stride, dtype=dtype, seed=1, scale=spread)
    logits_NV[:, counted:] = 1000.0
    labels_N = torch.randint(0, counted, (rows,), generator=torch.Generator().manual_seed(2))
    labels_N[::3] = ELSEWHERE
    labels_N[-1] = counted - 1
    return logits_NV, labels_N


def terms(rows: int, stride: int, counted: int, spread: float, dtype: torch.dtype) -> Case:
    """largest, sums, targets."""
    logits_NV, labels_N = logits_and_labels(rows, stride, counted, spread, dtype)
    exact_NV = logits_NV.double()[:, :counted]
    largest_N = exact_NV.amax(1)
    scaled_NV = (exact_NV - largest_N[:, None]).exp()
    targets_N = torch.where(labels_N >= 0, exact_NV.gather(1, labels_N.clamp(min=0)[:, None])[:, 0], 0.0)
    noise_N = FP32 * (scaled_NV * (2 + largest_N[:, None] - exact_NV)).sum(1)
    arguments = {
        "logits": logits_NV,
        "labels": labels_N,
        **{name: blank(rows, dtype=torch.float32) for name in ("largest", "sums", "targets")},
        "rows": rows,
        "stride": stride,
        "counted": counted,
        "dtype": dtype,
    }
    expected = {
        "largest": Expected(largest_N),
        "sums": Expected(scaled_NV.sum(1), noise=noise_N),
        "targets": Expected(targets_N),
    }
    return Case("ledom_cross_entropy_terms", arguments, expected)


def gradient(rows: int, stride: int, counted: int, spread: float, dtype: torch.dtype) -> Case:
    """logits, in place."""
    logits_NV, labels_N = logits_and_labels(rows, stride, counted, spread, dtype)
    exact_NV = logits_NV.double()[:, :counted]
    log_z_N = exact_NV.logsumexp(1).float()
    from_softmax_N, from_loss_N = (values(rows, dtype=torch.float32, seed=seed) for seed in (3, 4))
    softmax_NV = (exact_NV - log_z_N.double()[:, None]).exp()
    onehot_NV = torch.arange(counted) == labels_N[:, None]
    part_NV = softmax_NV * from_softmax_N.double()[:, None]
    wanted_NV = torch.zeros(rows, stride, dtype=torch.float64)
    wanted_NV[:, :counted] = part_NV - onehot_NV * from_loss_N.double()[:, None]
    noise_NV = torch.zeros_like(wanted_NV)
    farthest_NV = 2 + (exact_NV - log_z_N[:, None]).abs() + log_z_N.abs()[:, None]
    noise_NV[:, :counted] = FP32 * (part_NV.abs() * farthest_NV + onehot_NV * from_loss_N.abs()[:, None]) + 1e-30
    arguments = {
        "labels": labels_N,
        "log_z": log_z_N,
        "from_softmax": from_softmax_N,
        "from_loss": from_loss_N,
        "logits": logits_NV,
        "rows": rows,
        "stride": stride,
        "counted": counted,
        "dtype": dtype,
    }
    return Case("ledom_cross_entropy_gradient", arguments, {"logits": Expected(wanted_NV, ulps=1.0, noise=noise_NV)})


CASES: dict[str, CaseMaker] = {
    **{f"terms-{name}": partial(terms, *shape, 2.0) for name, shape in SHAPES.items()},
    **{f"gradient-{name}": partial(gradient, *shape, 2.0) for name, shape in SHAPES.items()},
    "terms-far_apart": partial(terms, *SHAPES["padded"], 200.0),
    "gradient-far_apart": partial(gradient, *SHAPES["padded"], 200.0),
}

REFUSED = {
    "stride is not a multiple of 8": ("terms-padded", {"stride": 124}),
    "nothing counts": ("terms-padded", {"counted": 0}),
    "more counted than the row has": ("gradient-padded", {"counted": 129}),
    "negative rows": ("gradient-padded", {"rows": -1}),
    "no labels": ("terms-padded", {"labels": None}),
}

NARROW_ACCESSES = {"cross_entropy_terms": 5, "cross_entropy_gradient": 4}
"""Bytes of a row's label, its logit and three results; of its label and three factors."""

FILE = "cross_entropy/cross_entropy.cu"
MUTANTS = [
    Mutant("padding is counted", FILE, "if (i < present) more +=", "more +="),
    Mutant("the sum is not rescaled to the new maximum", FILE, "sum = sum * exp2f((largest - highest) * LOG2_E) + more", "sum += more"),
    Mutant("the threads' sums are not rescaled to the block's maximum", FILE, "sum * exp2f((largest - highest) * LOG2_E), scratch", "sum, scratch"),
    Mutant("padding gets a gradient", FILE, "start + i >= counted ? 0.f :", "false ? 0.f :"),
    Mutant("another rank's label counts", FILE, "label >= 0 ? reinterpret_cast", "true ? reinterpret_cast"),
    Mutant("groups of a later pass are skipped", FILE, "first += LOADS * THREADS", "first += groups"),
]  # fmt: skip
WARPS = 8


def moved(function: str, a: Mapping[str, Any]) -> Moved:
    """Count groups with a counted logit as read; every warp with a group reads its row's four numbers."""
    rows, labels, counted = a["rows"], a["labels"], a["counted"]
    groups = (counted + 7) // 8 * 16
    if function == "ledom_cross_entropy_terms":
        here = rows if labels is None else int((labels >= 0).sum())
        return Moved(rows * (groups + 8) + 2 * here, rows * 12, rows * (counted * 2 + 8), rows * 12)
    written, warps = rows * a["stride"] * 2, min(WARPS, (a["stride"] + 255) // 256)
    return Moved(rows * (groups + warps * 20), written, rows * (counted * 2 + 20), written)


def traffic_row(direction: str, counted: int) -> Row:
    sizes = {"rows": 8192, "stride": (counted + 127) // 128 * 128, "counted": counted, "labels": None}
    return Row(f"cross-entropy {direction}, 8192 x {counted}", f"ledom_cross_entropy_{direction}", sizes)


TRAFFIC_ROWS = [traffic_row(way, counted) for counted in (32_000, 100_352) for way in ("terms", "gradient")]

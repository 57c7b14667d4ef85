"""Cases of the segment reverse: equal, not close. Ids of two bytes and of four stand in for the two types of the other kernels."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from tests.kernels.cases import Case, CaseMaker, Expected, blank
from tests.kernels.mutants import Mutant
from tests.kernels.traffic import Moved, Row

ID_TYPES = {torch.bfloat16: torch.int16, torch.float16: torch.int32}
LENGTHS = {
    "one": [40],
    "one_id_each": [1] * 20,
    "short": [3, 0, 5, 1, 0, 0, 7, 2, 9],
    "long": [1000, 1, 777, 64, 8],
    "off_the_grid": [3, 501, 4, 502, 5],
    "whole_groups": [64, 128, 32],
    "empty_at_both_ends": [0, 17, 0],
    "more_than_a_block": [2100, 15, 1700],
}
CLOSED = ("short", "long", "whole_groups", "one_id_each")


def turned(ids: torch.Tensor, lengths: list[int], keep_last: bool) -> torch.Tensor:
    """What must come out, by indexing."""
    parts = []
    for part in ids.split(lengths):
        kept = len(part) - int(keep_last and len(part) > 0)
        parts.append(torch.cat((part[:kept].flip(0), part[kept:])))
    return torch.cat(parts)


def reverse(lengths: list[int], keep_last: bool, dtype: torch.dtype) -> Case:
    """reversed."""
    id_type, total = ID_TYPES[dtype], sum(lengths)
    ids = (torch.arange(total) * 7919 + 1).remainder(30_000).to(id_type)
    arguments = {
        "ids": ids,
        "bounds": torch.tensor([0, *lengths]).cumsum(0),
        "reversed": blank(total, dtype=id_type),
        "total": total,
        "documents": len(lengths),
        "keep_last": int(keep_last),
        "id_bytes": ids.element_size(),
    }
    return Case("ledom_segment_reverse", arguments, {"reversed": Expected(turned(ids, lengths, keep_last))})


CASES: dict[str, CaseMaker] = {
    **{f"open_documents-{name}": partial(reverse, lengths, False) for name, lengths in LENGTHS.items()},
    **{f"closed_documents-{name}": partial(reverse, LENGTHS[name], True) for name in CLOSED},
}

REFUSED = {
    "ids of one byte": ("open_documents-long", {"id_bytes": 1}),
    "ids without documents": ("open_documents-long", {"documents": 0}),
    "negative total": ("open_documents-long", {"total": -1}),
    "no bounds": ("open_documents-long", {"bounds": None}),
}

NARROW_ACCESSES = {"segment_reverse": 7}
"""The search in the bounds, and ids one by one where a group reaches over a document's end."""

FILE = "segment_reverse/segment_reverse.cu"
MUTANTS = [
    Mutant("the last id is turned, too", FILE, "const int64_t last = end - (keep_last ? 1 : 0), source", "const int64_t last = end, source"),
    Mutant("ids are shifted by one too few", FILE, "ids[j + IDS - 1 - i]", "ids[j + IDS - 2 - i + (i == IDS - 1)]"),
    Mutant("single ids are turned to another place", FILE, "? begin + last - 1 - position :", "? begin + last - position :"),
    Mutant("empty documents are not passed over", FILE, "while (position >= end) {", "if (position >= end) {"),
]  # fmt: skip


def moved(function: str, a: Mapping[str, Any]) -> Moved:
    """Of long documents: each group reads the two that its ids lie across, and searches the bounds, a warp mostly in one place."""
    size, total, documents = a["id_bytes"], a["total"], a["documents"]
    groups = total * size // 16
    steps = max(documents - 1, 0).bit_length() + 2
    bounds = groups // 32 * steps * 8
    return Moved(2 * total * size + bounds, total * size, total * size + 8 * (documents + 1), total * size)


TRAFFIC_ROWS = [
    Row(
        f"segment reverse, {1 << 24} ids of {size} bytes, 4096 documents",
        "ledom_segment_reverse",
        {"id_bytes": size, "total": 1 << 24, "documents": 4096},
        "a group's ids lie across two groups of the source, of which the second is the neighbour's first, and in the cache",
    )
    for size in (2, 4)
]

"""Cases of the segment reverse: equal, not close. Ids of two bytes and of four stand in for the two types of the other kernels."""

from functools import partial

import torch

from tests.kernels.cases import Case, CaseMaker, Expected, blank

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

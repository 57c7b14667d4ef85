"""Ids turned around inside the bounds of documents, in a flat buffer on a device: reference and operator.

Files are turned by csrc/helpers/turn_documents.h on the CPU, with the same result. Shape letters: T ids, D documents.
"""

import torch

from megatron_ledom.ops.library import backend, define

ID_DTYPES = (torch.int16, torch.uint16, torch.int32)


def segment_reverse_reference(ids_T: torch.Tensor, bounds_D1: torch.Tensor, keep_last: bool) -> torch.Tensor:
    """ids of each document [bounds[d], bounds[d + 1]) in the opposite order; with `keep_last` its last one stays at its end."""
    positions = torch.arange(len(ids_T), device=ids_T.device)
    documents = torch.searchsorted(bounds_D1, positions, right=True) - 1
    begins, ends = bounds_D1[documents], bounds_D1[documents + 1] - int(keep_last)
    return ids_T[torch.where(positions < ends, begins + ends - 1 - positions, positions)]


def segment_reverse(ids_T: torch.Tensor, bounds_D1: torch.Tensor, *, keep_last: bool) -> torch.Tensor:
    """The same by CUDA's kernel where it is built, else by the reference. bounds: int64 [D + 1], from 0 to T, not decreasing."""
    if ids_T.is_cuda and ids_T.dtype in ID_DTYPES and backend("cuda").usable:
        reversed_T: torch.Tensor = torch.ops.ledom.segment_reverse(ids_T.contiguous(), bounds_D1, keep_last)
        return reversed_T
    return segment_reverse_reference(ids_T, bounds_D1, keep_last)


def _fake(ids: torch.Tensor, bounds: torch.Tensor, keep_last: bool) -> torch.Tensor:
    return torch.empty_like(ids)


define("segment_reverse(Tensor ids, Tensor bounds, bool keep_last) -> Tensor", _fake, segment_reverse_reference)

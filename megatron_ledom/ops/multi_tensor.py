"""AdamW, norm and scaling of many tensors at once: references, operators, and the table of tensor addresses for the kernels.

Tensors of a list are contiguous, of one type and on one device. Letters: C chunks, L lists.
"""

from collections.abc import Sequence

import torch

from megatron_ledom.ops.library import define

CHUNK = 8192
"""Elements per thread block."""
GRID_BYTES = 16
"""The first address of a list is rounded down to a multiple of this; the binding does the same."""
Tensors = Sequence[torch.Tensor]


def are_alike(*lists: Tensors) -> bool:
    """Return True if the kernels support these lists: contiguous, on one device, one type per list, fp32 or a 16-bit type."""
    if not lists[0]:
        return False
    device, types = lists[0][0].device, {each[0].dtype for each in lists if each} - {torch.float32}
    return types in (set(), {torch.bfloat16}, {torch.float16}) and all(
        t.is_contiguous() and t.device == device and t.dtype == each[0].dtype for each in lists for t in each
    )


def chunk_table(*lists: Tensors) -> torch.Tensor:
    """Return int64 [C, 1 + L]: the elements of each chunk of a tensor, and its byte offset from each list's first tensor.

    The table is on the lists' device and is valid only for these tensors; with others a kernel would write to wrong addresses.
    Raises ValueError for lists that differ in length or sizes.
    """
    sizes = torch.tensor([t.numel() for t in lists[0]], dtype=torch.int64)
    chunks = (sizes + CHUNK - 1) // CHUNK
    of_tensor_C = torch.repeat_interleave(torch.arange(len(sizes)), chunks)
    begins_C = (torch.arange(len(of_tensor_C)) - (chunks.cumsum(0) - chunks)[of_tensor_C]) * CHUNK
    columns = [(sizes[of_tensor_C] - begins_C).clamp(max=CHUNK)]
    for tensors in lists:
        if [t.numel() for t in tensors] != sizes.tolist():
            raise ValueError("found lists of tensors of different sizes, expected each list to match the first")
        base = tensors[0].data_ptr() // GRID_BYTES * GRID_BYTES
        addresses = torch.tensor([t.data_ptr() - base for t in tensors], dtype=torch.int64)
        columns.append(addresses[of_tensor_C] + begins_C * tensors[0].element_size())
    return torch.stack(columns, 1).to(lists[0][0].device)


class ChunkTables:
    """Tables of lists that repeat in every step, recomputed only if a tensor has moved."""

    def __init__(self) -> None:
        self.tables: dict[object, tuple[list[tuple[int, int]], torch.Tensor]] = {}

    def table(self, use: object, *lists: Tensors) -> torch.Tensor:
        """Return the table of these lists; `use` identifies the caller."""
        where = [(t.data_ptr(), t.numel()) for tensors in lists for t in tensors]
        known = self.tables.get(use)
        if known is None or known[0] != where:
            known = self.tables[use] = (where, chunk_table(*lists))
        return known[1]


def adamw_reference(
    chunks: torch.Tensor,
    gradients: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    masters: Tensors,
    weights: Tensors,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    correction1: float,
    correction2: float,
    is_decoupled: bool,
) -> None:
    """Make one step of Adam in place; masters and moments are fp32. weights: empty, or tensors that get the rounded masters.

    correctionN is 1 - betaN ** step, or 1.
    """
    for i, (gradient, exp_avg, exp_avg_sq, master) in enumerate(zip(gradients, exp_avgs, exp_avg_sqs, masters, strict=True)):
        gradient = gradient.float() if is_decoupled else gradient.float() + weight_decay * master
        exp_avg.mul_(beta1).add_(gradient, alpha=1 - beta1)
        exp_avg_sq.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        if is_decoupled:
            master.mul_(1 - lr * weight_decay)
        master.addcdiv_(exp_avg, (exp_avg_sq / correction2).sqrt_().add_(eps), value=-lr / correction1)
        if weights:
            weights[i].copy_(master)


def norm_reference(chunks: torch.Tensor, tensors: Tensors) -> torch.Tensor:
    """Return the norm of all tensors together, fp32 [1]."""
    norms = torch.stack([torch.linalg.vector_norm(t.float()) for t in tensors])
    whole: torch.Tensor = torch.linalg.vector_norm(norms)
    return whole.view(1)


def scale_reference(chunks: torch.Tensor, sources: Tensors, targets: Tensors, scale: float) -> None:
    """Set targets = sources * scale; both may be the same tensors."""
    for source, target in zip(sources, targets, strict=True):
        target.copy_(source.float() * scale)


def _fake_norm(chunks: torch.Tensor, tensors: Tensors) -> torch.Tensor:
    return chunks.new_empty(1, dtype=torch.float32)


def _fake_nothing(*args: object) -> None:
    return None


define(
    "multi_tensor_adamw(Tensor chunks, Tensor[] gradients, Tensor(a!)[] exp_avgs, Tensor(b!)[] exp_avg_sqs, Tensor(c!)[] masters,"
    " Tensor(d!)[] weights, float lr, float beta1, float beta2, float eps, float weight_decay, float correction1,"
    " float correction2, bool is_decoupled) -> ()",
    _fake_nothing,
    adamw_reference,
)
define("multi_tensor_norm(Tensor chunks, Tensor[] tensors) -> Tensor", _fake_norm, norm_reference)
define(
    "multi_tensor_scale(Tensor chunks, Tensor[] sources, Tensor(a!)[] targets, float scale) -> ()",
    _fake_nothing,
    scale_reference,
)

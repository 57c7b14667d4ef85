"""Cross-entropy over a vocabulary split among tensor-parallel ranks, and the log-partition function of the z-loss.

Shape letters: S sequence, B batch, N tokens (S * B), V ids in this rank's slice of the vocabulary.

megatron-core's own loss keeps an fp32 copy of all logits for the backward pass, and counts the padding rows of the vocabulary.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from megatron_ledom.ops.library import check_alike, check_shape, cpu_kernels, define, is_bf16, runs_kernel

CHUNK_ELEMENTS = {"cpu": 1 << 17, "cuda": 1 << 27}
"""Logits converted to fp32 at once: on a CPU few enough for a core's cache, on a GPU enough for few launches."""
NOT_HERE = -1
"""Stands for a label outside this rank's slice."""


def vocab_parallel_cross_entropy(
    logits_SBV: torch.Tensor, labels_SB: torch.Tensor, vocab_size: int, group: dist.ProcessGroup, *, fused: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the negative log-likelihood of the labels and log Z = logsumexp of the logits, [S, B] in fp32, equal on all ranks.

    Only the `vocab_size` ids of the tokenizer count. Padding rows of the embedding, which the export omits, get no gradient.
    The backward pass writes the gradient into the memory of the logits, so nothing else may read them then; a second backward
    pass raises RuntimeError. `fused` allows the kernels of the logits' device.
    """
    losses, log_z = _CrossEntropy.apply(logits_SBV, labels_SB, vocab_size, group, fused)  # type: ignore[no-untyped-call]
    return losses, log_z


def _chunks(logits_NV: torch.Tensor) -> Iterator[slice]:
    """Return slices of tokens whose logits have at most CHUNK_ELEMENTS elements."""
    tokens, width = logits_NV.shape
    rows = max(1, CHUNK_ELEMENTS[logits_NV.device.type] // max(1, width))
    return (slice(start, min(start + rows, tokens)) for start in range(0, tokens, rows))


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, logits_SBV: torch.Tensor, labels_SB: torch.Tensor, vocab_size: int, group: dist.ProcessGroup, fused: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return loss and log Z [S, B]. Ranks combine their largest logits, then their sums of exponentials and label logits."""
        width = logits_SBV.shape[-1]
        start = group.rank() * width
        counted = min(max(vocab_size - start, 0), width)  # ids of this slice; the rest is padding
        logits_NV = logits_SBV.view(-1, width)
        here_N = labels_SB.reshape(-1) - start
        here_N = torch.where((here_N >= 0) & (here_N < counted), here_N, NOT_HERE)
        fused = fused and counted > 0 and runs_kernel(logits_NV)
        local_terms = torch.ops.ledom.cross_entropy_terms if fused else cross_entropy_terms_reference
        largest_N, sums_N, targets_N = local_terms(logits_NV, here_N, counted)
        highest_N = largest_N.clone()
        dist.all_reduce(highest_N, op=dist.ReduceOp.MAX, group=group)
        terms_2N = torch.stack([sums_N * (largest_N - highest_N).exp(), targets_N])
        dist.all_reduce(terms_2N, group=group)
        log_z_N = highest_N + terms_2N[0].log()
        ctx.save_for_backward(logits_SBV, here_N, log_z_N)
        ctx.counted, ctx.fused = counted, fused
        return (log_z_N - terms_2N[1]).view_as(labels_SB), log_z_N.view_as(labels_SB).clone()

    @staticmethod
    def backward(ctx: Any, from_loss_SB: torch.Tensor, from_log_z_SB: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        """Return the gradient of the logits: d loss = softmax - onehot and d log Z = softmax, each times the incoming gradient."""
        logits_SBV, here_N, log_z_N = ctx.saved_tensors
        logits_NV = logits_SBV.view(-1, logits_SBV.shape[-1])
        from_loss_N = from_loss_SB.reshape(-1).contiguous()
        from_softmax_N = from_loss_N + from_log_z_SB.reshape(-1)
        gradient_of = torch.ops.ledom.cross_entropy_gradient if ctx.fused else cross_entropy_gradient_reference
        gradient_of(logits_NV, here_N, log_z_N, from_softmax_N, from_loss_N, ctx.counted)
        torch.autograd.graph.increment_version(logits_NV)  # a kernel writes by address
        return logits_SBV, None, None, None, None


def cross_entropy_terms_reference(
    logits_NV: torch.Tensor, labels_N: torch.Tensor, counted: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the largest of the first `counted` logits, the sum of exp(logit - largest), and the logit at the label.

    Each is [N] in fp32. The logit of a label NOT_HERE is 0.
    """
    largest_N, sums_N, targets_N = logits_NV.new_empty((3, len(logits_NV)), dtype=torch.float32)
    if counted == 0:  # only padding
        return largest_N.fill_(-torch.inf), sums_N.fill_(0), targets_N.fill_(0)
    is_here_N = labels_N >= 0
    for rows in _chunks(logits_NV):
        logits = logits_NV[rows, :counted]
        part = logits.float()
        targets_N[rows] = torch.where(is_here_N[rows], part.gather(1, labels_N[rows, None].clamp(min=0))[:, 0], 0.0)
        torch.amax(part, 1, out=largest_N[rows])
        if part.data_ptr() == logits.data_ptr():  # fp32 already: the backward pass still needs the logits
            part = part - largest_N[rows, None]
        else:
            part.sub_(largest_N[rows, None])
        torch.sum(part.exp_(), 1, out=sums_N[rows])
    return largest_N, sums_N, targets_N


def cross_entropy_gradient_reference(
    logits_NV: torch.Tensor,
    labels_N: torch.Tensor,
    log_z_N: torch.Tensor,
    from_softmax_N: torch.Tensor,
    from_loss_N: torch.Tensor,
    counted: int,
) -> None:
    """Set logits = softmax * from_softmax - onehot * from_loss in place, and 0 after the first `counted`."""
    is_here_N = labels_N >= 0
    at_label_N, label_N = torch.where(is_here_N, -from_loss_N, 0.0), labels_N.clamp(min=0)
    for rows in _chunks(logits_NV) if counted else ():
        part = logits_NV[rows, :counted].float()
        part.sub_(log_z_N[rows, None]).exp_().mul_(from_softmax_N[rows, None])
        part.scatter_add_(1, label_N[rows, None], at_label_N[rows, None])
        logits_NV[rows, :counted] = part
    logits_NV[:, counted:] = 0


def _check(logits: torch.Tensor, counted: int, *of_rows: torch.Tensor) -> None:
    check_alike(logits)
    if not 0 < counted <= logits.shape[1]:
        raise ValueError(f"counted={counted}, expected 1 to {logits.shape[1]}")
    for tensor in of_rows:
        check_alike(tensor)
        check_shape("an array of rows", tensor, (len(logits),))


def _fake_terms(logits: torch.Tensor, labels: torch.Tensor, counted: int) -> tuple[torch.Tensor, ...]:
    return tuple(logits.new_empty(len(logits), dtype=torch.float32) for _ in range(3))


def _cpu_terms(logits: torch.Tensor, labels: torch.Tensor, counted: int) -> tuple[torch.Tensor, ...]:
    _check(logits, counted, labels)
    terms = _fake_terms(logits, labels, counted)
    addresses = [tensor.data_ptr() for tensor in (logits, labels, *terms)]
    cpu_kernels().cross_entropy_terms(is_bf16(logits), *addresses, *logits.shape, counted)
    return terms


def _fake_gradient(logits: torch.Tensor, *unused: Any) -> None:
    return None


def _cpu_gradient(
    logits: torch.Tensor,
    labels: torch.Tensor,
    log_z: torch.Tensor,
    from_softmax: torch.Tensor,
    from_loss: torch.Tensor,
    counted: int,
) -> None:
    of_rows = labels, log_z, from_softmax, from_loss
    _check(logits, counted, *of_rows)
    addresses = [tensor.data_ptr() for tensor in (logits, *of_rows)]
    cpu_kernels().cross_entropy_gradient(is_bf16(logits), *addresses, *logits.shape, counted)


define("cross_entropy_terms(Tensor logits, Tensor labels, int counted) -> (Tensor, Tensor, Tensor)", _fake_terms, _cpu_terms)
define(
    "cross_entropy_gradient(Tensor(a!) logits, Tensor labels, Tensor log_z, Tensor from_softmax, Tensor from_loss, int counted)"
    " -> ()",
    _fake_gradient,
    _cpu_gradient,
)

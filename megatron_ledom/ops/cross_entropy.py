"""Cross-entropy over a vocabulary that tensor-parallel ranks share, and the log-partition function that the z-loss needs.

Shape letters: S sequence, B batch, N tokens (S * B), V ids in this rank's slice of the vocabulary.

megatron-core's own keeps a copy of all logits in fp32 for the backward pass, and counts the rows that pad the vocabulary.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

CHUNK_ELEMENTS = {"cpu": 1 << 17, "cuda": 1 << 27}
"""Logits worked on at once in fp32: what stays in a core's cache, or few enough launches."""


def vocab_parallel_cross_entropy(
    logits_SBV: torch.Tensor, labels_SB: torch.Tensor, vocab_size: int, group: dist.ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor]:
    """Negative log-likelihood of the labels, and log Z = logsumexp of the logits, both [S, B] in fp32, equal on all ranks.

    Only the `vocab_size` ids of the tokenizer count: rows that pad the embedding take no part and get no gradient, as in
    the export, which has none. The backward pass writes the gradient into the memory of the logits, which nothing else may
    read by then; a second backward pass raises RuntimeError.
    """
    losses, log_z = _CrossEntropy.apply(logits_SBV, labels_SB, vocab_size, group)  # type: ignore[no-untyped-call]
    return losses, log_z


def _chunks(logits_NV: torch.Tensor) -> Iterator[slice]:
    """Slices of the tokens whose logits fit CHUNK_ELEMENTS."""
    tokens, width = logits_NV.shape
    rows = max(1, CHUNK_ELEMENTS[logits_NV.device.type] // max(1, width))
    return (slice(start, min(start + rows, tokens)) for start in range(0, tokens, rows))


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, logits_SBV: torch.Tensor, labels_SB: torch.Tensor, vocab_size: int, group: dist.ProcessGroup
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss and log Z [S, B]; what ranks exchange is the largest logit, then sum and label's logit of every token."""
        width = logits_SBV.shape[-1]
        start = group.rank() * width
        counted = min(max(vocab_size - start, 0), width)  # of this slice; the rest pads
        logits_NV = logits_SBV.reshape(-1, width)[:, :counted]
        here_N = labels_SB.reshape(-1) - start
        is_here_N = (here_N >= 0) & (here_N < counted)
        largest_N, sums_N, targets_N = _local_terms(logits_NV, torch.where(is_here_N, here_N, 0))
        highest_N = largest_N.clone()
        dist.all_reduce(highest_N, op=dist.ReduceOp.MAX, group=group)
        terms_2N = torch.stack([sums_N * (largest_N - highest_N).exp(), torch.where(is_here_N, targets_N, 0.0)])
        dist.all_reduce(terms_2N, group=group)
        log_z_N = highest_N + terms_2N[0].log()
        ctx.save_for_backward(logits_SBV, here_N, is_here_N, log_z_N)
        ctx.counted = counted
        return (log_z_N - terms_2N[1]).view_as(labels_SB), log_z_N.view_as(labels_SB).clone()

    @staticmethod
    def backward(ctx: Any, from_loss_SB: torch.Tensor, from_log_z_SB: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        """d loss = softmax - onehot, d log Z = softmax, each times what comes from above."""
        logits_SBV, here_N, is_here_N, log_z_N = ctx.saved_tensors
        gradient_NV = logits_SBV.view(-1, logits_SBV.shape[-1])
        from_loss_N = from_loss_SB.reshape(-1)
        from_softmax_N = from_loss_N + from_log_z_SB.reshape(-1)
        at_label_N = torch.where(is_here_N, -from_loss_N, 0.0)
        label_N = torch.where(is_here_N, here_N, 0)
        for rows in _chunks(gradient_NV) if ctx.counted else ():
            part = gradient_NV[rows, : ctx.counted].float()
            part.sub_(log_z_N[rows, None]).exp_().mul_(from_softmax_N[rows, None])
            part.scatter_add_(1, label_N[rows, None], at_label_N[rows, None])
            gradient_NV[rows, : ctx.counted] = part
        gradient_NV[:, ctx.counted :] = 0
        return logits_SBV, None, None, None


def _local_terms(logits_NV: torch.Tensor, label_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """This slice's largest logit, its sum of exp(logit - largest), and the logit at `label_N`; each [N] in fp32."""
    tokens, counted = logits_NV.shape
    largest_N, sums_N, targets_N = logits_NV.new_empty((3, tokens), dtype=torch.float32)
    if counted == 0:  # all of it pads
        return largest_N.fill_(-torch.inf), sums_N.fill_(0), targets_N.fill_(0)
    for rows in _chunks(logits_NV):
        part = logits_NV[rows].float()
        targets_N[rows] = part.gather(1, label_N[rows, None])[:, 0]
        torch.amax(part, 1, out=largest_N[rows])
        if part.data_ptr() == logits_NV[rows].data_ptr():  # fp32 already: the logits are needed for the backward pass
            part = part - largest_N[rows, None]
        else:
            part.sub_(largest_N[rows, None])
        torch.sum(part.exp_(), 1, out=sums_N[rows])
    return largest_N, sums_N, targets_N

"""Cross-entropy over a padded vocabulary in one process. tests/distributed/test_layouts.py tests a split vocabulary."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_ledom.ops import cross_entropy
from megatron_ledom.ops.cross_entropy import vocab_parallel_cross_entropy

SEQ, BATCH, IDS, ROWS = 7, 3, 50, 64
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-8}
"""Largest relative error of a gradient: bf16 rounds it once."""


@pytest.fixture(scope="module")
def group() -> Iterator[Any]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def inputs(dtype: torch.dtype, spread: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return logits [S, B, ROWS], labels, and incoming gradients of loss and log Z."""
    draw = torch.Generator().manual_seed(0)
    logits = (torch.randn(SEQ, BATCH, ROWS, generator=draw) * spread).to(dtype)
    labels = torch.randint(0, IDS, (SEQ, BATCH), generator=draw)
    labels[0] = torch.tensor([0, IDS - 1, 1])
    return logits, labels, torch.rand(SEQ, BATCH, generator=draw), torch.rand(SEQ, BATCH, generator=draw)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("spread", [1.0, 30.0, 1000.0])
@pytest.mark.parametrize("chunk", [1, 200, 1 << 17, None])  # None: by the kernel
def test_equals_torch_over_the_real_ids(
    group: Any, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, spread: float, chunk: int | None
) -> None:
    if chunk:
        monkeypatch.setitem(cross_entropy.CHUNK_ELEMENTS, "cpu", chunk)
    logits, labels, from_loss, from_log_z = inputs(dtype, spread)
    exact = logits.double()[..., :IDS].requires_grad_()
    wanted_loss = torch.nn.functional.cross_entropy(exact.flatten(0, 1), labels.flatten(), reduction="none").view(SEQ, BATCH)
    wanted_log_z = exact.logsumexp(-1)
    (wanted_loss * from_loss + wanted_log_z * from_log_z).sum().backward()
    leaf = logits.clone().requires_grad_()
    loss, log_z = vocab_parallel_cross_entropy(leaf * 1, labels, IDS, group, fused=chunk is None)
    torch.testing.assert_close(loss.double(), wanted_loss, rtol=1e-6, atol=1e-6 * spread)
    torch.testing.assert_close(log_z.double(), wanted_log_z, rtol=1e-6, atol=1e-6)
    (loss * from_loss + log_z * from_log_z).sum().backward()
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(leaf.grad[..., :IDS].double(), exact.grad, rtol=tolerance, atol=3e-5)
    assert (leaf.grad[..., IDS:] == 0).all()


@pytest.mark.parametrize("fused", [False, True])
def test_the_logits_do_not_change_before_the_backward_pass_uses_their_memory(group: Any, fused: bool) -> None:
    logits, labels, *_ = inputs(torch.float32, 1.0)
    leaf = logits.clone().requires_grad_()
    used = leaf * 1
    loss, _ = vocab_parallel_cross_entropy(used, labels, IDS, group, fused=fused)
    assert torch.equal(used, logits)
    loss.sum().backward(retain_graph=True)
    assert torch.equal(used, leaf.grad)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.sum().backward()


def test_a_slice_with_only_padding_adds_nothing(group: Any) -> None:
    logits, labels, *_ = inputs(torch.float32, 1.0)
    largest, sums, targets = cross_entropy.cross_entropy_terms_reference(logits.flatten(0, 1), labels.flatten(), 0)
    assert (largest == -torch.inf).all()
    assert not sums.any()
    assert not targets.any()

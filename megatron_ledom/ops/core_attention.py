"""Causal attention for layer specs without Transformer Engine: torch's scaled_dot_product_attention, or separate steps.

Shape letters: S sequence on this rank, T whole sequence, B batch, H query heads, G key-value heads, D head width.
"""

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.module import MegatronModule

from megatron_ledom.ops.causal_softmax import causal_softmax


class _GatherSequence(torch.autograd.Function):
    """All-gather along the first axis; the backward pass sums and scatters the gradient."""

    @staticmethod
    def forward(ctx: Any, part: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:  # type: ignore[override]
        """Map part [S / ranks, ...] to whole [S, ...], with the ranks' parts in rank order."""
        ctx.group = group
        part = part.contiguous()
        whole = part.new_empty((group.size() * part.shape[0], *part.shape[1:]))
        dist.all_gather_into_tensor(whole, part, group=group)
        return whole

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        """Map gradient [S, ...] to this rank's part of the sum over ranks [S / ranks, ...]."""
        rows = gradient.shape[0] // ctx.group.size()
        part = gradient.new_empty((rows, *gradient.shape[1:]))
        dist.reduce_scatter_tensor(part, gradient.contiguous(), group=ctx.group)
        return part, None


def visible_positions(queries: int, keys: int, documents_BT: torch.Tensor | None, device: torch.device) -> torch.Tensor:
    """Return the keys visible to each of the last `queries` positions, as a mask with True for visible.

    documents_BT [B, T]: the number of each position's document; None: one document. Returns [queries, keys], with documents
    [B, 1, queries, keys].
    """
    causal = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
    if documents_BT is None:
        return causal
    own = documents_BT[:, keys - queries : keys, None] == documents_BT[:, None, :keys]
    return (own & causal)[:, None]


class CausalCoreAttention(MegatronModule, ABC):  # type: ignore[misc]
    """softmax(QK^T / sqrt(D)) V under a causal mask; with documents, a position sees only its own document.

    Its two subclasses compute the attention. megatron-core's `attention_mask` is here the number of each position's document, [B, T]
    over the whole sequence. The mask itself is built only where it is used, so that samples need not contain T x T elements.

    With context parallelism each rank has the chunks `rank` and `2n - 1 - rank` of 2n chunks of the sequence, which balances the
    causal work. Keys and values are gathered from all ranks.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **unused: Any,
    ) -> None:
        super().__init__(config=config)
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"])
        self.context_group = groups.cp if config.context_parallel_size > 1 else None
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.scale = softmax_scale

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> torch.Tensor:
        """Map query [S, B, H, D], key and value [S, B, G, D] to [S, B, H * D]. attention_mask: None or documents [B, T]."""
        assert attention_bias is None, "not reachable from this package's training path"
        assert packed_seq_params is None, "not reachable from this package's training path"
        if self.context_group is not None:
            mixed_BHSD = self._attend_across_ranks(query, key, value, attention_mask)
        else:
            q_BHSD, k_BGSD, v_BGSD = (t.permute(1, 2, 0, 3) for t in (query, key, value))
            mixed_BHSD = self._attend(q_BHSD, k_BGSD, v_BGSD, attention_mask)
        return mixed_BHSD.permute(2, 0, 1, 3).flatten(2)

    @abstractmethod
    def _attend(
        self, q_BHSD: torch.Tensor, k_BGTD: torch.Tensor, v_BGTD: torch.Tensor, documents_BT: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the result of attention for the last S of T positions, [B, H, S, D]."""

    def _own_state(self) -> AbstractContextManager[Any]:
        """Return the random state of dropout: tensor-parallel ranks have different heads and must drop different elements.

        With sequence parallelism the transformer block has set the state already.
        """
        dropout = self.dropout if self.training else 0.0
        tracked: AbstractContextManager[Any] = get_cuda_rng_tracker().fork()
        return tracked if dropout and not self.config.sequence_parallel else nullcontext()

    def _attend_across_ranks(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, documents_BT: torch.Tensor | None
    ) -> torch.Tensor:
        group = self.context_group
        assert group is not None
        ranks, chunk = group.size(), query.shape[0] // 2
        chunks = [c for rank in range(ranks) for c in (rank, 2 * ranks - 1 - rank)]
        to_sequence = torch.tensor(chunks).argsort()
        gathered = _GatherSequence.apply(torch.stack((key, value), 1), group)  # type: ignore[no-untyped-call]
        whole_T2BGD = gathered.view(2 * ranks, chunk, *gathered.shape[1:])[to_sequence.to(key.device)].flatten(0, 1)
        k_BGTD, v_BGTD = (whole_T2BGD[:, i].permute(1, 2, 0, 3) for i in (0, 1))
        mixed = []
        for half, index in enumerate((group.rank(), 2 * ranks - 1 - group.rank())):
            q_BHSD = query[half * chunk : (half + 1) * chunk].permute(1, 2, 0, 3)
            end = (index + 1) * chunk
            mixed.append(self._attend(q_BHSD, k_BGTD[:, :, :end], v_BGTD[:, :, :end], documents_BT))
        return torch.cat(mixed, 2)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return nothing: there are no weights."""
        return {}


class SDPACoreAttention(CausalCoreAttention):
    """Attention by torch's scaled_dot_product_attention, whose kernels do not store the scores."""

    def _attend(
        self, q_BHSD: torch.Tensor, k_BGTD: torch.Tensor, v_BGTD: torch.Tensor, documents_BT: torch.Tensor | None
    ) -> torch.Tensor:
        queries, keys = q_BHSD.shape[2], k_BGTD.shape[2]
        plain = documents_BT is None and queries == keys
        with self._own_state():
            return F.scaled_dot_product_attention(
                q_BHSD,
                k_BGTD,
                v_BGTD,
                attn_mask=None if plain else visible_positions(queries, keys, documents_BT, q_BHSD.device),
                is_causal=plain,
                dropout_p=self.dropout if self.training else 0.0,
                scale=self.scale,
                enable_gqa=k_BGTD.shape[1] != q_BHSD.shape[1],
            )


class UnfusedCoreAttention(CausalCoreAttention):
    """Attention by matrix products and our causal softmax, with scores in memory: a fallback and a reference."""

    def _attend(
        self, q_BHSD: torch.Tensor, k_BGTD: torch.Tensor, v_BGTD: torch.Tensor, documents_BT: torch.Tensor | None
    ) -> torch.Tensor:
        (batch, heads, queries, width), (groups, keys) = q_BHSD.shape, k_BGTD.shape[1:3]
        scale = width**-0.5 if self.scale is None else self.scale
        grouped = (batch, groups, heads // groups * queries, width)  # the heads of a group are rows of one product
        scores_BHST = (q_BHSD.reshape(grouped) @ k_BGTD.transpose(2, 3)).view(batch, heads, queries, keys)
        documents_BT = None if documents_BT is None else documents_BT[:, :keys].to(torch.int32).contiguous()
        weights_BHST = causal_softmax(scores_BHST, scale, documents_BT)
        with self._own_state():
            weights_BHST = F.dropout(weights_BHST, self.dropout, self.training)
        return (weights_BHST.view(*grouped[:3], keys) @ v_BGTD).view(q_BHSD.shape)

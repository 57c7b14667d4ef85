"""Rotary positions (Su et al., arXiv 2104.09864, equation 34) on a fused QKV projection: reference, operator, attention module.

Shape letters: S sequence on this rank, B batch, G key-value groups, R query heads per group, H query heads (G * R), D head width.
megatron-core stores the projection as [S, B, G, (R + 2) * D]: the query heads, key and value of each group.
"""

import functools
from typing import Any

import torch
from megatron.core.transformer.attention import SelfAttention

from megatron_ledom.ops.library import check_alike, check_shape, cpu_kernels, define, define_gradient, is_bf16, runs_kernel

Heads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@functools.lru_cache(maxsize=8)
def rotary_tables(angles_S11D: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cos and sin [S, D / 2] in fp32 of megatron-core's angles [S, 1, 1, D], whose two halves are equal.

    Every layer gets the same tensor of angles, so the tables are cached by that tensor.
    """
    angles = angles_S11D[:, 0, 0, : angles_S11D.shape[-1] // 2].float()
    return angles.cos().contiguous(), angles.sin().contiguous()


def rope_reference(mixed_SBGM: torch.Tensor, angles_S11D: torch.Tensor) -> Heads:
    """Split a fused projection [S, B, G, (R + 2) * D] into query [S, B, H, D], key and value [S, B, G, D], and rotate.

    Query and key are rotated in fp32 and rounded once. angles [S, 1, 1, D]: megatron-core's, in fp32; the second half repeats the
    first.
    """
    width = angles_S11D.shape[-1]
    heads = mixed_SBGM.view(*mixed_SBGM.shape[:-1], -1, width)
    query, key, value = heads[..., :-2, :], heads[..., -2, :], heads[..., -1, :]
    cos, sin = (table[:, None, None, None] for table in rotary_tables(angles_S11D))

    def rotated(part: torch.Tensor) -> torch.Tensor:
        first, second = part.float().chunk(2, -1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(part.dtype)

    return rotated(query).flatten(2, 3), rotated(key[:, :, :, None])[:, :, :, 0], value


def rope(mixed_SBGM: torch.Tensor, angles_S11D: torch.Tensor) -> Heads:
    """Compute `rope_reference`, in one pass by the kernel of the projection's device if it can run."""
    if not runs_kernel(mixed_SBGM) or (mixed_SBGM.is_cuda and angles_S11D.shape[-1] % 16):
        return rope_reference(mixed_SBGM, angles_S11D)
    heads: Heads = torch.ops.ledom.rope(mixed_SBGM.contiguous(), angles_S11D)
    return heads


class FusedSelfAttention(SelfAttention):  # type: ignore[misc]
    """megatron-core's self-attention, which splits and rotates the projection in one pass, forward and backward."""

    angles: torch.Tensor | None = None

    def forward(self, hidden_states: torch.Tensor, attention_mask: Any, *args: Any, **kwargs: Any) -> Any:
        """Run megatron-core's attention; the angles `rotary_pos_emb` are applied when the projection is split."""
        self.angles = kwargs.pop("rotary_pos_emb", None)
        try:
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        finally:
            self.angles = None

    def get_query_key_value_tensors(
        self, hidden_states: torch.Tensor, key_value_states: Any = None, output_gate: bool = False, split_qkv: bool = True
    ) -> Heads:
        """Map hidden_states [S, B, hidden] to query [S, B, H, D], key and value [S, B, G, D] of this rank, rotated."""
        assert self.angles is not None, "this package's models have rotary positions"
        assert not output_gate, "not reachable from this package's configs"
        mixed, _ = super().get_query_key_value_tensors(hidden_states, split_qkv=False)
        query, key, value = rope(mixed, self.angles)
        if self.config.num_query_groups < self.world_size:  # ranks of one group have its key and a part of its queries
            ranks_per_group = self.world_size // self.config.num_query_groups
            query = query.chunk(ranks_per_group, 2)[self.pg_collection.tp.rank() % ranks_per_group]
        return query, key, value


def _sizes(mixed: torch.Tensor, angles: torch.Tensor) -> tuple[int, int, int, int, int]:
    """Return S, B, G, R, D."""
    width = angles.shape[-1]
    return (*mixed.shape[:3], mixed.shape[3] // width - 2, width)  # type: ignore[return-value]


def _fake(mixed: torch.Tensor, angles: torch.Tensor) -> Heads:
    s, b, groups, per_group, width = _sizes(mixed, angles)
    return (
        mixed.new_empty((s, b, groups * per_group, width)),
        mixed.new_empty((s, b, groups, width)),
        mixed.new_empty((s, b, groups, width)),
    )


def _run(mixed: torch.Tensor, heads: Heads, angles: torch.Tensor, *, backward: bool) -> None:
    """Call the CPU kernel; heads may have any strides, but the last must be 1."""
    sizes = _sizes(mixed, angles)
    check_alike(mixed)
    check_shape("mixed", mixed, (*sizes[:3], (sizes[3] + 2) * sizes[4]))
    check_shape("angles", angles, (sizes[0], 1, 1, sizes[4]))
    addresses = [tensor.data_ptr() for tensor in (mixed, *heads, *rotary_tables(angles))]
    cpu_kernels().rope(is_bf16(mixed), backward, addresses, sizes, *(head.stride()[:3] for head in heads))


def _cpu(mixed: torch.Tensor, angles: torch.Tensor) -> Heads:
    heads = _fake(mixed, angles)
    _run(mixed, heads, angles, backward=False)
    return heads


def _fake_backward(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    s, b, groups, width = key.shape
    return key.new_empty((s, b, groups, (query.shape[2] // groups + 2) * width))


def _cpu_backward(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    mixed = _fake_backward(query, key, value, angles)
    q, k, v = (head if head.stride(-1) == 1 else head.contiguous() for head in (query, key, value))
    heads = q, k, v
    for head, expected in zip(heads, _fake(mixed, angles), strict=True):
        check_shape("a gradient of heads", head, tuple(expected.shape))
        if head.dtype != mixed.dtype or head.device != mixed.device:
            raise ValueError(f"expected gradients of {mixed.dtype}, found {head.dtype} on {head.device}")
    _run(mixed, heads, angles, backward=True)
    return mixed


def _remember(ctx: Any, inputs: tuple[torch.Tensor, ...], output: Heads) -> None:
    ctx.save_for_backward(inputs[1])


def _backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
    return torch.ops.ledom.rope_backward(*gradients, *ctx.saved_tensors), None


define("rope(Tensor mixed, Tensor angles) -> (Tensor, Tensor, Tensor)", _fake, _cpu)
define("rope_backward(Tensor query, Tensor key, Tensor value, Tensor angles) -> Tensor", _fake_backward, _cpu_backward)
define_gradient("rope", _backward, _remember)

"""Initial weights that do not depend on the layout.

Each matrix is drawn whole, from a seed made of the run's seed, the weight's global name and its layer, and every rank
keeps its own part. One process and any tensor, pipeline or data-parallel layout therefore start from the same model.
"""

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import init_method_normal, scaled_init_method_normal

RESIDUAL_OUTPUTS = ("linear_proj.weight", "linear_fc2.weight")


def leave_unset(weight: torch.Tensor) -> torch.Tensor:
    """megatron-core's init method while the model is built: it draws nothing, because `initialize_weights` does.

    `perform_initialization=False` would do that too, but then weights lack their tensor-parallel marks, and the gradient
    norm counts only the first tensor-parallel rank.
    """
    return weight


@torch.no_grad()
def initialize_weights(model: MegatronModule, seed: int, metadata: dict[str, Any]) -> None:
    """Draw every matrix of one model chunk; vectors (norms) keep their ones.

    Standard deviations: `init_method_std`, and that over sqrt(2 layers) for what is added to the residual stream
    (Radford et al. 2019, section 2.3), both from the model's megatron-core config.
    """
    core_config = model.config
    plain = init_method_normal(core_config.init_method_std)
    scaled = scaled_init_method_normal(core_config.init_method_std, core_config.num_layers)
    drawn = set()
    for shard in _sharded_matrices(model.sharded_state_dict(metadata=metadata)):
        layers = shard.prepend_axis_num
        where = f"{seed}/{shard.key}/{tuple(shard.global_offset[:layers])}"
        whole = torch.empty(shard.global_shape[layers:], dtype=torch.float32)
        outer = torch.get_rng_state()
        torch.manual_seed(int.from_bytes(hashlib.sha256(where.encode()).digest()[:6], "little"))
        (scaled if shard.key.endswith(RESIDUAL_OUTPUTS) else plain)(whole)
        torch.set_rng_state(outer)
        for axis, (start, length) in enumerate(zip(shard.global_offset[layers:], shard.local_shape, strict=True)):
            whole = whole.narrow(axis, start, length)
        shard.data.copy_(whole)
        drawn.add(shard.data.untyped_storage().data_ptr())
    missed = [n for n, p in model.named_parameters() if p.dim() > 1 and p.untyped_storage().data_ptr() not in drawn]
    assert not missed, f"no initial values for {missed}"


def _sharded_matrices(state: Any) -> Iterator[ShardedTensor]:
    """Every matrix in a sharded state dict, gate and up projection apart, as views of the parameters."""
    if isinstance(state, ShardedTensorFactory):
        yield from _sharded_matrices(state.build())
    elif isinstance(state, ShardedTensor):
        if len(state.local_shape) > 1 and state.data is not None:
            yield state
    elif isinstance(state, dict):
        for value in state.values():
            yield from _sharded_matrices(value)
    elif isinstance(state, list | tuple):
        for value in state:
            yield from _sharded_matrices(value)

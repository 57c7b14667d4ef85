"""The transformer layer of our fused operators: attention's output is added to the residual stream and normed in one pass."""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer

BiasDropoutAdd = Callable[[tuple[torch.Tensor, torch.Tensor | None], torch.Tensor, float], torch.Tensor]


class FusedTransformerLayer(TransformerLayer):  # type: ignore[misc]
    """megatron-core's layer; where nothing stands between the sum and the norm before the MLP, one operator does both.

    Dropout stands between, and so does a norm that is computed again in the backward pass: there the layer is megatron-core's.
    """

    self_attn_bda: Callable[[bool, bool], BiasDropoutAdd]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._add_alone = self.self_attn_bda
        self._normed: torch.Tensor | None = None
        """Of this forward pass, between the sum and the norm; the sum goes by megatron-core's own path meanwhile."""
        if not self.recompute_pre_mlp_layernorm and not self.offload_attn_norm and not self.offload_mlp_norm:
            self.self_attn_bda = self._choose_add

    def _choose_add(self, training: bool, fused: bool) -> BiasDropoutAdd:
        alone = self._add_alone(training, fused)

        def add(x_with_bias: tuple[torch.Tensor, torch.Tensor | None], residual: torch.Tensor, dropout: float) -> torch.Tensor:
            """The sum [S, B, hidden]; its norm waits for the next call."""
            x, bias = x_with_bias
            if bias is not None or (training and dropout):
                return alone(x_with_bias, residual, dropout)
            added: torch.Tensor
            self._normed, added = self.pre_mlp_layernorm.add(x, residual)
            return added

        return add

    def _forward_pre_mlp_layernorm(self, hidden_states: torch.Tensor) -> torch.Tensor:
        normed, self._normed = self._normed, None
        if normed is None:
            normed = super()._forward_pre_mlp_layernorm(hidden_states)
        return normed

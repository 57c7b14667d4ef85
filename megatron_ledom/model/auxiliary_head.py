"""The head of an auxiliary loss, on the last hidden state of the model. Exports do not have it.

Shape letters: S positions on this rank, B batch, h hidden, W width of the state to predict.
"""

from typing import Any, Literal

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

HEAD = "auxiliary_head."
"""Beginning of the names of its weights."""


class AuxiliaryHead(MegatronModule):  # type: ignore[misc]
    """One matrix, or two with SiLU between them, split over the tensor-parallel ranks; each of them gets the whole prediction."""

    def __init__(self, core_config: TransformerConfig, shape: Literal["mlp", "linear"], width: int, collection: Any) -> None:
        super().__init__(core_config)
        hidden, inner, self._group = core_config.hidden_size, core_config.ffn_hidden_size, collection.tp
        shared = {
            "config": core_config,
            "init_method": core_config.init_method,
            "tp_group": collection.tp,
            "skip_bias_add": False,
        }
        self.inner: Any = None
        if shape == "mlp":
            self.inner = ColumnParallelLinear(hidden, inner, bias=False, **shared)
            self.outer: Any = RowParallelLinear(inner, width, bias=False, input_is_parallel=True, **shared)
        else:
            self.outer = ColumnParallelLinear(hidden, width, bias=False, gather_output=True, **shared)
        for weight in self.parameters():
            weight.is_embedding_or_output_parameter = True  # as of the output layer, which Muon leaves to AdamW

    def forward(self, hidden_SBh: torch.Tensor) -> torch.Tensor:
        """Return the prediction [S, B, W] for hidden states after the final norm, which sequence parallelism splits."""
        if self.inner is None:
            predicted, _ = self.outer(hidden_SBh)
            return torch.as_tensor(predicted)
        between, _ = self.inner(hidden_SBh)
        predicted, _ = self.outer(torch.nn.functional.silu(between))
        if (
            self.config.sequence_parallel
        ):  # every rank computes the same loss from the whole prediction, so gradients are not summed
            predicted = gather_from_sequence_parallel_region(predicted, tensor_parallel_output_grad=False, group=self._group)
        return torch.as_tensor(predicted)

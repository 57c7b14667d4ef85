"""The Hugging Face model of a folder, for the parity check: the whole model, or one layer at a time.

Stock transformers chooses the files, tensors and tied weights, without the reader of the conversion, so that the check can
find errors in the reader. Weights are memory-mapped; one layer at a time is converted to the type of the computation. The
folder needs no config.json, which an export writes last. Shape letters as in core_side.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedConfig

from megatron_ledom.convert.hf_folder import BLOCK_ELEMENTS
from megatron_ledom.errors import LedomError, VerificationError
from megatron_ledom.inference.model_folder import load_stock_model


class StockSide:
    """The stages of the stock transformers model."""

    def __init__(
        self,
        folder: str,
        config: PreTrainedConfig,
        vocab_size: int,
        *,
        folder_dtype: torch.dtype,
        dtype: torch.dtype = torch.float32,
        checkpoint_dtype: torch.dtype | None = None,
        whole: bool = True,
    ) -> None:
        """`folder_dtype`: type in which the folder's weights are loaded; weights of this type are memory-mapped, not copied.
        `checkpoint_dtype`: type of the weights in the checkpoint, to which they are rounded first; None: no rounding. `dtype`:
        type of the computation."""
        self.vocab_size, self.whole, self.dtype, self._checkpoint_dtype = vocab_size, whole, dtype, checkpoint_dtype
        self.config = copy.deepcopy(config)
        self.model = _load(folder, self.config, folder_dtype).eval()
        if whole:
            for weight in self.model.parameters():  # not the buffers: transformers keeps rotary frequencies in fp32
                weight.data = self._rounded(weight.data)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the logits [B, S, V] of ids [B, S] by the forward pass of the whole model."""
        logits: torch.Tensor = self.model(ids).logits
        return logits[..., : self.vocab_size].float()

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the embeddings [B, S, h] of ids [B, S]."""
        return self._rounded(self.model.model.embed_tokens(ids))

    @contextmanager
    def layer(self, index: int) -> Iterator[Any]:
        """Yield the decoder layer with its weights in the type of the computation, until the end of the context."""
        with self._computing(self.model.model.layers[index]) as layer:
            yield layer

    def run_layer(self, layer: Any, hidden: torch.Tensor) -> torch.Tensor:
        """Return hidden [B, S, h] after a layer that `self.layer` yielded."""
        positions = torch.arange(hidden.shape[1])[None]
        rotary = self.model.model.rotary_emb(hidden, position_ids=positions)
        after = layer(hidden, attention_mask=None, position_ids=positions, position_embeddings=rotary, use_cache=False)
        return torch.as_tensor(after[0] if isinstance(after, tuple) else after)

    def final_norm(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return hidden [B, S, h] after the final norm."""
        with self._computing(self.model.model.norm) as norm:
            return torch.as_tensor(norm(hidden))

    def head(self, normed: torch.Tensor) -> torch.Tensor:
        """Return the logits [B, S, V] of hidden states after the final norm [B, S, h]."""
        return self._over_vocabulary(normed, self.model.lm_head.weight)

    def embedding_as_head(self, normed: torch.Tensor) -> torch.Tensor:
        """Return the logits with the embedding as the output layer."""
        return self._over_vocabulary(normed, self.model.model.embed_tokens.weight)

    def _over_vocabulary(self, normed: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Return the logits [B, S, V] with the rows of a matrix, converted block by block to the type of the computation."""
        step = self.vocab_size if self.whole else max(1, BLOCK_ELEMENTS // normed.shape[-1])
        blocks = torch.split(weight[: self.vocab_size], step)
        return torch.cat([torch.nn.functional.linear(normed, self._rounded(block)).float() for block in blocks], -1)

    @contextmanager
    def _computing(self, module: Any) -> Iterator[Any]:
        """Yield a module whose weights have the type of the computation inside the context."""
        original = {name: weight.data for name, weight in module.named_parameters()}
        try:
            for weight in module.parameters():
                weight.data = self._rounded(weight.data)
            yield module
        finally:
            for name, weight in module.named_parameters():
                weight.data = original[name]

    def _rounded(self, weight: torch.Tensor) -> torch.Tensor:
        return (weight if self._checkpoint_dtype is None else weight.to(self._checkpoint_dtype)).to(self.dtype)


def _load(folder: str, config: PreTrainedConfig, dtype: torch.dtype) -> Any:
    """Return the model as stock transformers loads it. Raises VerificationError if a weight is missing or has another shape."""
    try:
        return load_stock_model(folder, config=config, dtype=dtype, attn_implementation="sdpa")
    except LedomError as error:
        raise VerificationError(f"{error}; nothing was written") from error

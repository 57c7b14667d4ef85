"""The Hugging Face model of a folder, as stock transformers loads and computes it: whole, or one layer at a time.

Nothing here shares the reader of a conversion: which files, tensors and ties count is decided by stock transformers, so that a
fault of the reader shows. Weights are mapped from their files; one layer at a time has the type that is computed in.
The folder needs no config.json: one that is being written gets it last. Shape letters as in core_side.
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
    """The stages of the stock model."""

    def __init__(
        self,
        folder: str,
        config: PreTrainedConfig,
        vocab_size: int,
        *,
        held: torch.dtype,
        dtype: torch.dtype = torch.float32,
        stored: torch.dtype | None = None,
        whole: bool = True,
    ) -> None:
        """`held`: the type of the folder's weights, which are mapped, not copied, where they have it. `stored`: the type that the
        weights are rounded to first, if the other side stores them so; default: not at all. `dtype`: computed in."""
        self.vocab_size, self.whole, self.dtype, self._stored = vocab_size, whole, dtype, stored
        self.config = copy.deepcopy(config)
        self.model = _load(folder, self.config, held).eval()
        if whole:
            for weight in self.model.parameters():  # not its buffers: transformers keeps rotary frequencies in fp32
                weight.data = self._rounded(weight.data)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids [B, S] -> logits [B, S, V] by the model's own forward pass; a whole model only."""
        logits: torch.Tensor = self.model(ids).logits
        return logits[..., : self.vocab_size].float()

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """ids [B, S] -> hidden [B, S, h]."""
        return self._rounded(self.model.model.embed_tokens(ids))

    @contextmanager
    def layer(self, index: int) -> Iterator[Any]:
        """The decoder layer with its weights in the type that is computed in; held no longer than the context."""
        with self._computing(self.model.model.layers[index]) as layer:
            yield layer

    def run_layer(self, layer: Any, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [B, S, h] through one layer of `layer`."""
        positions = torch.arange(hidden.shape[1])[None]
        rotary = self.model.model.rotary_emb(hidden, position_ids=positions)
        after = layer(hidden, attention_mask=None, position_ids=positions, position_embeddings=rotary, use_cache=False)
        return torch.as_tensor(after[0] if isinstance(after, tuple) else after)

    def final_norm(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [B, S, h] -> the same shape."""
        with self._computing(self.model.model.norm) as norm:
            return torch.as_tensor(norm(hidden))

    def head(self, normed: torch.Tensor) -> torch.Tensor:
        """hidden behind the final norm [B, S, h] -> logits [B, S, V]."""
        return self._over_vocabulary(normed, self.model.lm_head.weight)

    def embedding_as_head(self, normed: torch.Tensor) -> torch.Tensor:
        """Logits as `head` would give them if the embedding were the output layer."""
        return self._over_vocabulary(normed, self.model.model.embed_tokens.weight)

    def _over_vocabulary(self, normed: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Logits [B, S, V] by the rows of a matrix, a block of them in the type that is computed in at a time."""
        step = self.vocab_size if self.whole else max(1, BLOCK_ELEMENTS // normed.shape[-1])
        blocks = torch.split(weight[: self.vocab_size], step)
        return torch.cat([torch.nn.functional.linear(normed, self._rounded(block)).float() for block in blocks], -1)

    @contextmanager
    def _computing(self, module: Any) -> Iterator[Any]:
        """A module whose weights have, inside, the type that is computed in."""
        held = {name: weight.data for name, weight in module.named_parameters()}
        try:
            for weight in module.parameters():
                weight.data = self._rounded(weight.data)
            yield module
        finally:
            for name, weight in module.named_parameters():
                weight.data = held[name]

    def _rounded(self, weight: torch.Tensor) -> torch.Tensor:
        return (weight if self._stored is None else weight.to(self._stored)).to(self.dtype)


def _load(folder: str, config: PreTrainedConfig, dtype: torch.dtype) -> Any:
    """As everybody loads it; a weight that is missing, or has another shape, is an error here. Raises VerificationError."""
    try:
        return load_stock_model(folder, config=config, dtype=dtype, attn_implementation="sdpa")
    except LedomError as error:
        raise VerificationError(f"{error}; nothing was written") from error

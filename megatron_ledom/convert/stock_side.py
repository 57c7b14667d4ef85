"""The Hugging Face model of a folder, computed by stock transformers: whole, or one layer at a time.

The folder needs no config.json: one that is being written gets it last. Shape letters as in core_side.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from megatron_ledom.convert.hf_folder import BLOCK_ELEMENTS, EMBEDDING, WeightsReader
from megatron_ledom.errors import VerificationError

HEAD, FINAL_NORM = "lm_head.weight", "model.norm.weight"


class StockSide:
    """The stages of the stock model."""

    def __init__(
        self,
        folder: str,
        config: PreTrainedConfig,
        vocab_size: int,
        *,
        dtype: torch.dtype = torch.float32,
        stored: torch.dtype | None = None,
        whole: bool = True,
    ) -> None:
        """`stored`: the type that the weights are rounded to first, if the other side stores them so; default: not at all."""
        self.vocab_size, self.whole, self.dtype, self._stored = vocab_size, whole, dtype, stored
        self.tied = bool(config.tie_word_embeddings)
        self.config = copy.deepcopy(config)
        if whole:
            self.model = _load_whole(folder, self.config, stored or dtype).to(dtype).eval()
            return
        self._reader = WeightsReader(folder)
        self.config.num_hidden_layers, self.config.vocab_size = 1, 1
        self.config.pad_token_id = None
        if getattr(self.config, "layer_types", None):
            self.config.layer_types = self.config.layer_types[:1]
        self.model = AutoModelForCausalLM.from_config(self.config, dtype=dtype, attn_implementation="sdpa").eval()
        self.model.model.layers[0].to("meta")

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids [B, S] -> logits [B, S, V] by the model's own forward pass; a whole model only."""
        logits: torch.Tensor = self.model(ids).logits
        return logits[..., : self.vocab_size].float()

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """ids [B, S] -> hidden [B, S, h]."""
        if self.whole:
            return torch.as_tensor(self.model.model.embed_tokens(ids))
        rows = {int(number): self._rows(EMBEDDING, int(number), int(number) + 1)[0] for number in set(ids.flatten().tolist())}
        return torch.stack([rows[int(number)] for number in ids.flatten()]).view(*ids.shape, -1)

    @contextmanager
    def layer(self, index: int) -> Iterator[Any]:
        """The decoder layer with its weights; held no longer than the context."""
        if self.whole:
            yield self.model.model.layers[index]
            return
        layer = self.model.model.layers[0]
        layer.to_empty(device="cpu")
        prefix = f"model.layers.{index}."
        for name, weight in layer.state_dict().items():
            self._fill(weight, prefix + name)
        yield layer
        layer.to("meta")

    def run_layer(self, layer: Any, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [B, S, h] through one layer of `layer`."""
        positions = torch.arange(hidden.shape[1])[None]
        rotary = self.model.model.rotary_emb(hidden, position_ids=positions)
        after = layer(hidden, attention_mask=None, position_ids=positions, position_embeddings=rotary, use_cache=False)
        return torch.as_tensor(after[0] if isinstance(after, tuple) else after)

    def final_norm(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [B, S, h] -> the same shape."""
        norm = self.model.model.norm
        if not self.whole:
            self._fill(norm.weight, FINAL_NORM)
        return torch.as_tensor(norm(hidden))

    def head(self, normed: torch.Tensor) -> torch.Tensor:
        """hidden behind the final norm [B, S, h] -> logits [B, S, V]."""
        if self.whole:
            return torch.as_tensor(self.model.lm_head(normed))[..., : self.vocab_size].float()
        name = EMBEDDING if self.tied else HEAD
        step = max(1, BLOCK_ELEMENTS // normed.shape[-1])
        ends = [min(start + step, self.vocab_size) for start in range(0, self.vocab_size, step)]
        parts = [
            torch.nn.functional.linear(normed, self._rows(name, start, end)).float()
            for start, end in zip([0, *ends], ends, strict=False)
        ]
        return torch.cat(parts, -1)

    def embedding_as_head(self, normed: torch.Tensor) -> torch.Tensor:
        """What `head` would give if the embedding were the output layer."""
        if self.whole:
            return torch.nn.functional.linear(normed, self.model.model.embed_tokens.weight)[..., : self.vocab_size].float()
        return torch.nn.functional.linear(normed, self._rows(EMBEDDING, 0, self.vocab_size)).float()

    def _fill(self, weight: torch.Tensor, name: str) -> None:
        stored = self._reader.read(name)
        if stored.shape != weight.shape:
            raise VerificationError(
                f"{name} has shape {tuple(stored.shape)}, stock transformers expects {tuple(weight.shape)}; nothing was written"
            )
        weight.copy_(self._rounded(stored))

    def _rows(self, name: str, start: int, end: int) -> torch.Tensor:
        return self._rounded(self._reader.read_rows(name, start, end))

    def _rounded(self, weight: torch.Tensor) -> torch.Tensor:
        return (weight if self._stored is None else weight.to(self._stored)).to(self.dtype)


def _load_whole(folder: str, config: PreTrainedConfig, dtype: torch.dtype) -> Any:
    """As everybody loads it; a weight that is missing, or has another shape, is an error here. Raises VerificationError."""
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            local_files_only=True,
            attn_implementation="sdpa",
            output_loading_info=True,
        )
    except RuntimeError as error:  # a weight of another shape
        raise VerificationError(
            f"{folder} does not load in stock transformers, nothing was written: {str(error).strip().splitlines()[-1]}"
        ) from error
    faults = {kind: sorted(map(str, names)) for kind, names in report.items() if names}
    if faults:
        raise VerificationError(f"{folder} does not load whole in stock transformers, nothing was written: {faults}")
    return model

"""The megatron-core model of a checkpoint, for the parity check: the whole model, or one layer at a time.

Weights are found by the names of megatron-core, without the rules of the conversion, so that the check can find errors in the
rules. Shape letters: B batch, S sequence, h hidden, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from megatron_ledom.checkpoint.averaging import EMA
from megatron_ledom.checkpoint.manifest import CheckpointManifest
from megatron_ledom.checkpoint.store import EXTRA_STATE, load_weights
from megatron_ledom.checkpoint.stored_tensors import StoredTensors
from megatron_ledom.config.derived import padded_vocab_size
from megatron_ledom.config.schema import ParallelConfig, RunConfig
from megatron_ledom.convert.hf_folder import BLOCK_ELEMENTS
from megatron_ledom.model.builder import build_model_chunks, checkpoint_metadata
from megatron_ledom.model.dtypes import PARAMS_DTYPES
from megatron_ledom.model.layer_specs import LayerChoice
from megatron_ledom.parallel.groups import ParallelGroups, start_distributed, stop_distributed
from megatron_ledom.platform.device import prepare_platform
from megatron_ledom.platform.launch import ALONE

FP32 = torch.float32


class CoreSide:
    """The stages of the megatron-core model. The function `core_side` makes one."""

    def __init__(
        self,
        checkpoint: str,
        config: RunConfig,
        vocab_size: int,
        groups: ParallelGroups,
        dtype: torch.dtype,
        whole: bool,
        rounded_ema: torch.dtype | None,
    ) -> None:
        """rounded_ema: the type to which the moving average, read in place of the weights, is rounded; None for the weights."""
        self.checkpoint, self.vocab_size, self.whole, self.dtype = checkpoint, vocab_size, whole, dtype
        self.num_layers, self.hidden_size = config.model.num_layers, config.model.hidden_size
        self.padded_vocab = padded_vocab_size(vocab_size, config.model.make_vocab_size_divisible_by)
        self.tied = config.model.share_embeddings_and_output_weights
        self._metadata = checkpoint_metadata(groups)
        self._prefix, self._rounded = ("" if rounded_ema is None else f"{EMA}."), rounded_ema
        if not whole:
            config = replace(config, model=replace(config.model, num_layers=1, make_vocab_size_divisible_by=1))
        ids = vocab_size if whole else 1
        (self.model,) = build_model_chunks(config, ids, groups, LayerChoice("torch", "conversion"), initialize=False)
        self.model.eval()
        self._device = next(self.model.parameters()).device
        if whole:
            load_weights(checkpoint, [self.model], self._metadata, self._prefix)
            for value in self.model.parameters():
                self._round(value)
        else:
            self._stored = StoredTensors(checkpoint)
            self.model.decoder.layers[0].to("meta")

    def _fill(self, target: torch.Tensor, key: str, layer: int | None = None, first_row: int = 0) -> None:
        """Fill `target` with a weight of the checkpoint, or with its moving average."""
        self._stored.fill(target, self._prefix + key, layer, first_row)
        self._round(target)

    def _round(self, value: torch.Tensor) -> None:
        """Round a moving average, which is stored in fp32, to the type in which it is exported."""
        if self._rounded is not None:
            value.copy_(value.to(self._rounded))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the logits [B, S, V] of ids [B, S] by the forward pass of the whole model."""
        positions = torch.arange(ids.shape[1]).expand_as(ids)
        logits = self.model(ids.to(self._device), positions.to(self._device), None)[:, :, : self.vocab_size]
        return torch.as_tensor(logits).float().cpu()

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the embeddings [B, S, h] of ids [B, S]."""
        if self.whole:
            embedding = self.model.embedding.word_embeddings.weight
            return torch.as_tensor(embedding.detach()[ids.to(self._device)]).cpu()
        hidden = torch.empty(*ids.shape, self.hidden_size, dtype=self.dtype)
        for start, rows in self._blocks("embedding.word_embeddings.weight"):
            inside = (ids >= start) & (ids < start + len(rows))
            hidden[inside] = rows[ids[inside] - start]
        return hidden

    @contextmanager
    def layer(self, index: int) -> Iterator[Any]:
        """Yield the TransformerLayer with its weights, which are freed at the end of the context."""
        if self.whole:
            yield self.model.decoder.layers[index]
            return
        layer = self.model.decoder.layers[0]
        layer.to_empty(device=self._device)
        names = layer.sharded_state_dict("", [], self._metadata)
        for name, value in layer.state_dict().items():
            if not name.endswith(EXTRA_STATE):
                self._fill(value, "decoder.layers." + names[name].key, index)
        yield layer
        layer.to("meta")

    def run_layer(self, layer: Any, hidden: torch.Tensor) -> torch.Tensor:
        """Return hidden [B, S, h] after a layer that `self.layer` yielded."""
        rotary = self.model.rotary_pos_emb(hidden.shape[1])
        after, _ = layer(hidden.transpose(0, 1).contiguous().to(self._device), attention_mask=None, rotary_pos_emb=rotary)
        return torch.as_tensor(after).transpose(0, 1).cpu()

    def final_norm(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return hidden [B, S, h] after the final norm."""
        norm = self.model.decoder.final_layernorm
        if not self.whole:
            self._fill(norm.weight.data, "decoder.final_layernorm.weight")
        return torch.as_tensor(norm(hidden.to(self._device))).detach().cpu()

    def head(self, normed: torch.Tensor) -> torch.Tensor:
        """Return the logits [B, S, V] of hidden states after the final norm [B, S, h]."""
        if self.whole:
            weight = self.model.shared_embedding_or_output_weight() if self.tied else self.model.output_layer.weight
            return torch.nn.functional.linear(normed.to(self._device), weight)[..., : self.vocab_size].float().cpu()
        key = "embedding.word_embeddings.weight" if self.tied else "output_layer.weight"
        parts = [torch.nn.functional.linear(normed, rows).float() for _, rows in self._blocks(key)]
        return torch.cat(parts, -1)[..., : self.vocab_size]

    def _blocks(self, key: str) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield (first row, rows) of a matrix over the vocabulary, block by block."""
        step = max(1, BLOCK_ELEMENTS // self.hidden_size)
        for start in range(0, self.padded_vocab, step):
            rows = torch.empty(min(step, self.padded_vocab - start), self.hidden_size, dtype=self.dtype)
            self._fill(rows, key, first_row=start)
            yield start, rows


@contextmanager
def core_side(
    checkpoint: str, manifest: CheckpointManifest, *, dtype: torch.dtype = FP32, whole: bool = True, ema: bool = False
) -> Iterator[CoreSide]:
    """Yield the model of a checkpoint of any layout, without gradients. Its process group ends with the context.

    ema: with the moving average of the weights, rounded to the type of the weights.
    """
    trained = manifest.run_config(checkpoint)
    config = replace(
        trained,
        parallel=ParallelConfig(),
        model=replace(
            trained.model,
            params_dtype="bf16" if dtype is torch.bfloat16 else "fp32",
            transformer_impl="torch",
            fp8=None,
            mtp_num_layers=None,  # an export has no modules of multi-token prediction
        ),
    )
    platform = prepare_platform(config.train.num_threads, ALONE)
    groups = start_distributed(platform, config.parallel, ALONE)
    try:
        with torch.no_grad():
            rounded_ema = PARAMS_DTYPES[trained.model.params_dtype] if ema else None
            yield CoreSide(checkpoint, config, manifest.provenance.vocab_size, groups, dtype, whole, rounded_ema)
    finally:
        stop_distributed()

"""Loss and bits per byte of each validation shard."""

import math
from typing import Any

import torch

from megatron_ledom.data.batch import batch_iterators
from megatron_ledom.data.sources import Source
from megatron_ledom.parallel.gathering import gathered_weights
from megatron_ledom.training.state import TrainState
from megatron_ledom.training.step import run_schedule

ValidationResult = dict[str, dict[str, float]]


@torch.no_grad()
def validate(state: TrainState) -> ValidationResult:
    """Every validation shard over its first samples: {prefix: {lm_loss, bits_per_byte}}. Call on every rank."""
    sources = {source.prefix: source for source in state.sources.valid}
    for chunk in state.model:
        chunk.eval()
    with gathered_weights(state.model):
        result = {prefix: _measure(state, sources[prefix], dataset) for prefix, dataset in state.valid_datasets.items()}
    for chunk in state.model:
        chunk.train()
    return result


def _measure(state: TrainState, source: Source, dataset: Any) -> dict[str, float]:
    batch = state.config.train.global_batch_size
    # a blended dataset of one shard may hold a few samples more than asked for
    batches = min(len(dataset) // batch, state.config.train.eval_iters)
    device, eod_id = state.platform.device, state.provenance.eod_id
    iterators = batch_iterators(state.config, dataset, 0, batches * batch, state.groups, device, eod_id)
    loss_sum, num_tokens = 0.0, 0.0
    for _ in range(batches):
        one_sum, one_count = run_schedule(state.config, state.model, iterators, state.groups, forward_only=True)
        loss_sum, num_tokens = loss_sum + one_sum, num_tokens + one_count
    lm_loss = loss_sum / num_tokens
    return {"lm_loss": lm_loss, "bits_per_byte": bits_per_byte(lm_loss, source.manifest.num_tokens, source.manifest.text_bytes)}


def bits_per_byte(lm_loss: float, num_tokens: int, text_bytes: int) -> float:
    """Mean loss in nats a token -> bits a UTF-8 byte of text, by the shard's own ratio of tokens (eod too) to bytes."""
    return lm_loss / math.log(2) * num_tokens / text_bytes

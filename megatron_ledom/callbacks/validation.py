"""Loss and bits per byte of each held-out set."""

import math

import torch

from megatron_ledom.data.dataset.batch import batch_iterators
from megatron_ledom.data.dataset.dataset import BlendSamples
from megatron_ledom.parallel.collectives import gathered_weights
from megatron_ledom.training.state import TrainState
from megatron_ledom.training.trainer import run_schedule

ValidationResult = dict[str, dict[str, float]]


def validate(state: TrainState) -> ValidationResult:
    """Every validation set over its first samples: {name: {lm_loss, bits_per_byte}}. Call on every rank."""
    return evaluate(state, state.valid_datasets)


@torch.no_grad()
def evaluate(state: TrainState, datasets: dict[str, BlendSamples]) -> ValidationResult:
    """Loss and bits per byte of all samples of each dataset, by its name. Call on every rank."""
    for chunk in state.model:
        chunk.eval()
    with gathered_weights(state.model):
        result = {name: _measure(state, dataset) for name, dataset in datasets.items()}
    for chunk in state.model:
        chunk.train()
    return result


def _measure(state: TrainState, dataset: BlendSamples) -> dict[str, float]:
    device, eod_id = state.platform.device, state.provenance.eod_id
    iterators = batch_iterators(state.config, dataset, 0, len(dataset), state.groups, device, eod_id)
    loss_sum, num_tokens = 0.0, 0.0
    for _ in range(len(dataset) // state.config.train.global_batch_size):
        one_sum, one_count = run_schedule(state.config, state.model, iterators, state.groups, forward_only=True)
        loss_sum, num_tokens = loss_sum + one_sum, num_tokens + one_count
    lm_loss = loss_sum / num_tokens
    return {
        "lm_loss": lm_loss,
        "bits_per_byte": bits_per_byte(lm_loss, dataset.blend.bytes_per_token(state.config.data.loss_tokens)),
    }


def bits_per_byte(lm_loss: float, bytes_per_token: float) -> float:
    """Mean loss in nats a token -> bits a UTF-8 byte of text.

    The bytes of the very samples are not known, so each shard's own ratio of bytes to tokens (eod too) stands for its part in
    the set, be it a split of its documents or the first samples of all of them.
    """
    return lm_loss / math.log(2) / bytes_per_token

"""Multi-token prediction: the layer spec of megatron-core's module (DeepSeek-V3, arXiv 2412.19437, section 2.2), and its losses.

Module k predicts the token k + 1 places after a position, from the state of module k - 1 there and the embedding of the token k
places after it. It has a layer of its own, and the embedding and the output layer of the model.
"""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_mtp_block_spec
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_ledom.parallel.groups import ParallelGroups
from megatron_ledom.platform.core_versions import mtp_loss_key


def build_mtp_spec(core_config: TransformerConfig, layers: Any, chunk: int | None) -> Any:
    """Return the spec of the modules of a model chunk with the layer spec `layers`; None without modules."""
    if not core_config.mtp_num_layers:
        return None
    ours = hasattr(layers, "layer_specs")
    spec = get_gpt_mtp_block_spec(core_config, layers, use_transformer_engine=not ours, vp_stage=chunk)
    for each in spec.layer_specs if spec is not None and ours else ():
        own = each.submodules  # megatron-core's local norm would be LayerNorm with apex
        own.enorm = own.hnorm = own.layer_norm = layers.layer_norm
    return spec


def clear_mtp_losses() -> None:
    """Forget the losses of earlier micro-batches."""
    MTPLossLoggingHelper.tracker.clear()


def mtp_losses(num_modules: int, num_microbatches: int, groups: ParallelGroups, device: torch.device) -> list[float]:
    """Return the loss of each module in nats per token, the mean over the micro-batches since `clear_mtp_losses`.

    Call on every rank. Only the last pipeline stage has losses.
    """
    found = MTPLossLoggingHelper.tracker.get(mtp_loss_key())
    total = torch.zeros(num_modules, dtype=torch.float64, device=device)
    if found is not None:
        total += found
    dist.all_reduce(total, group=groups.data_and_context)
    dist.all_reduce(total, group=groups.pipeline)
    return (total / (num_microbatches * groups.data_and_context.size())).tolist()

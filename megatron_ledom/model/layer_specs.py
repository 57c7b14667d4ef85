"""Which implementation each transformer layer is made of: Transformer Engine's, or plain torch's."""

import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_layer_with_transformer_engine_spec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_ledom.config.schema import RunConfig
from megatron_ledom.errors import ConfigError
from megatron_ledom.ops.core_attention import SDPACoreAttention
from megatron_ledom.ops.rms_norm import TorchRMSNorm


@dataclass(frozen=True, slots=True)
class LayerChoice:
    """The implementation taken, and why: one line of the log."""

    implementation: str
    reason: str


def choose_layers(config: RunConfig) -> LayerChoice:
    """Transformer Engine where it is installed and CUDA is there, unless the config names one. Raises ConfigError."""
    wanted = config.model.transformer_impl
    installed = importlib.util.find_spec("transformer_engine") is not None
    usable = installed and torch.cuda.is_available()
    state = f"Transformer Engine {'installed' if installed else 'not installed'}"
    state += f", CUDA {'there' if torch.cuda.is_available() else 'absent'}"
    if wanted == "transformer_engine" and not usable:
        raise ConfigError(
            f"model.transformer_impl=transformer_engine cannot run here: {state}; install it, or use torch or auto"
        )
    if config.data.reset_attention_mask and (wanted == "transformer_engine" or (wanted == "auto" and usable)):
        if wanted == "transformer_engine":
            raise ConfigError(
                "data.reset_attention_mask=true with model.transformer_impl=transformer_engine: its causal attention ignores"
                " the mask, so documents would see each other; use model.transformer_impl=torch"
            )
        return LayerChoice("torch", f"data.reset_attention_mask needs a mask that Transformer Engine would ignore ({state})")
    if wanted == "auto":
        return LayerChoice("transformer_engine" if usable else "torch", state)
    return LayerChoice(wanted, f"model.transformer_impl={wanted} ({state})")


def build_layer_spec(choice: LayerChoice, core_config: TransformerConfig, chunk: int | None) -> Any:
    """What GPTModel takes as its layer spec, for one model chunk. Transformer Engine: not yet run on hardware."""
    if choice.implementation == "transformer_engine":
        return get_gpt_layer_with_transformer_engine_spec()
    layer = get_gpt_layer_local_spec(normalization="RMSNorm")
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = TorchRMSNorm
    layer.submodules.self_attention.submodules.core_attention = SDPACoreAttention
    num_layers = get_num_layers_to_build(core_config, vp_stage=chunk)
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=TorchRMSNorm)

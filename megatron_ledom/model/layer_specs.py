"""Choice of the transformer layer (Transformer Engine, our fused operators, or plain torch) and its layer spec."""

import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_layer_with_transformer_engine_spec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_ledom.config.derived import head_dim
from megatron_ledom.config.gpu_checks import FP8_NEEDS
from megatron_ledom.config.schema import RunConfig
from megatron_ledom.errors import ConfigError
from megatron_ledom.model.dtypes import PARAMS_DTYPES
from megatron_ledom.ops.core_attention import SDPACoreAttention, UnfusedCoreAttention
from megatron_ledom.ops.library import DTYPES, backend
from megatron_ledom.ops.rms_norm import FusedRMSNorm, TorchRMSNorm
from megatron_ledom.ops.rope import FusedSelfAttention
from megatron_ledom.ops.swiglu import FusedSwiGLU
from megatron_ledom.platform.core_versions import mlp_submodules


@dataclass(frozen=True, slots=True)
class LayerChoice:
    """The chosen implementation and the reason, for the log."""

    implementation: str
    reason: str


def build_layer_spec(
    choice: LayerChoice, core_config: TransformerConfig, chunk: int | None, *, unfused_attention: bool = False
) -> Any:
    """Return GPTModel's layer spec for one model chunk. Transformer Engine: built on CPUs by tests, not yet run on hardware."""
    if choice.implementation == "transformer_engine":
        return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=core_config.qk_layernorm)
    layer = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=core_config.qk_layernorm)
    norm = FusedRMSNorm if choice.implementation == "fused" else TorchRMSNorm
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = norm
    attention = layer.submodules.self_attention
    attention.submodules.core_attention = UnfusedCoreAttention if unfused_attention else SDPACoreAttention
    if core_config.qk_layernorm:
        attention.submodules.q_layernorm = attention.submodules.k_layernorm = norm
    if choice.implementation == "fused":
        layer.module = FusedTransformerLayer
        mlp_submodules(layer).activation_func = FusedSwiGLU
        if not core_config.qk_layernorm:  # those norms come between projection and rotation, here one operator
            attention.module = FusedSelfAttention
    num_layers = get_num_layers_to_build(core_config, vp_stage=chunk)
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=norm)


def choose_layers(config: RunConfig) -> LayerChoice:
    """Return the config's implementation, or by default the first usable one.

    The order is Transformer Engine (with CUDA), our fused operators, torch. Raises ConfigError if the named one cannot run.
    """
    model = config.model
    installed = importlib.util.find_spec("transformer_engine") is not None
    usable = installed and torch.cuda.is_available()
    state = f"Transformer Engine {'installed' if installed else 'not installed'}"
    state += f", CUDA {'available' if torch.cuda.is_available() else 'not available'}"
    needed_by = [
        key
        for key, needs in (
            ("model.transformer_impl=transformer_engine", model.transformer_impl == "transformer_engine"),
            (f"model.fp8={model.fp8}", model.fp8 is not None),
            ("parallel.tp_comm_overlap=true", config.parallel.tp_comm_overlap),
        )
        if needs
    ]
    if needed_by and not usable:
        alternative = "use model.transformer_impl=torch or auto" if len(needed_by) == 1 else "remove them"
        alternative = alternative if model.transformer_impl == "transformer_engine" else f"remove {needed_by[0].split('=')[0]}"
        raise ConfigError(f"{' and '.join(needed_by)} cannot run here: {state}; install it, or {alternative}")
    if model.transformer_impl == "fused":
        return _choose_fused(config, state)
    if model.attention_backend == "unfused" and model.transformer_impl == "auto":
        return _fused_or_torch(config, f"model.attention_backend=unfused is not Transformer Engine's ({state})")
    if config.data.reset_attention_mask and model.transformer_impl != "torch":
        if needed_by:
            raise ConfigError(
                "data.reset_attention_mask=true with model.transformer_impl=transformer_engine: its causal attention ignores"
                " the mask, so documents would see each other; use model.transformer_impl=torch"
            )
        reason = f"data.reset_attention_mask needs a mask that Transformer Engine would ignore ({state})"
        return _fused_or_torch(config, reason)
    if model.fp8 is not None:
        check_fp8_hardware(model.fp8_recipe, torch.cuda.get_device_capability(), version("transformer_engine"))
    if model.transformer_impl == "auto":
        return LayerChoice("transformer_engine", state) if usable else _fused_or_torch(config, state)
    return LayerChoice(model.transformer_impl, f"model.transformer_impl={model.transformer_impl} ({state})")


BiasDropoutAdd = Callable[[tuple[torch.Tensor, torch.Tensor | None], torch.Tensor, float], torch.Tensor]


class FusedTransformerLayer(TransformerLayer):  # type: ignore[misc]
    """megatron-core's layer, with one operator for the residual sum and the norm before the MLP where possible.

    With dropout, or a norm that is recomputed in the backward pass or offloaded, the layer works as megatron-core's.
    """

    self_attn_bda: Callable[[bool, bool], BiasDropoutAdd]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._add_alone = self.self_attn_bda
        self._normed: torch.Tensor | None = None
        """The norm of this forward pass, kept between the sum and megatron-core's call of the norm."""
        if not self.recompute_pre_mlp_layernorm and not self.offload_attn_norm and not self.offload_mlp_norm:
            self.self_attn_bda = self._choose_add

    def _choose_add(self, training: bool, fused: bool) -> BiasDropoutAdd:
        alone = self._add_alone(training, fused)

        def add(x_with_bias: tuple[torch.Tensor, torch.Tensor | None], residual: torch.Tensor, dropout: float) -> torch.Tensor:
            """Return the sum [S, B, hidden] and keep its norm for the next call."""
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


def fused_operators(config: RunConfig) -> tuple[bool, str]:
    """Return (True if our fused operators can run this model here, the reason)."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kernels, dtype = backend(device), PARAMS_DTYPES[config.model.params_dtype]
    if not kernels.usable:
        return False, f"no fused operators: {kernels.state}"
    if dtype not in DTYPES[device]:
        return False, f"no fused operators for {config.model.params_dtype} on {device}"
    if device == "cuda" and (odd := _odd_width(config)):
        return False, f"no fused operators for {odd}"
    return True, f"fused operators for {device}: {kernels.state}"


def _odd_width(config: RunConfig) -> str | None:
    """Return a width of this rank's tensors that the CUDA kernels do not support, or None. They read 16 bytes at a time."""
    model, ranks = config.model, config.parallel.tensor_model_parallel_size
    widths = {
        "heads of width ": (head_dim(model), 16),
        "model.hidden_size=": (model.hidden_size, 8),
        "a rank's part of model.ffn_hidden_size of ": (model.ffn_hidden_size // ranks, 8),
        "model.make_vocab_size_divisible_by=": (model.make_vocab_size_divisible_by, 8),
    }
    odd = (f"{name}{width}, not a multiple of {of}" for name, (width, of) in widths.items() if width % of)
    return next(odd, None)


def _fused_or_torch(config: RunConfig, state: str) -> LayerChoice:
    usable, reason = fused_operators(config)
    return LayerChoice("fused" if usable else "torch", f"{state}, {reason}")


def _choose_fused(config: RunConfig, state: str) -> LayerChoice:
    usable, reason = fused_operators(config)
    if not usable:
        raise ConfigError(f"model.transformer_impl=fused cannot run here: {reason}; use model.transformer_impl=torch or auto")
    return LayerChoice("fused", f"model.transformer_impl=fused ({state}, {reason})")


def check_fp8_hardware(recipe: str, capability: tuple[int, int], te_version: str) -> None:
    """Raise ConfigError for an fp8 recipe that this GPU or this Transformer Engine does not support."""
    needs = FP8_NEEDS[recipe]
    if capability < needs.capability:
        raise ConfigError(
            f"model.fp8_recipe={recipe} needs compute capability {'.'.join(map(str, needs.capability))} ({needs.gpu}), this GPU"
            f" has {'.'.join(map(str, capability))}; set {_recipes_for(capability)}"
        )
    found = tuple(int(part) for part in re.findall(r"\d+", te_version)[:2])
    if found < needs.te_version:
        raise ConfigError(
            f"model.fp8_recipe={recipe} needs Transformer Engine {'.'.join(map(str, needs.te_version))} or newer, found"
            f" {te_version}; update it, or set another recipe"
        )


def _recipes_for(capability: tuple[int, int]) -> str:
    possible = [recipe for recipe, needs in FP8_NEEDS.items() if capability >= needs.capability]
    return f"one of {', '.join(possible)}" if possible else "model.fp8=null"


def start_user_buffers(config: RunConfig) -> None:
    """Make the buffers in which Transformer Engine overlaps tensor-parallel collectives with matrix products.

    Call once per process, before layers are built. Not yet run on hardware.
    """
    from transformer_engine.pytorch.module import base

    tokens = config.data.seq_length * config.train.micro_batch_size // config.parallel.context_parallel_size
    base.initialize_ub(
        shape=[tokens, config.model.hidden_size],
        tp_size=config.parallel.tensor_model_parallel_size,
        use_fp8=config.model.fp8 is not None,
        dtype=PARAMS_DTYPES[config.model.params_dtype],
        bootstrap_backend="nccl",
    )

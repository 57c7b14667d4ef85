"""The Hugging Face spelling of a model, both ways: config.json and generation_config.json. The only file with these names."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from transformers import (
    AutoConfig,
    GenerationConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

import megatron_ledom
from megatron_ledom.config.derived import head_dim, query_groups
from megatron_ledom.config.schema import ModelConfig, RunConfig
from megatron_ledom.errors import DataError, MismatchError, UsageError
from megatron_ledom.provenance import Provenance


@dataclass(frozen=True, slots=True)
class Architecture:
    """A stock architecture and what it has."""

    name: str
    config: type[PreTrainedConfig]
    add_qkv_bias: bool = False
    qk_layernorm: bool = False
    any_width: bool = True
    """hidden_size need not be a multiple of the number of heads."""
    fixed: tuple[tuple[str, Any], ...] = ()
    """What its config.json says besides, so that the model is ours."""

    def misfits(self, model: ModelConfig) -> list[str]:
        """What of the model it does not have, or has to have and the model has not."""
        words = [
            f"{'has' if getattr(self, key) else 'has no'} {what} (model.{key}={str(getattr(model, key)).lower()})"
            for key, what in (
                ("add_qkv_bias", "bias on queries, keys and values"),
                ("qk_layernorm", "norm of queries and keys"),
            )
            if getattr(self, key) != getattr(model, key)
        ]
        if not self.any_width and model.hidden_size % model.num_attention_heads:
            heads = f"model.num_attention_heads={model.num_attention_heads}"
            words.append(f"wants model.hidden_size={model.hidden_size} to be a multiple of {heads}")
        return words


ARCHITECTURES = (
    Architecture("LlamaForCausalLM", LlamaConfig, any_width=False, fixed=(("attention_bias", False), ("mlp_bias", False))),
    Architecture("MistralForCausalLM", MistralConfig, fixed=(("sliding_window", None),)),
    Architecture("Qwen2ForCausalLM", Qwen2Config, add_qkv_bias=True, fixed=(("use_sliding_window", False),)),
    Architecture(
        "Qwen3ForCausalLM",
        Qwen3Config,
        qk_layernorm=True,
        fixed=(("attention_bias", False), ("use_sliding_window", False)),
    ),
)
"""In order of preference: the first that fits is taken."""
ROPE_KEYS = {
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "original_max_position": "original_max_position_embeddings",
    },
    "yarn": {
        "factor": "factor",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "attention_factor": "attention_factor",
        "original_max_position": "original_max_position_embeddings",
    },
}
"""Kind of rotary scaling -> key of model.rope_scaling_... -> its name in rope_parameters."""


def choose_architecture(model: ModelConfig, name: str | None = None) -> Architecture:
    """The stock architecture that computes what the model computes; with `name`, that one. Raises MismatchError if none does."""
    if name is not None and name not in [architecture.name for architecture in ARCHITECTURES]:
        raise UsageError(f"--architecture {name} is not known; it can be one of {', '.join(a.name for a in ARCHITECTURES)}")
    asked = [architecture for architecture in ARCHITECTURES if name in (None, architecture.name)]
    for architecture in asked:
        if not architecture.misfits(model):
            return architecture
    reasons = "; ".join(f"{architecture.name} {', '.join(architecture.misfits(model))}" for architecture in asked)
    raise MismatchError(f"the model has no stock Hugging Face architecture: {reasons}; it can be trained, but not exported")


def build_hf_config(config: RunConfig, provenance: Provenance, architecture: str | None = None) -> PreTrainedConfig:
    """A stock config; direction and tokenizer hash ride along as extra keys, eos is the id trained as eod.

    Raises MismatchError for a model that has no stock architecture.
    """
    model = config.model
    chosen = choose_architecture(model, architecture)
    return chosen.config(
        architectures=[chosen.name],
        vocab_size=provenance.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.ffn_hidden_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=query_groups(model),
        head_dim=head_dim(model),
        hidden_act="silu",
        max_position_embeddings=config.data.seq_length,
        initializer_range=model.init_method_std,
        rms_norm_eps=model.layernorm_epsilon,
        rope_parameters=_rope_parameters(model),
        rope_theta=model.rotary_base,  # read by releases before rope_parameters
        tie_word_embeddings=model.share_embeddings_and_output_weights,
        bos_token_id=None,
        eos_token_id=provenance.eod_id,
        pad_token_id=None,
        dtype={"bf16": "bfloat16", "fp32": "float32"}[model.params_dtype],
        direction=str(provenance.direction),
        eod_id=provenance.eod_id,
        tokenizer_name=provenance.tokenizer_name,
        tokenizer_sha256=provenance.tokenizer_sha256,
        megatron_ledom_version=megatron_ledom.__version__,
        **dict(chosen.fixed),
    )


def build_generation_config(provenance: Provenance) -> GenerationConfig:
    """Generation ends with the trained eod, whatever the tokenizer calls its eos."""
    return GenerationConfig(eos_token_id=provenance.eod_id, bos_token_id=None, do_sample=False)


def load_hf_config(folder: str) -> PreTrainedConfig:
    """The config.json of a folder. Raises DataError or UsageError when it is none of a known kind; runs no code of the folder."""
    path = os.path.join(folder, "config.json")
    if not os.path.isfile(path):
        raise UsageError(f"{folder} is no Hugging Face model folder: it has no config.json; give one that has")
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds
        raise DataError(f"{path} cannot be read ({type(error).__name__}: {_first_line(error)}); get the folder anew") from error
    return config


def read_model(hf: PreTrainedConfig, where: str, seq_length: int | None) -> tuple[dict[str, Any], int]:
    """The keys of `model`, without params_dtype, and the longest sequence, of a stock config; `where` names it in errors.

    `seq_length`: what the run will train with, if not all of the positions that the config allows. Raises MismatchError that
    says everything the trainer's model does not have.
    """
    positions = hf.max_position_embeddings if seq_length is None else seq_length
    faults = list(_misfits(hf, positions))
    if faults:
        raise MismatchError(f"{where} cannot be imported: {'; '.join(faults)}")
    architecture = next(known for known in ARCHITECTURES if known.config.model_type == hf.model_type)
    width = getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
    model = {
        "num_layers": hf.num_hidden_layers,
        "hidden_size": hf.hidden_size,
        "ffn_hidden_size": hf.intermediate_size,
        "num_attention_heads": hf.num_attention_heads,
        "num_query_groups": hf.num_key_value_heads,
        "kv_channels": width,
        "layernorm_epsilon": hf.rms_norm_eps,
        "init_method_std": hf.initializer_range,
        "share_embeddings_and_output_weights": bool(hf.tie_word_embeddings),
        "add_qkv_bias": architecture.add_qkv_bias,
        "qk_layernorm": architecture.qk_layernorm,
        **_read_rope(hf, where),
    }
    return model, positions


def _misfits(hf: PreTrainedConfig, positions: int) -> Iterator[str]:
    known = {architecture.config.model_type: architecture.name for architecture in ARCHITECTURES}
    if hf.model_type not in known:
        yield f"model_type {hf.model_type!r} is none of {', '.join(known)}"
        return
    for name in hf.architectures or []:
        if name != known[hf.model_type]:
            yield f"it is a {name}, expected {known[hf.model_type]}"
    if getattr(hf, "quantization_config", None):
        yield "its weights are quantised; import the folder that they were made from"
    if hf.hidden_act not in ("silu", "swish"):
        yield f"hidden_act is {hf.hidden_act!r}, the trainer has silu only"
    if getattr(hf, "attention_bias", False):
        yield "attention_bias puts a bias on the output projection, which the trainer's model does not have"
    if getattr(hf, "mlp_bias", False):
        yield "mlp_bias: the trainer's feed-forward block has no biases"
    if _rope(hf).get("partial_rotary_factor", 1.0) != 1.0 or getattr(hf, "partial_rotary_factor", None) not in (None, 1.0):
        yield "partial_rotary_factor turns a part of each head only, the trainer the whole"
    window = getattr(hf, "sliding_window", None)
    slides = "sliding_attention" in (getattr(hf, "layer_types", None) or ["sliding_attention"])
    if window is not None and slides and positions > window:
        yield (
            f"sliding_window={window} hides what lies further back, and sequences have {positions} tokens; with --seq-length"
            f" {window} or less it makes no difference"
        )
    yield from _rope_misfits(hf)


def _rope_misfits(hf: PreTrainedConfig) -> Iterator[str]:
    rope = _rope(hf)
    kind = rope.get("rope_type", "default")
    if kind == "dynamic":
        yield "rope_type dynamic changes the frequencies with each text's length, which cannot be trained with; use yarn or default"
    elif kind != "default" and kind not in ROPE_KEYS:
        yield f"rope_type {kind} is none of default, {', '.join(ROPE_KEYS)}"
    elif kind == "yarn" and rope.get("truncate", True) is not True:
        yield "yarn with truncate=false is not known to the trainer"


def _rope(hf: PreTrainedConfig) -> dict[str, Any]:
    return dict(hf.rope_parameters or {})


def _read_rope(hf: PreTrainedConfig, where: str) -> dict[str, Any]:
    """rotary_base and the keys of rope_scaling."""
    rope = _rope(hf)
    kind = rope.get("rope_type", "default")
    if "rope_theta" not in rope:
        raise DataError(f"{where} does not say rope_theta; write it there")
    keys: dict[str, Any] = {"rotary_base": float(rope["rope_theta"])}
    if kind == "default":
        return keys
    keys["rope_scaling"] = kind
    if kind != "linear" and not rope.get("original_max_position_embeddings"):
        raise DataError(f"{where} has rope_type {kind} without original_max_position_embeddings; write it there")
    if rope.get("factor") is None and kind == "yarn":
        rope["factor"] = hf.max_position_embeddings / rope["original_max_position_embeddings"]
    for ours, theirs in ROPE_KEYS[kind].items():
        if rope.get(theirs) is not None:
            keys[f"rope_scaling_{ours}"] = rope[theirs]
        elif kind != "yarn":
            raise DataError(f"{where} has rope_type {kind} without {theirs}; write it there")
    if rope.get("mscale") and rope.get("mscale_all_dim") and rope.get("attention_factor") is None:
        raise MismatchError(
            f"{where} cannot be imported: yarn with mscale and mscale_all_dim; write the attention_factor that they make instead"
        )
    return keys


def _rope_parameters(model: ModelConfig) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": model.rope_scaling or "default", "rope_theta": model.rotary_base}
    for ours, theirs in ROPE_KEYS.get(rope["rope_type"], {}).items():
        value = getattr(model, f"rope_scaling_{ours}")
        if value is not None:
            rope[theirs] = value
    return rope


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:200]

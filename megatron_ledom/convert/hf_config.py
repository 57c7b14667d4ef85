"""Convert model configs to and from Hugging Face: config.json and generation_config.json. Only this module uses their keys."""

import json
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
from megatron_ledom.provenance import Provenance, readings_to
from megatron_ledom.tokenizers.json_objects import read_object


@dataclass(frozen=True, slots=True)
class Architecture:
    """A stock architecture and its features."""

    name: str
    config: type[PreTrainedConfig]
    add_qkv_bias: bool = False
    qk_layernorm: bool = False
    any_width: bool = True
    """True if hidden_size need not be a multiple of the number of heads."""
    fixed: tuple[tuple[str, Any], ...] = ()
    """Further values of its config.json, which make it compute the same as our model."""

    def misfits(self, model: ModelConfig) -> list[str]:
        """Return the features that only the model or only the architecture has."""
        words = [
            f"{'has a' if getattr(self, key) else 'has no'} {feature} (model.{key}={str(getattr(model, key)).lower()})"
            for key, feature in (
                ("add_qkv_bias", "bias on queries, keys and values"),
                ("qk_layernorm", "norm of queries and keys"),
            )
            if getattr(self, key) != getattr(model, key)
        ]
        if not self.any_width and model.hidden_size % model.num_attention_heads:
            heads = f"model.num_attention_heads={model.num_attention_heads}"
            words.append(f"needs model.hidden_size={model.hidden_size} to be a multiple of {heads}")
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
"""The architectures in order of preference: the first that fits is used."""
KNOWN_TYPES = {architecture.config.model_type: architecture.name for architecture in ARCHITECTURES}
"""model_type of config.json -> the architecture."""
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
"""Type of rotary scaling -> key of model.rope_scaling_... -> its name in rope_parameters."""


SIZES = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "vocab_size",
)
"""Keys of config.json that must be whole numbers of at least 1."""


def choose_architecture(model: ModelConfig, name: str | None = None) -> Architecture:
    """Return the first stock architecture that computes the same as the model, or the one called `name`.

    Raises MismatchError if the model does not fit.
    """
    if name is not None and name not in [architecture.name for architecture in ARCHITECTURES]:
        raise UsageError(f"--architecture {name} is unknown; choose one of {', '.join(a.name for a in ARCHITECTURES)}")
    allowed = [architecture for architecture in ARCHITECTURES if name in (None, architecture.name)]
    for architecture in allowed:
        if not architecture.misfits(model):
            return architecture
    reasons = "; ".join(f"{architecture.name} {', '.join(architecture.misfits(model))}" for architecture in allowed)
    raise MismatchError(f"the model has no stock Hugging Face architecture: {reasons}; it can be trained but not exported")


def build_hf_config(config: RunConfig, provenance: Provenance, architecture: str | None = None) -> PreTrainedConfig:
    """Return a stock config. Its eos is the eod of the run, and extra keys record direction and tokenizer hash.

    Raises MismatchError if no stock architecture fits the model.
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
        rope_theta=model.rotary_base,  # for releases of transformers without rope_parameters
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
        **({} if provenance.is_plain else {"readings": readings_to(provenance.readings)}),
        **dict(chosen.fixed),
    )


def build_generation_config(provenance: Provenance) -> GenerationConfig:
    """Return a generation config that stops at the eod of the run, even if the tokenizer has another eos."""
    return GenerationConfig(eos_token_id=provenance.eod_id, bos_token_id=None, do_sample=False)


def load_hf_config(folder: str) -> PreTrainedConfig:
    """Return the config.json of a folder. Its model_type is checked first, so that no code of the folder can run.

    Raises UsageError without a config.json, DataError if it cannot be read, MismatchError for an unsupported model type.
    """
    path = os.path.join(folder, "config.json")
    if not os.path.isfile(path):
        raise UsageError(f"{folder} is not a Hugging Face model folder: it has no config.json; give a folder that has one")
    stored = read_object(path, json)
    generation = os.path.join(folder, "generation_config.json")
    if os.path.isfile(generation):
        read_object(generation, json)  # stock transformers reads it with the weights, and expects an object
    if problem := _type_problem(stored.get("model_type"), stored):
        raise MismatchError(f"{path} cannot be imported: {problem}")
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds
        raise DataError(
            f"{path} cannot be read: stock transformers does not accept it as a {stored['model_type']} model"
            f" ({type(error).__name__}: {_first_line(error)}); correct that value"
        ) from error
    return config


def _type_problem(model_type: Any, about: dict[str, Any]) -> str | None:
    """Return the reason why a model of this type cannot be imported; None if it can. `about`: the keys of its config."""
    if model_type in list(KNOWN_TYPES):  # a list, because the value of a file may not be hashable
        return None
    words = f"model_type {model_type!r} is not one of {', '.join(KNOWN_TYPES)}"
    inner = about.get("text_config")
    if isinstance(inner, dict) and inner.get("model_type") in list(KNOWN_TYPES):
        words += f"; the {inner['model_type']} in its text_config is only a part of it: save that part as a model of its own"
    if about.get("auto_map"):
        words += "; it needs code of the folder (auto_map), which is never run"
    return words


def read_model(hf: PreTrainedConfig, where: str, seq_length: int | None) -> tuple[dict[str, Any], int]:
    """Return the keys of `model`, without params_dtype, and the sequence length from a stock config, named `where` in errors.

    `seq_length`: length of the training samples; None: all positions that the config allows. Raises MismatchError with all
    features that our model does not have.
    """
    if problem := _type_problem(hf.model_type, hf.to_dict()):
        raise MismatchError(f"{where} cannot be imported: {problem}")
    if problems := list(_wrong_values(hf)):
        raise DataError(f"{where} has {'; '.join(problems)}; correct it")
    positions = hf.max_position_embeddings if seq_length is None else seq_length
    problems = list(_misfits(hf, positions))
    if problems:
        raise MismatchError(f"{where} cannot be imported: {'; '.join(problems)}")
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


def _wrong_values(hf: PreTrainedConfig) -> Iterator[str]:
    """Yield the values that have a wrong type or are too small."""
    for name in SIZES:
        value = getattr(hf, name, None)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            yield f"{name}={value!r}, expected a whole number of at least 1"
    for name in ("architectures", "layer_types"):
        value = getattr(hf, name, None)
        if value is not None and not (isinstance(value, list) and all(isinstance(item, str) for item in value)):
            yield f"{name}={value!r}, expected a list of names"
    window = getattr(hf, "sliding_window", None)
    if window is not None and not isinstance(window, int):
        yield f"sliding_window={window!r}, expected a whole number or null"
    rope = _rope(hf)
    if not isinstance(rope.get("rope_type", "default"), str):
        yield f"rope_parameters.rope_type={rope['rope_type']!r}, expected a name"
    for name in ("rope_theta", *sorted({name for names in ROPE_KEYS.values() for name in names.values()})):
        value = rope.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float | None):
            yield f"rope_parameters.{name}={value!r}, expected a number"


def _misfits(hf: PreTrainedConfig, positions: int) -> Iterator[str]:
    for name in hf.architectures or []:
        if name != KNOWN_TYPES[hf.model_type]:
            yield f"it is a {name}, expected {KNOWN_TYPES[hf.model_type]}"
    if getattr(hf, "quantization_config", None):
        yield "its weights are quantised; import the original folder instead"
    if hf.hidden_act not in ("silu", "swish"):
        yield f"hidden_act is {hf.hidden_act!r}, but only silu can be trained"
    if getattr(hf, "attention_bias", False):
        yield "attention_bias adds a bias to the output projection, which our model does not have"
    if getattr(hf, "mlp_bias", False):
        yield "mlp_bias: our feed-forward block has no biases"
    if _rope(hf).get("partial_rotary_factor", 1.0) != 1.0 or getattr(hf, "partial_rotary_factor", None) not in (None, 1.0):
        yield "partial_rotary_factor rotates only a part of each head, but our model rotates the whole head"
    window = getattr(hf, "sliding_window", None)
    slides = "sliding_attention" in (getattr(hf, "layer_types", None) or ["sliding_attention"])
    if window is not None and slides and positions > window:
        yield (
            f"sliding_window={window} is shorter than the sequences of {positions} tokens, and our attention has no window; set --seq-length"
            f" to {window} or less"
        )
    yield from _rope_misfits(hf)


def _rope_misfits(hf: PreTrainedConfig) -> Iterator[str]:
    rope = _rope(hf)
    kind = rope.get("rope_type", "default")
    if kind == "dynamic":
        yield "rope_type dynamic changes the frequencies with the length of a text, so it cannot be trained; use yarn"
    elif kind != "default" and kind not in ROPE_KEYS:
        yield f"rope_type {kind} is not one of default, {', '.join(ROPE_KEYS)}"
    elif kind == "yarn" and rope.get("truncate", True) is not True:
        yield "yarn with truncate=false is not supported"


def _rope(hf: PreTrainedConfig) -> dict[str, Any]:
    return dict(hf.rope_parameters or {})


def _read_rope(hf: PreTrainedConfig, where: str) -> dict[str, Any]:
    """Return rotary_base and the keys of rope_scaling."""
    rope = _rope(hf)
    kind = rope.get("rope_type", "default")
    if rope.get("rope_theta") is None:
        raise DataError(f"{where} has no rope_parameters.rope_theta; add it")
    keys: dict[str, Any] = {"rotary_base": float(rope["rope_theta"])}
    if kind == "default":
        return keys
    keys["rope_scaling"] = kind
    if kind != "linear" and not rope.get("original_max_position_embeddings"):
        raise DataError(f"{where} has rope_type {kind} without original_max_position_embeddings; add it")
    if rope.get("factor") is None and kind == "yarn":
        rope["factor"] = hf.max_position_embeddings / rope["original_max_position_embeddings"]
    for ours, theirs in ROPE_KEYS[kind].items():
        if rope.get(theirs) is not None:
            keys[f"rope_scaling_{ours}"] = rope[theirs]
        elif kind != "yarn":
            raise DataError(f"{where} has rope_type {kind} without {theirs}; add it")
    if rope.get("mscale") and rope.get("mscale_all_dim") and rope.get("attention_factor") is None:
        raise MismatchError(
            f"{where} cannot be imported: yarn with mscale and mscale_all_dim; replace them with the equivalent attention_factor"
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

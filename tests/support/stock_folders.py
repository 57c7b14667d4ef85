"""Hugging Face folders of random tiny models of all supported architectures, written by stock transformers."""

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig

from tests.support.legible import EOD_ID, VOCAB_SIZE, legible_tokenizer

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 3.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}
FAMILY: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("Llama", {"num_key_value_heads": 2}),
    "Llama, one key-value head, wide heads": ("Llama", {"num_key_value_heads": 1, "head_dim": 24}),
    "Llama 3 frequencies": ("Llama", {"rope_parameters": LLAMA3}),
    "Llama, linear scaling, tied": ("Llama", {"rope_parameters": LINEAR, "tie_word_embeddings": True}),
    "Mistral": ("Mistral", {"sliding_window": None}),
    "Mistral, a window that is never left": ("Mistral", {"sliding_window": 64, "num_key_value_heads": 1}),
    "Mistral, width no multiple of the heads": (
        "Mistral",
        {"sliding_window": None, "hidden_size": 36, "num_attention_heads": 8},
    ),
    "Qwen2, tied": ("Qwen2", {"tie_word_embeddings": True}),
    "Qwen2, yarn": ("Qwen2", {"rope_parameters": YARN, "num_key_value_heads": 1}),
    "Qwen3": ("Qwen3", {"head_dim": 16}),
    "Qwen3, yarn with all its bounds": (
        "Qwen3",
        {"head_dim": 16, "rope_parameters": {**YARN, "attention_factor": 1.3, "beta_fast": 16.0, "beta_slow": 2.0}},
    ),
}
"""Name of a case -> architecture, and other values of its config."""


def stock_config(architecture: str, **changed: Any) -> PreTrainedConfig:
    """Return a config with 2 layers, width 32, 4 heads, 64 positions, and 7 more rows than ids of the legible tokenizer."""
    values = {
        "vocab_size": VOCAB_SIZE + 7,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "rms_norm_eps": 1e-5,
        "bos_token_id": None,
        "eos_token_id": EOD_ID,
        "pad_token_id": None,
    }
    return getattr(transformers, f"{architecture}Config")(**{**values, **changed})


def stock_folder(
    folder: Path, config: PreTrainedConfig, *, seed: int = 0, dtype: torch.dtype = torch.float32, **save: Any
) -> Path:
    """Save a model with random weights, norms and biases, and the legible tokenizer."""
    torch.manual_seed(seed)
    name = type(config).__name__.replace("Config", "ForCausalLM")
    model = getattr(transformers, name)(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 1:
                weight.add_(0.3 * torch.randn_like(weight))
    model.to(dtype).save_pretrained(folder, **save)
    legible_tokenizer(folder)
    return folder


def family_folder(folder: Path, case: str, **save: Any) -> Path:
    """Write the folder of a case of FAMILY."""
    architecture, changed = FAMILY[case]
    return stock_folder(folder, stock_config(architecture, **changed), **save)

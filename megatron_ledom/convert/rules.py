"""How each weight of the megatron-core model maps to Hugging Face Llama: one table, read by the export.

Shape letters: V vocabulary, h hidden, f feed-forward, H query heads, G key-value groups, D head width. A megatron-core
linear_qkv holds, group by group, the group's H/G query heads, its key head and its value head; linear_fc1 holds the gate
projection above the up projection. Rotary positions turn the same pairs in both, so no rows are permuted.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Dimensions:
    """The numbers the table needs."""

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int
    """Without padding."""
    tied: bool
    """One matrix is both embedding and output layer."""


Split = Callable[[torch.Tensor, Dimensions], tuple[torch.Tensor, ...]]


@dataclass(frozen=True, slots=True)
class Rule:
    """One megatron-core weight, the Hugging Face weights it becomes, and how; `{i}` stands for the layer."""

    core: str
    hf: tuple[str, ...]
    split: Split


def whole(weight: torch.Tensor, dims: Dimensions) -> tuple[torch.Tensor, ...]:
    """The same tensor."""
    return (weight,)


def true_vocabulary(weight_Vh: torch.Tensor, dims: Dimensions) -> tuple[torch.Tensor, ...]:
    """The rows of real ids; padding rows are dropped."""
    return (weight_Vh[: dims.vocab_size],)


def query_key_value(weight: torch.Tensor, dims: Dimensions) -> tuple[torch.Tensor, ...]:
    """linear_qkv [G * (H/G + 2) * D, h] into q [H * D, h], k [G * D, h], v [G * D, h]."""
    queries = dims.num_attention_heads // dims.num_query_groups
    grouped = weight.view(dims.num_query_groups, queries + 2, dims.head_dim, dims.hidden_size)
    parts = torch.split(grouped, [queries, 1, 1], dim=1)
    return tuple(part.reshape(-1, dims.hidden_size) for part in parts)


def gate_and_up(weight: torch.Tensor, dims: Dimensions) -> tuple[torch.Tensor, ...]:
    """linear_fc1 [2f, h] into gate [f, h] and up [f, h]."""
    return weight.chunk(2)


CORE, HF = "decoder.layers.{i}.", "model.layers.{i}."

RULES = (
    Rule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), true_vocabulary),
    Rule(CORE + "input_layernorm.weight", (HF + "input_layernorm.weight",), whole),
    Rule(
        CORE + "self_attention.linear_qkv.weight",
        (HF + "self_attn.q_proj.weight", HF + "self_attn.k_proj.weight", HF + "self_attn.v_proj.weight"),
        query_key_value,
    ),
    Rule(CORE + "self_attention.linear_proj.weight", (HF + "self_attn.o_proj.weight",), whole),
    Rule(CORE + "pre_mlp_layernorm.weight", (HF + "post_attention_layernorm.weight",), whole),
    Rule(CORE + "mlp.linear_fc1.weight", (HF + "mlp.gate_proj.weight", HF + "mlp.up_proj.weight"), gate_and_up),
    Rule(CORE + "mlp.linear_fc2.weight", (HF + "mlp.down_proj.weight",), whole),
    Rule("decoder.final_layernorm.weight", ("model.norm.weight",), whole),
    Rule("output_layer.weight", ("lm_head.weight",), true_vocabulary),
)


def to_hf_weights(core: dict[str, torch.Tensor], dims: Dimensions) -> Iterator[tuple[str, torch.Tensor]]:
    """Every Hugging Face weight, by name, of a whole megatron-core model's state dict; every core weight is used once."""
    for rule in RULES:
        if rule.core == "output_layer.weight" and dims.tied:
            continue
        for layer in range(dims.num_layers if "{i}" in rule.core else 1):
            weight = core[rule.core.format(i=layer)]
            for name, part in zip(rule.hf, rule.split(weight, dims), strict=True):
                yield name.format(i=layer), part.contiguous()

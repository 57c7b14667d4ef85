"""How each weight of a megatron-core checkpoint maps to Hugging Face: one table for every architecture, read both ways.

Letters: V padded vocabulary, h hidden, f feed-forward, F two of them, H query heads, G key-value heads, D head width, A all
query heads H * D, Q all of queries, keys and values (H + 2G) * D. A megatron-core linear_qkv holds, group by group, the group's
H/G query heads, its key head and its value head; linear_fc1 holds the gate projection above the up projection. Rotary
positions turn the same pairs in both, so no rows are permuted. Core names are those of checkpoints, which stack all layers.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from megatron_ledom.config.derived import head_dim, padded_vocab_size, query_groups
from megatron_ledom.config.schema import ModelConfig


@dataclass(frozen=True, slots=True)
class Sizes:
    """The numbers the table needs."""

    model: ModelConfig
    vocab_size: int
    """Ids of the tokenizer; without padding."""

    @property
    def groups(self) -> int:
        """Key-value heads."""
        return query_groups(self.model)

    @property
    def queries(self) -> int:
        """Query heads of one group."""
        return self.model.num_attention_heads // self.groups

    @property
    def padded_vocab(self) -> int:
        """Rows of the core model's embedding."""
        return padded_vocab_size(self.vocab_size, self.model.make_vocab_size_divisible_by)

    def of(self, axes: str) -> torch.Size:
        """The shape that letters spell."""
        model, width = self.model, head_dim(self.model)
        letters = {
            "V": self.padded_vocab,
            "h": model.hidden_size,
            "f": model.ffn_hidden_size,
            "F": 2 * model.ffn_hidden_size,
            "D": width,
            "A": model.num_attention_heads * width,
            "Q": (model.num_attention_heads + 2 * self.groups) * width,
        }
        return torch.Size(letters[axis] for axis in axes)


Parts = tuple[torch.Tensor, ...]


@dataclass(frozen=True, slots=True)
class Fusion:
    """How one core tensor becomes Hugging Face tensors, and they it."""

    split: Callable[[torch.Tensor, Sizes], Parts]
    join: Callable[[Sequence[torch.Tensor], Sizes], torch.Tensor]


def _split_heads(fused: torch.Tensor, sizes: Sizes) -> Parts:
    """linear_qkv [Q, ...] into q [H * D, ...], k [G * D, ...], v [G * D, ...]."""
    grouped = fused.view(sizes.groups, sizes.queries + 2, -1, *fused.shape[1:])
    return tuple(part.flatten(0, 2) for part in torch.split(grouped, [sizes.queries, 1, 1], dim=1))


def _join_heads(parts: Sequence[torch.Tensor], sizes: Sizes) -> torch.Tensor:
    """q, k, v into linear_qkv."""
    grouped = [part.reshape(sizes.groups, -1, head_dim(sizes.model), *part.shape[1:]) for part in parts]
    return torch.cat(grouped, 1).flatten(0, 2)


def _add_padding(parts: Sequence[torch.Tensor], sizes: Sizes) -> torch.Tensor:
    """The rows of the tokenizer's ids, then zeros; rows of a padded Hugging Face vocabulary are dropped."""
    rows = parts[0][: sizes.vocab_size]
    padded = rows.new_zeros(sizes.padded_vocab, *rows.shape[1:])
    padded[: len(rows)] = rows
    return padded


ONE_TO_ONE = Fusion(lambda tensor, sizes: (tensor,), lambda parts, sizes: parts[0])
VOCABULARY = Fusion(lambda tensor, sizes: (tensor[: sizes.vocab_size],), _add_padding)
HEADS_BY_GROUP = Fusion(_split_heads, _join_heads)
GATE_OVER_UP = Fusion(lambda tensor, sizes: tensor.chunk(2), lambda parts, sizes: torch.cat(list(parts)))


@dataclass(frozen=True, slots=True)
class Rule:
    """One core weight, its axes, the Hugging Face weights it becomes, how, and when a model has it; `{i}` is the layer."""

    core: str
    axes: str
    hf: tuple[str, ...]
    fusion: Fusion
    is_present: Callable[[ModelConfig], bool] = lambda model: True


CORE, HF = "decoder.layers.", "model.layers.{i}."
QKV = (HF + "self_attn.q_proj.", HF + "self_attn.k_proj.", HF + "self_attn.v_proj.")

RULES = (
    Rule("embedding.word_embeddings.weight", "Vh", ("model.embed_tokens.weight",), VOCABULARY),
    Rule(CORE + "self_attention.linear_qkv.layer_norm_weight", "h", (HF + "input_layernorm.weight",), ONE_TO_ONE),
    Rule(CORE + "self_attention.linear_qkv.weight", "Qh", tuple(name + "weight" for name in QKV), HEADS_BY_GROUP),
    Rule(
        CORE + "self_attention.linear_qkv.bias",
        "Q",
        tuple(name + "bias" for name in QKV),
        HEADS_BY_GROUP,
        lambda model: model.add_qkv_bias,
    ),
    Rule(
        CORE + "self_attention.q_layernorm.weight",
        "D",
        (HF + "self_attn.q_norm.weight",),
        ONE_TO_ONE,
        lambda model: model.qk_layernorm,
    ),
    Rule(
        CORE + "self_attention.k_layernorm.weight",
        "D",
        (HF + "self_attn.k_norm.weight",),
        ONE_TO_ONE,
        lambda model: model.qk_layernorm,
    ),
    Rule(CORE + "self_attention.linear_proj.weight", "hA", (HF + "self_attn.o_proj.weight",), ONE_TO_ONE),
    Rule(CORE + "mlp.linear_fc1.layer_norm_weight", "h", (HF + "post_attention_layernorm.weight",), ONE_TO_ONE),
    Rule(CORE + "mlp.linear_fc1.weight", "Fh", (HF + "mlp.gate_proj.weight", HF + "mlp.up_proj.weight"), GATE_OVER_UP),
    Rule(CORE + "mlp.linear_fc2.weight", "hf", (HF + "mlp.down_proj.weight",), ONE_TO_ONE),
    Rule("decoder.final_layernorm.weight", "h", ("model.norm.weight",), ONE_TO_ONE),
    Rule(
        "output_layer.weight",
        "Vh",
        ("lm_head.weight",),
        VOCABULARY,
        lambda model: not model.share_embeddings_and_output_weights,
    ),
)


@dataclass(frozen=True, slots=True)
class Weight:
    """One use of a rule: a core tensor, or one layer of it, and the Hugging Face tensors that it becomes."""

    core: str
    layer: int | None
    """None for what stands outside the layers."""
    shape: torch.Size
    """Of the core tensor, without the layer axis."""
    hf: tuple[str, ...]
    fusion: Fusion
    sizes: Sizes

    def split(self, core: torch.Tensor) -> dict[str, torch.Tensor]:
        """The Hugging Face tensors of the core tensor, by name; some are views of it."""
        return dict(zip(self.hf, self.fusion.split(core, self.sizes), strict=True))

    def join(self, hf: Sequence[torch.Tensor]) -> torch.Tensor:
        """The core tensor of the Hugging Face tensors, which come in the order of `hf`."""
        return self.fusion.join(hf, self.sizes)

    def hf_shapes(self) -> dict[str, torch.Size]:
        """Shape of each Hugging Face tensor, by name."""
        parts = self.split(torch.empty(self.shape, device="meta"))
        return {name: part.shape for name, part in parts.items()}


def weights_of(sizes: Sizes) -> Iterator[Weight]:
    """Every weight of a model: what stands before the layers, then layer by layer, then what follows them."""
    present = [rule for rule in RULES if rule.is_present(sizes.model)]
    in_layers = [rule for rule in present if rule.core.startswith(CORE)]
    first = present.index(in_layers[0])
    yield from (_weight(rule, None, sizes) for rule in present[:first])
    for layer in range(sizes.model.num_layers):
        yield from (_weight(rule, layer, sizes) for rule in in_layers)
    yield from (_weight(rule, None, sizes) for rule in present[first + len(in_layers) :])


def _weight(rule: Rule, layer: int | None, sizes: Sizes) -> Weight:
    names = tuple(name.format(i=layer) for name in rule.hf)
    return Weight(rule.core, layer, sizes.of(rule.axes), names, rule.fusion, sizes)

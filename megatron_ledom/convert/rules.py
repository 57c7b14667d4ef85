"""The table of weights of a megatron-core checkpoint and of Hugging Face, for all architectures, export and import.

Letters: V padded vocabulary, h hidden, f feed-forward, F = 2f, H query heads, G key-value heads, D head width, A = H * D all
query heads, Q = (H + 2G) * D all queries, keys and values. The rows of linear_qkv are ordered by group: the H/G query heads of
the group, its key head, its value head. linear_fc1 has the gate projection above the up projection. Rotary positions rotate
the same pairs in both, so no rows are permuted. Core names are those of checkpoints, which stack all layers.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from megatron_ledom.config.derived import head_dim, padded_vocab_size, query_groups
from megatron_ledom.config.schema import ModelConfig


@dataclass(frozen=True, slots=True)
class Sizes:
    """The sizes from which the table computes shapes."""

    model: ModelConfig
    vocab_size: int
    """Number of ids of the tokenizer, without padding."""

    @property
    def groups(self) -> int:
        """Number of key-value heads."""
        return query_groups(self.model)

    @property
    def queries(self) -> int:
        """Number of query heads in a group."""
        return self.model.num_attention_heads // self.groups

    @property
    def padded_vocab(self) -> int:
        """Number of rows of the core model's embedding."""
        return padded_vocab_size(self.vocab_size, self.model.make_vocab_size_divisible_by)

    def of(self, axes: str) -> torch.Size:
        """Return the shape for a text of letters, such as `Vh`."""
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
    """The conversions of a core tensor, which may be a fused weight, to its Hugging Face tensors (`split`) and back (`join`)."""

    split: Callable[[torch.Tensor, Sizes], Parts]
    join: Callable[[Sequence[torch.Tensor], Sizes], torch.Tensor]


def _split_heads(fused: torch.Tensor, sizes: Sizes) -> Parts:
    """Split linear_qkv [Q, ...] into q [H * D, ...], k [G * D, ...] and v [G * D, ...]."""
    grouped = fused.view(sizes.groups, sizes.queries + 2, -1, *fused.shape[1:])
    return tuple(part.flatten(0, 2) for part in torch.split(grouped, [sizes.queries, 1, 1], dim=1))


def _join_heads(parts: Sequence[torch.Tensor], sizes: Sizes) -> torch.Tensor:
    """Join q, k and v into linear_qkv."""
    grouped = [part.reshape(sizes.groups, -1, head_dim(sizes.model), *part.shape[1:]) for part in parts]
    return torch.cat(grouped, 1).flatten(0, 2)


def _add_padding(parts: Sequence[torch.Tensor], sizes: Sizes) -> torch.Tensor:
    """Return the rows of the tokenizer's ids, padded with zeros. The padding of a Hugging Face vocabulary is dropped."""
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
    """A core weight, its axes, its Hugging Face weights (`{i}`: the layer), their conversion, and the models that have it."""

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
    """A rule applied to a model: a core tensor, or one layer of it, and its Hugging Face tensors."""

    core: str
    layer: int | None
    """Index of the layer; None for weights outside the layers."""
    shape: torch.Size
    """Shape of the core tensor, without the layer axis."""
    hf: tuple[str, ...]
    fusion: Fusion
    sizes: Sizes

    def split(self, core: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the Hugging Face tensors of the core tensor by name. Some are views of it."""
        return dict(zip(self.hf, self.fusion.split(core, self.sizes), strict=True))

    def join(self, hf: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the core tensor of the Hugging Face tensors, given in the order of `hf`."""
        return self.fusion.join(hf, self.sizes)

    def hf_shapes(self) -> dict[str, torch.Size]:
        """Return the shape of each Hugging Face tensor by name."""
        parts = self.split(torch.empty(self.shape, device="meta"))
        return {name: part.shape for name, part in parts.items()}


def weights_of(sizes: Sizes) -> Iterator[Weight]:
    """Yield every weight of a model: those before the layers, layer by layer, then those after the layers."""
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

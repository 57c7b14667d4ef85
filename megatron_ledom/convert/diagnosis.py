"""Find where two models that should be equal differ: the first layer, the first tensor in it, and the likely cause.

Both models get the same hidden states, so the first tensor that differs has the error. Shape letters: B batch, S sequence, w
width of the tensor.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import linear

from megatron_ledom.convert.stock_side import StockSide

if TYPE_CHECKING:
    from megatron_ledom.convert.core_side import CoreSide

EQUAL = 1e-3
"""Limit, as a fraction of the largest value. Rounding changes a layer far less, a wrong weight more."""
SEARCHED_WIDTH = 8192
"""Largest width at which the columns of a tensor are searched for a permutation."""
WEIGHTS = {
    "input norm": "input_layernorm.weight",
    "queries": "self_attn.q_proj",
    "keys": "self_attn.k_proj",
    "values": "self_attn.v_proj",
    "attention": "",
    "output projection": "self_attn.o_proj.weight",
    "post-attention norm": "post_attention_layernorm.weight",
    "gate": "mlp.gate_proj.weight",
    "up": "mlp.up_proj.weight",
    "down projection": "mlp.down_proj.weight",
}
"""Tensors that are compared in a layer, in the order of the computation -> the weight that produces each."""
EXCHANGED = {
    frozenset(("keys", "values")): "QKV order",
    frozenset(("queries", "keys")): "QKV order",
    frozenset(("queries", "values")): "QKV order",
    frozenset(("gate", "up")): "gate/up order",
}
Taps = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Stage:
    """One comparison of both models: of the embedding, a layer or the head."""

    name: str
    index: int | None
    """Index of a layer; None for embedding and head."""
    before: torch.Tensor
    """Input of the stage in the core model: hidden states [B, S, h], or ids [B, S] of the embedding."""
    difference: float
    """Largest difference, as a fraction of the largest value."""


def relative_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest absolute difference divided by the largest expected value; infinity if a value is not a number."""
    difference = float((found.float() - expected.float()).abs().max() / expected.float().abs().max().clamp_min(1e-30))
    return difference if difference == difference else float("inf")


def are_equal(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Return True if two tensors differ by rounding only."""
    return found.shape == expected.shape and relative_difference(found, expected) <= EQUAL


def walk(core: "CoreSide", stock: StockSide, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, list[Stage]]:
    """Return the logits [B, S, V] of ids [B, S] by the core and the stock model, and the differences of their stages.

    To save memory, only the first stage that differs and the last stages are returned.
    """
    hidden, other = core.embed(ids), stock.embed(ids)
    stages = [Stage("the embedding", None, ids, relative_difference(other, hidden))]
    for index in range(core.num_layers):
        before = hidden
        with core.layer(index) as layer:
            hidden = core.run_layer(layer, hidden)
        with stock.layer(index) as layer:
            other = stock.run_layer(layer, other)
        if stages[-1].difference <= EQUAL and index:
            stages.pop()
        stages.append(Stage(f"layer {index}", index, before, relative_difference(other, hidden)))
        if stages[0].difference > EQUAL:
            stages = stages[:1]
    expected, found = core.head(core.final_norm(hidden)), stock.head(stock.final_norm(other))
    stages.append(Stage("the head", None, hidden, relative_difference(found, expected)))
    return expected, found, stages


def explain(core: "CoreSide", stock: StockSide, stages: list[Stage]) -> str:
    """Return a text with the first stage that differs, the weight in it and the likely cause."""
    stage = next((stage for stage in stages if stage.difference > EQUAL), max(stages, key=lambda stage: stage.difference))
    if stage.name == "the embedding":
        cause = _cause("embedding", {"embedding": stock.embed(stage.before)}, {"embedding": core.embed(stage.before)}, 0)
        return f"the first difference is in the embedding (model.embed_tokens.weight): {cause}"
    if stage.index is None:
        return f"the first difference is after the layers: {_explain_head(core, stock, stage.before)}"
    with core.layer(stage.index) as layer:
        expected = core_taps(core, layer, stage.before)
    with stock.layer(stage.index) as layer:
        found, weights = stock_taps(stock, layer, stage.before)
        name = next((name for name in WEIGHTS if not are_equal(found[name], expected[name])), "attention")
        transposed = _transposed(weights.get(name), expected[name])
    where = f" ({WEIGHTS[name]})" if WEIGHTS[name] else ""
    cause = "the weight is transposed" if transposed else _cause(name, found, expected, _head_width(stock))
    return f"the first difference is in {stage.name}, at the {name}{where}: {cause}"


def core_taps(core: "CoreSide", layer: Any, hidden: torch.Tensor) -> Taps:
    """Return the tensors of a core layer by their names in WEIGHTS, each [B, S, w]."""
    attention, mlp = layer.self_attention, layer.mlp
    modules = {
        "input norm": layer.input_layernorm,
        "output projection": attention.linear_proj,
        "post-attention norm": layer.pre_mlp_layernorm,
        "gate and up": mlp.linear_fc1,
        "down projection": mlp.linear_fc2,
    }
    with _recording(modules) as (outputs, inputs):
        core.run_layer(layer, hidden)
    query, key, value = attention.get_query_key_value_tensors(outputs["input norm"])
    taps = {name: output for name, output in outputs.items() if name != "gate and up"}
    taps["attention"] = inputs["output projection"]
    taps["gate"], taps["up"] = outputs["gate and up"].chunk(2, -1)
    taps |= {"queries": query.flatten(2), "keys": key.flatten(2), "values": value.flatten(2)}
    return {name: tap.transpose(0, 1).float().cpu() for name, tap in taps.items()}


def stock_taps(stock: StockSide, layer: Any, hidden: torch.Tensor) -> tuple[Taps, dict[str, tuple[torch.Tensor, Any]]]:
    """Return the tensors of a stock layer as `core_taps` does, and (input, projection) of each that a projection produces."""
    attention, mlp = layer.self_attn, layer.mlp
    projections = {
        "queries": attention.q_proj,
        "keys": attention.k_proj,
        "values": attention.v_proj,
        "output projection": attention.o_proj,
        "gate": mlp.gate_proj,
        "up": mlp.up_proj,
        "down projection": mlp.down_proj,
    }
    norms = {"input norm": layer.input_layernorm, "post-attention norm": layer.post_attention_layernorm}
    normed = {"queries": getattr(attention, "q_norm", None), "keys": getattr(attention, "k_norm", None)}
    with _recording({**projections, **norms}) as (outputs, inputs):
        stock.run_layer(layer, hidden)
    taps = {**outputs, "attention": inputs["output projection"]}
    for name, norm in normed.items():
        if norm is not None:
            taps[name] = norm(taps[name].view(*taps[name].shape[:2], -1, norm.weight.shape[0])).flatten(-2)
    produced = {name: (inputs[name], module) for name, module in projections.items() if normed.get(name) is None}
    return {name: tap.float() for name, tap in taps.items()}, produced


@contextmanager
def _recording(modules: Mapping[str, Any]) -> Iterator[tuple[Taps, Taps]]:
    """Yield (outputs, inputs) of modules by name, filled while they run."""
    outputs: Taps = {}
    inputs: Taps = {}

    def keep(name: str) -> Any:
        """Return the hook of one module."""

        def hook(module: Any, arguments: Any, output: Any) -> None:
            outputs[name] = (output[0] if isinstance(output, tuple) else output).clone()  # later modules may add in place
            inputs[name] = arguments[0].clone() if arguments else outputs[name]

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    try:
        yield outputs, inputs
    finally:
        for handle in handles:
            handle.remove()


def _head_width(stock: StockSide) -> int:
    config = stock.config
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _transposed(produced: tuple[torch.Tensor, Any] | None, expected: torch.Tensor) -> bool:
    if produced is None or produced[1].weight.shape[0] != produced[1].weight.shape[1]:
        return False
    return are_equal(linear(produced[0], produced[1].weight.T, produced[1].bias), expected)


def _cause(name: str, found: Taps, expected: Taps, head: int) -> str:
    """Return the mistake that produces the found tensor from the expected one. `head`: width of a head, or 0."""
    ours, theirs = found[name], expected[name]
    if ours.shape != theirs.shape:
        return f"its width is {ours.shape[-1]}, expected {theirs.shape[-1]}"
    if name == "attention":
        return "rotary layout, base or scaling: queries, keys and values agree before the rotation"
    scale = float((ours * theirs).sum() / theirs.square().sum())
    if are_equal(ours, scale * theirs):
        return (
            f"norm eps, or the weight, makes it {scale:.5g} times the expected value"
            if "norm" in name
            else (f"the weight is scaled: the result is {scale:.5g} times the expected value")
        )
    if "norm" in name and are_equal(ours, ours.mul(theirs).sum(-1, True) / theirs.square().sum(-1, True) * theirs):
        return "norm eps: each position is scaled by a different factor"
    for other, tensor in expected.items():
        if other != name and are_equal(ours, tensor):
            return f"{EXCHANGED.get(frozenset((name, other)), 'order of the weights')}: it equals the expected {other}"
    return _permutation(ours.flatten(0, 1), theirs.flatten(0, 1), head if name in ("queries", "keys", "values") else 0)


def _permutation(found: torch.Tensor, expected: torch.Tensor, head: int) -> str:
    """Return the likely cause: another order, if found [n, w] has the columns of expected; otherwise other values."""
    other = "the weight has other values: those of another tensor, or it is damaged"
    width = found.shape[1]
    if width > SEARCHED_WIDTH:
        return other
    likeness = torch.nn.functional.normalize(found, dim=0).T @ torch.nn.functional.normalize(expected, dim=0)
    source, position = likeness.argmax(1), torch.arange(width)
    if not are_equal(found, expected[:, source]):
        return other
    if head and torch.equal(source // head, position // head):
        return "rotary layout: the rows of each head are in another order"
    if head and torch.equal(source % head, position % head):
        return "QKV order: the heads are in another order"
    return "QKV order: the rows of several heads are mixed" if head else "the rows are in another order"


def _explain_head(core: "CoreSide", stock: StockSide, hidden: torch.Tensor) -> str:
    expected, found = core.final_norm(hidden), stock.final_norm(hidden)
    if not are_equal(found, expected):
        cause = _cause("final norm", {"final norm": found}, {"final norm": expected}, 0)
        return f"at the final norm (model.norm.weight): {cause}"
    wanted, logits, embedded = core.head(expected), stock.head(expected), stock.embedding_as_head(expected)
    if are_equal(logits, wanted):
        return "no single stage differs, so small differences add up: precision, or norm eps"
    if are_equal(embedded, wanted):
        return "at the output layer (lm_head.weight), tied head: the embedding in the trained model, but not in the folder"
    if are_equal(embedded, logits):
        return "at the output layer (lm_head.weight), tied head: the embedding in the folder, but not in the trained model"
    cause = _cause("output layer", {"output layer": logits}, {"output layer": wanted}, 0)
    if "rows" in cause:
        cause = f"vocabulary padding or order: {cause}"
    return f"at the output layer (lm_head.weight): {cause}"

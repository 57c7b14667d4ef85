"""Memory of a rank, in bytes, tensor by tensor. docs/planner.md derives the list; a test compares it with the real layers.

There are three ways of counting. `published`: the formulas of Korthikanti et al. 2022 (arXiv 2205.05198, section 4). `cpu`: the
tensors that torch saves for this package's layers on a CPU. `cuda`: the same with fused norms, as torch and Transformer Engine
have them on GPUs.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from megatron_ledom.planning.matrix_shards import matrix_shards, matrix_sizes
from megatron_ledom.planning.schedule import most_in_flight
from megatron_ledom.planning.shapes import Architecture, Layout

Counting = Literal["published", "cpu", "cuda"]
GIB = 2**30
EMA_BYTES = 4
"""Bytes per weight of a moving average, on a device and in a checkpoint."""


@dataclass(frozen=True, slots=True)
class SavedTensor:
    """A tensor kept from the forward to the backward pass of one micro-batch."""

    name: str
    num_bytes: int
    module: str = ""
    """The part of the layer that keeps the tensor; selective recompute of core_attn or mlp drops it."""


@dataclass(frozen=True, slots=True)
class StageMemory:
    """Peak memory of one rank of a pipeline stage, in bytes."""

    stage: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    """Activations of all micro-batches in flight."""
    logits: int
    """Logits, their gradient (in the same memory) and the tensors that the loss keeps."""
    working: int
    """Short-lived tensors: one recomputed group of layers, gradients of the widest tensors, gathered sequences."""
    buffers: int
    """Buffers of sends and receives between stages."""

    @property
    def state(self) -> int:
        """Bytes that do not depend on the batch."""
        return self.weights + self.gradients + self.optimizer

    @property
    def allocated(self) -> int:
        """Bytes of all tensors, without the allowance for allocator, CUDA and NCCL (`hardware.Hardware.allowance`)."""
        return self.state + self.activations + self.logits + self.working + self.buffers


def layer_tensors(model: Architecture, layout: Layout, counting: Counting) -> list[SavedTensor]:
    """Return all tensors that one layer keeps of one micro-batch without recompute, in the order of the forward pass."""
    sharded, tokens = layout.spread_tokens, layout.tokens
    e, hidden = model.element_bytes, model.hidden_size
    mask = SavedTensor("dropout mask", (e if counting == "cpu" else 1) * hidden * sharded)
    found = [*_norm("input norm", model, sharded, counting)]
    found += [SavedTensor("input of the qkv product", e * hidden * sharded)]
    found += _attention(model, layout, counting)
    found += [SavedTensor("input of the output product", e * model.query_width // layout.tensor * tokens)]
    found += [mask] if model.hidden_dropout else []
    found += [*_norm("pre-mlp norm", model, sharded, counting)]
    found += [SavedTensor("input of the first mlp product", e * hidden * sharded, "mlp input")]
    found += _feed_forward(model, layout)
    return found + ([mask] if model.hidden_dropout else [])


def _norm(name: str, model: Architecture, tokens: int, counting: Counting) -> Iterator[SavedTensor]:
    """Yield the tensors that a norm keeps. On a CPU torch keeps the input and the normalised values in fp32."""
    e, hidden = model.element_bytes, model.hidden_size
    if counting == "cpu":
        yield SavedTensor(f"{name}: input in fp32", 4 * hidden * tokens)
        yield SavedTensor(f"{name}: 1 / root mean square", 4 * tokens)
        yield SavedTensor(f"{name}: normalised", 4 * hidden * tokens)
    else:
        yield SavedTensor(f"{name}: input", e * hidden * tokens)
        if counting == "cuda":
            yield SavedTensor(f"{name}: statistics", 4 * tokens * (2 if model.biased else 1))


def _key_heads(model: Architecture, layout: Layout) -> int:
    """Return the number of key-value heads on a rank. If there are fewer heads than ranks, several ranks have the same head."""
    return max(1, model.num_query_groups // layout.tensor)


def _attention(model: Architecture, layout: Layout, counting: Counting) -> list[SavedTensor]:
    e, tokens = model.element_bytes, layout.tokens
    queries = model.query_width // layout.tensor
    keys = _key_heads(model, layout) * model.head_dim
    heads = model.num_attention_heads // layout.tensor
    found: list[SavedTensor] = []
    if counting != "published" and model.layers != "fused":
        angles = layout.seq_length // layout.context * model.head_dim * e
        found += [SavedTensor("cosines and sines of queries and keys", 4 * angles)]
    if counting == "cpu" and layout.context > 1:
        return found + _attention_over_ranks(model, layout)
    found += [SavedTensor("queries", e * queries * tokens), SavedTensor("keys", e * keys * tokens)]
    if counting == "published" or model.layers == "fused":
        found += [SavedTensor("values", e * keys * tokens)]
    else:  # values are a view of the whole product, so all of it is kept
        width = queries + 2 * keys
        if model.num_query_groups < layout.tensor:  # megatron-core gathers the product of all ranks
            width = model.query_width + 2 * model.head_dim * model.num_query_groups
        found += [SavedTensor("values, as a view of queries, keys and values", e * width * tokens)]
    if model.flash:
        found += [SavedTensor("log-sum-exp of the scores", 4 * heads * tokens, "core_attn")] if counting != "published" else []
    else:
        scores = heads * tokens * layout.seq_length
        found += [SavedTensor("softmax of the scores", e * scores, "core_attn")]
        if model.attention_dropout:
            found += [
                SavedTensor("mask of dropped scores", scores, "core_attn"),
                SavedTensor("dropped scores", e * scores, "core_attn"),
            ]
    return found


def _attention_over_ranks(model: Architecture, layout: Layout) -> list[SavedTensor]:
    """Return the tensors of this package's context parallelism: all keys and values, and two masked chunks of queries."""
    e, tokens = model.element_bytes, layout.tokens
    queries, keys = model.query_width // layout.tensor, _key_heads(model, layout) * model.head_dim
    chunk = layout.seq_length // (2 * layout.context)
    masks = (2 * layout.context + 1) * chunk * chunk
    return [
        SavedTensor("queries", e * queries * tokens),
        SavedTensor("positions of the chunks", 16 * layout.context),
        SavedTensor("keys and values of all ranks", 2 * e * keys * tokens * layout.context),
        SavedTensor("masks of both chunks", e * masks, "core_attn"),
        SavedTensor("log-sum-exp of the scores", 4 * (model.num_attention_heads // layout.tensor) * tokens, "core_attn"),
        SavedTensor("outputs of both chunks", e * queries * tokens, "core_attn"),
    ]


def _feed_forward(model: Architecture, layout: Layout) -> list[SavedTensor]:
    e, width, tokens = model.element_bytes, model.ffn_hidden_size // layout.tensor, layout.tokens
    if not model.gated:
        inner = [SavedTensor("input of GELU", e * width * tokens, "mlp")]
    else:
        inner = [
            SavedTensor("gate and up projection", 2 * e * width * tokens, "mlp"),
            *(_unfused_copies(e * width * tokens) if model.layers == "unfused" else []),
        ]
    return [*inner, SavedTensor("input of the second mlp product", e * width * tokens, "mlp")]


def _unfused_copies(num_bytes: int) -> list[SavedTensor]:
    """Return the copies that unfused SwiGLU keeps; the fused operator computes them again."""
    return [SavedTensor("silu of the gate", num_bytes, "mlp"), SavedTensor("up projection with its offset", num_bytes, "mlp")]


def counting_for(model: Architecture, layout: Layout, is_cpu: bool) -> Counting:
    """Return the way of counting for a device. Fused layers keep the same tensors on a CPU as on a GPU; context parallelism does not."""
    return "cpu" if is_cpu and (model.layers != "fused" or layout.context > 1) else "cuda"


def kept_of_layer(model: Architecture, layout: Layout, counting: Counting) -> int:
    """Return the bytes that one layer keeps of one micro-batch, with selective recompute. `chunk_bytes` adds full recompute."""
    dropped = set(layout.recompute_modules) if layout.recompute == "selective" else set()
    kept = sum(tensor.num_bytes for tensor in layer_tensors(model, layout, counting) if tensor.module not in dropped)
    if layout.recompute == "selective" and counting == "cpu":  # the kind of mask, an argument that the recompute keeps
        kept += 4 * ("core_attn" in dropped)
    return kept


def chunk_bytes(model: Architecture, layout: Layout, counting: Counting, is_first: bool, is_last: bool) -> int:
    """Return the bytes that a model chunk keeps of one micro-batch, with its embedding and final norm, without logits."""
    layers = model.num_layers // (layout.pipeline * layout.chunks)
    kept = kept_of_layer(model, layout, counting)
    boundary = model.element_bytes * model.hidden_size * layout.spread_tokens
    if layout.recompute != "full":
        total = layers * kept
    elif layout.recompute_method == "block":
        total = layout.recompute_num_layers * boundary + (layers - layout.recompute_num_layers) * kept
    else:
        total = -(-layers // layout.recompute_num_layers) * boundary
    if counting == "published":
        return total
    if layout.recompute == "full":  # the rotation angles, one tensor for all recomputed layers
        total += 4 * layout.seq_length // layout.context * model.head_dim
    if is_first:
        total += layout.tokens * (9 if layout.tensor > 1 else 8)  # ids, and a mask of the ids in this slice
        total += (
            model.hidden_dropout * (model.element_bytes if counting == "cpu" else 1) * model.hidden_size * layout.spread_tokens
        )
    elif counting == "cpu" and model.element_bytes == 2 and layout.recompute != "full":
        total += boundary  # the received tensor, of which the norm has a copy
    if is_last:
        total += sum(tensor.num_bytes for tensor in _norm("final norm", model, layout.spread_tokens, counting)) + boundary
    else:
        total += boundary  # the result, kept for the backward pass
    return total


def logits_bytes(model: Architecture, layout: Layout) -> int:
    """Return the bytes of one micro-batch's logits, and of label, mark and log Z of each token."""
    return (model.element_bytes * model.padded_vocab_size // layout.tensor + 13) * layout.tokens


def activation_bytes(model: Architecture, layout: Layout, stage: int, counting: Counting) -> tuple[int, int]:
    """Return the bytes of activations and of logits on a rank of `stage` when most micro-batches are in flight."""
    flight = most_in_flight(stage, layout.pipeline, layout.chunks, layout.num_microbatches)
    kept = 0
    for chunk, count in enumerate(flight):
        is_first, is_last = stage == chunk == 0, stage == layout.pipeline - 1 and chunk == layout.chunks - 1
        kept += count * chunk_bytes(model, layout, counting, is_first, is_last)
    has_logits = stage == layout.pipeline - 1 and counting != "published"
    return kept, logits_bytes(model, layout) * max(1, flight[-1]) if has_logits else 0


def stage_parameters(model: Architecture, layout: Layout, stage: int) -> dict[str, int]:
    """Return the number of weights on each rank of a stage, by part of the model. Tensor parallelism divides the matrices."""
    is_first, is_last = stage == 0, stage == layout.pipeline - 1
    layers, hidden, tensor = model.num_layers // layout.pipeline, model.hidden_size, layout.tensor
    keys = model.head_dim * model.num_query_groups
    vocabulary = model.padded_vocab_size * hidden // tensor
    biases = layers * (hidden + (model.query_width + 2 * keys) // tensor) if model.biased else 0
    mlp_biases = layers * (hidden + (model.gates - 1) * model.ffn_hidden_size // tensor) if model.biased else 0
    return {
        "embedding": vocabulary + model.learned_positions * hidden if is_first else 0,
        "attention": layers * 2 * hidden * (model.query_width + keys) // tensor + biases,
        "mlp": layers * model.gates * hidden * model.ffn_hidden_size // tensor + mlp_biases,
        "norms": (2 * layers + is_last) * hidden * (2 if model.biased else 1),
        "output": vocabulary if is_last and not (model.shared_embeddings and is_first) else 0,
    }


def muon_parameters(layout: Layout, counts: dict[str, int]) -> int:
    """Return the number of weights that Muon updates, of the `stage_parameters` of a rank."""
    return counts["attention"] + counts["mlp"] if layout.muon else 0


def buffer_elements(model: Architecture, layout: Layout, stage: int) -> int:
    """Return the elements of the buffers of weights and of gradients on each rank, with the padding of whole matrices."""
    counts = stage_parameters(model, layout, stage)
    padding = matrix_shards(model, layout, stage).padded - muon_parameters(layout, counts) if layout.is_layer_wise else 0
    return sum(counts.values()) + padding


def state_bytes(model: Architecture, layout: Layout, parameters: int, in_muon: int = 0) -> tuple[int, int, int]:
    """Return the bytes of weights, fp32 gradients and the optimizer's state; for bf16 the state includes fp32 weights.

    in_muon: the weights with one momentum (Muon); the others have two moments (AdamW). A moving average of the weights counts as state.
    """
    each = (12 if model.element_bytes == 2 else 8) + (EMA_BYTES if layout.ema else 0)
    copies = layout.data * layout.context if layout.distributed_optimizer else 1
    return parameters * model.element_bytes, parameters * 4, -(-(parameters * each - 4 * in_muon) // copies)


def stage_state_bytes(model: Architecture, layout: Layout, stage: int) -> tuple[int, int, int]:
    """Return `state_bytes` of a pipeline stage, on the rank with most. The layer-wise optimizer has whole matrices and padded buffers."""
    counts = stage_parameters(model, layout, stage)
    parameters, in_muon = sum(counts.values()), muon_parameters(layout, counts)
    if not layout.is_layer_wise:
        return state_bytes(model, layout, parameters, in_muon)
    buffer, each = buffer_elements(model, layout, stage), state_bytes(model, replace(layout, data=1, context=1), 1, 1)[2]
    most = int(matrix_shards(model, layout, stage).most(matrix_sizes(model, layout)))
    return buffer * model.element_bytes, buffer * 4, state_bytes(model, layout, parameters - in_muon)[2] + most * each


def working_bytes(model: Architecture, layout: Layout, counting: Counting) -> int:
    """Return the bytes of short-lived tensors of the backward pass.

    These are recomputed tensors, the two widest gradients and one gathered sequence.
    """
    tensors = layer_tensors(model, layout, counting)
    again = 0
    if layout.recompute == "full":
        layers = 1 if layout.recompute_method == "block" else layout.recompute_num_layers
        again = layers * sum(tensor.num_bytes for tensor in tensors)
    elif layout.recompute == "selective":
        again = sum(tensor.num_bytes for tensor in tensors if tensor.module in layout.recompute_modules)
    widest = max(model.gates - 1, 1) * model.ffn_hidden_size // layout.tensor
    gathered = model.hidden_size if layout.sequence_parallel else 0
    return again + model.element_bytes * layout.tokens * (2 * widest + gathered)


def stage_memory(model: Architecture, layout: Layout, stage: int, counting: Counting = "cuda") -> StageMemory:
    """Return the peak memory of each rank of a pipeline stage."""
    weights, gradients, optimizer = stage_state_bytes(model, layout, stage)
    activations, logits = activation_bytes(model, layout, stage, counting)
    boundary = model.element_bytes * model.hidden_size * layout.spread_tokens
    return StageMemory(
        stage=stage,
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=activations,
        logits=logits,
        working=working_bytes(model, layout, counting),
        buffers=4 * boundary if layout.pipeline > 1 else 0,
    )


def all_stages(model: Architecture, layout: Layout, counting: Counting = "cuda") -> list[StageMemory]:
    """Return the peak memory of every pipeline stage."""
    return [stage_memory(model, layout, stage, counting) for stage in range(layout.pipeline)]

"""Seconds of one iteration: kernels, collectives that overlap with them, pipeline schedule, gradients and optimizer.

The seconds of a kernel follow a roofline model whose peak depends on the kernel's shape.
"""

import math
from dataclasses import dataclass, field
from functools import cache

from megatron_ledom.planning.hardware import Hardware
from megatron_ledom.planning.matrix_shards import matrix_shards
from megatron_ledom.planning.memory import buffer_elements, stage_parameters
from megatron_ledom.planning.schedule import PassTimes, pipeline_seconds
from megatron_ledom.planning.shapes import Architecture, Layout

TILES = ((256, 128), (128, 256), (128, 128), (256, 64), (64, 256))
"""Rows and columns of the tiles of a matrix product. Smaller tiles reuse less of the loaded data."""


@dataclass(frozen=True, slots=True)
class Software:
    """Properties of a program that affect its speed on given hardware."""

    fused: bool = False
    """True if each element-wise chain (bias, GELU or SwiGLU, dropout, residual, rotation) is one kernel. For this package see
    `Architecture.layers`."""
    scattered_transfers: bool = False
    """True if a rank sends only its tensor-parallel part to the next stage, also without sequence parallelism."""
    blocking_transfers: bool = False
    """True if stages wait while they send, also with the interleaved schedule."""
    gradient_bytes: int = 4
    """Bytes of an element of the gradients that data-parallel ranks exchange."""
    loss_bytes: int = 36
    """Bytes that the loss reads and writes for each logit, forward and backward together."""
    deferred_output: int = 0
    """Number of micro-batches whose gradient of the output matrix is computed after the last stage's passes
    (`wgrad_deferral_limit`)."""
    slowdown: float = 1.0
    """Factor on the time of every pass, for programs and clusters on which the hardware's numbers were not fitted."""


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds of one pass, by kind."""

    matmul: float = 0.0
    attention: float = 0.0
    memory: float = 0.0
    tensor_comm: float = 0.0
    context_comm: float = 0.0

    @property
    def total(self) -> float:
        """Sum of the parts, which do not overlap."""
        return self.matmul + self.attention + self.memory + self.tensor_comm + self.context_comm

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(*(getattr(self, name) + getattr(other, name) for name in Cost.__slots__))

    def times(self, factor: float) -> "Cost":
        """Return the cost of `factor` such passes."""
        return Cost(*(getattr(self, name) * factor for name in Cost.__slots__))


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of one iteration, in total and by part."""

    total: float
    pipeline: float
    """Seconds from the start of the first forward to the end of the last backward pass."""
    bubble: float
    """Seconds of the pipeline in which the first stage waits."""
    data_comm: float
    """Exposed seconds of the data-parallel traffic of gradients and parameters."""
    optimizer: float
    other: float
    passes: Cost = field(default_factory=Cost)
    """Cost of all passes of the slowest stage."""
    times: PassTimes = field(default_factory=lambda: PassTimes(((0.0,),), ((0.0,),)))

    def total_of(self, num_microbatches: int) -> float:
        """Return the seconds of an iteration of the same run with another number of micro-batches."""
        return pipeline_seconds(self.times, num_microbatches) + self.data_comm + self.optimizer + self.other


def step_time(model: Architecture, layout: Layout, hardware: Hardware, software: Software | None = None) -> StepTime:
    """Return the seconds of one iteration of a run."""
    software = software or Software()
    times, passes = pass_times(model, layout, hardware, software)
    pipeline = pipeline_seconds(times, layout.num_microbatches)
    computing = layout.num_microbatches * (sum(times.forward[0]) + sum(times.backward[0]))
    data = data_comm_seconds(model, layout, hardware, times, software.gradient_bytes)
    data += hardware.congestion * math.log2(num_data_nodes(layout, hardware)) * pipeline
    optimizer = optimizer_seconds(model, layout, hardware)
    other = hardware.iteration_ms * 1e-3
    return StepTime(
        total=pipeline + data + optimizer + other,
        pipeline=pipeline,
        bubble=pipeline - computing,
        data_comm=data,
        optimizer=optimizer,
        other=other,
        passes=passes,
        times=times,
    )


def pass_times(model: Architecture, layout: Layout, hardware: Hardware, software: Software) -> tuple[PassTimes, Cost]:
    """Return the pass times of every chunk, and the cost of all passes of the slowest stage."""
    cells: dict[tuple[bool, bool], tuple[Cost, Cost]] = {}
    stages: list[list[tuple[Cost, Cost]]] = []
    for stage in range(layout.pipeline):
        row = []
        for chunk in range(layout.chunks):
            ends = (stage == 0 and chunk == 0, stage == layout.pipeline - 1 and chunk == layout.chunks - 1)
            if ends not in cells:
                cells[ends] = chunk_cost(model, layout, hardware, software, *ends)
            row.append(cells[ends])
        stages.append(row)
    sums = [sum((forward + backward for forward, backward in row), Cost()) for row in stages]
    times = PassTimes(
        forward=tuple(tuple(forward.total for forward, _ in row) for row in stages),
        backward=tuple(tuple(backward.total for _, backward in row) for row in stages),
        transfer=transfer_seconds(model, layout, hardware, software),
        transfer_blocks=layout.chunks == 1 or software.blocking_transfers,
        deferred=min(software.deferred_output, layout.num_microbatches) * output_gradient_seconds(model, layout, hardware),
    )
    return times, max(sums, key=lambda cost: cost.total).times(layout.num_microbatches)


def chunk_cost(
    model: Architecture, layout: Layout, hardware: Hardware, software: Software, is_first: bool, is_last: bool
) -> tuple[Cost, Cost]:
    """Return the forward and the backward cost of one model chunk for one micro-batch; backward includes recompute."""
    layers = model.num_layers // (layout.pipeline * layout.chunks)
    forward, backward, core = layer_cost(model, layout, hardware, software)
    again = Cost()
    if layout.recompute == "full":
        count = layout.recompute_num_layers if layout.recompute_method == "block" else layers
        again = forward.times(count)
    elif layout.recompute == "selective":
        again = core.times(layers) if "core_attn" in layout.recompute_modules else again
        if "mlp" in layout.recompute_modules:
            again += _mlp_again(forward, model).times(layers)
    inline = 1 - min(1.0, software.deferred_output / layout.num_microbatches)
    ends = _ends(model, layout, hardware, is_first, is_last, inline, software.loss_bytes)
    both = forward.times(layers) + ends[0], backward.times(layers) + again + ends[1]
    return both[0].times(software.slowdown), both[1].times(software.slowdown)


def output_gradient_seconds(model: Architecture, layout: Layout, hardware: Hardware) -> float:
    """Return the seconds of the gradient of the output matrix for one micro-batch."""
    rows, hidden = model.padded_vocab_size // layout.tensor, model.hidden_size
    return matmul_seconds(hardware, rows, hidden, layout.tokens, model.element_bytes, 8 * rows * hidden)


def _ends(
    model: Architecture, layout: Layout, hardware: Hardware, is_first: bool, is_last: bool, inline: float, loss_bytes: int
) -> tuple[Cost, Cost]:
    """Return the costs of the embedding on the first chunk, and of norm, logits and loss on the last one.

    inline: the fraction of micro-batches whose gradient of the output matrix is not deferred.
    """
    forward, backward = Cost(), Cost()
    e, hidden, tokens, tensor = model.element_bytes, model.hidden_size, layout.tokens, layout.tensor
    ranks, rows = group(tensor, 1, hardware), model.padded_vocab_size // tensor
    reduce = gather_seconds(hardware, ranks, e * hidden * tokens) * (1 if layout.sequence_parallel else 2)
    if is_first:
        light = memory_seconds(hardware, 3 * e * hidden * tokens)
        forward, backward = Cost(memory=light, tensor_comm=reduce), Cost(memory=light)
    if is_last:
        logits = matmul_seconds(hardware, tokens, rows, hidden, e)
        gradients = matmul_seconds(hardware, tokens, hidden, rows, e)
        gradients += inline * output_gradient_seconds(model, layout, hardware)
        loss = memory_seconds(hardware, rows * tokens * (loss_bytes + 2 * (e - 2)) / 2)
        forward += Cost(matmul=logits, memory=loss, tensor_comm=reduce if layout.sequence_parallel else 0.0)
        backward += Cost(matmul=gradients, memory=loss, tensor_comm=reduce)
    return forward, backward


def layer_cost(model: Architecture, layout: Layout, hardware: Hardware, software: Software) -> tuple[Cost, Cost, Cost]:
    """Return the forward, backward and core-attention recompute cost of one layer for one micro-batch."""
    products, inputs, weights = _products(model, layout, hardware)
    attention = _attention(model, layout, hardware)
    light = _element_wise(model, layout, hardware, software)
    tensor_forward, tensor_backward = _tensor_comm(model, layout, hardware, (products, inputs, weights))
    context_forward, context_backward = _context_comm(model, layout, hardware, attention)
    forward = Cost(products, attention[0], light[0], tensor_forward, context_forward)
    backward = Cost(inputs + weights, attention[1], light[1], tensor_backward, context_backward)
    return forward, backward, Cost(attention=attention[0])


def _mlp_again(forward: Cost, model: Architecture) -> Cost:
    """Return the cost of recomputing the feed-forward block: its fraction of the layer's weights, and half of the collectives."""
    keys = model.head_dim * model.num_query_groups
    mlp = model.gates * model.hidden_size * model.ffn_hidden_size
    fraction = mlp / (mlp + 2 * model.hidden_size * (model.query_width + keys))
    return Cost(matmul=fraction * forward.matmul, memory=0.5 * forward.memory, tensor_comm=0.5 * forward.tensor_comm)


def _products(model: Architecture, layout: Layout, hardware: Hardware) -> tuple[float, float, float]:
    """Return the seconds of a layer's four matrix products: forward, gradients of inputs, gradients of weights."""
    hidden, tokens, tensor, e = model.hidden_size, layout.tokens, layout.tensor, model.element_bytes
    keys = model.head_dim * model.num_query_groups
    inner = model.ffn_hidden_size // tensor
    shapes = [
        ((model.query_width + 2 * keys) // tensor, hidden),
        (hidden, model.query_width // tensor),
        ((model.gates - 1) * inner, hidden),
        (hidden, inner),
    ]
    forward = sum(matmul_seconds(hardware, tokens, columns, depth, e) for columns, depth in shapes)
    inputs = sum(matmul_seconds(hardware, tokens, depth, columns, e) for columns, depth in shapes)
    weights = sum(matmul_seconds(hardware, columns, depth, tokens, e, 8 * columns * depth) for columns, depth in shapes)
    return forward, inputs, weights


def _attention(model: Architecture, layout: Layout, hardware: Hardware) -> tuple[float, float]:
    """Return the forward and backward seconds of scores, softmax and values."""
    heads, length, tokens = model.num_attention_heads // layout.tensor, layout.seq_length, layout.tokens
    flops = 4 * tokens * length * heads * model.head_dim
    if model.flash:
        return flash_seconds(hardware, flops / 2)
    e, scores = model.element_bytes, heads * tokens * length
    batch = heads * layout.micro_batch_size
    rows = tokens // layout.micro_batch_size
    by_depth = matmul_seconds(hardware, batch * rows, length, model.head_dim, e)  # all heads in one launch
    by_length = matmul_seconds(hardware, batch * rows, model.head_dim, length, e)
    dropout = (2 * e + 1) * model.attention_dropout
    softmax = memory_seconds(hardware, scores * (2 * e + dropout))
    softmax_backward = memory_seconds(hardware, scores * (3 * e + dropout))
    return by_depth + by_length + softmax, 2 * (by_depth + by_length) + softmax_backward


def _element_wise(model: Architecture, layout: Layout, hardware: Hardware, software: Software) -> tuple[float, float]:
    """Return the forward and backward seconds of norms, residuals, rotation and activation, by the elements read and written."""
    e, hidden = model.element_bytes, model.hidden_size
    norms, norms_backward = 2 * 2 * hidden, 2 * 3 * hidden
    residual = 2 * hidden * (3 + (0.5 if model.hidden_dropout else 0.0))
    residual_backward = 2 * hidden * (2.5 if model.hidden_dropout else 1.0)
    inner = model.ffn_hidden_size // layout.tensor
    if model.gated:
        activation, activation_backward = (3, 5) if software.fused or model.layers != "unfused" else (7, 12)
    else:
        activation, activation_backward = (2, 3) if software.fused else (4, 5)
    rotated = 0 if model.biased else (model.query_width + model.head_dim * model.num_query_groups) // layout.tensor
    rotation = (2 if software.fused or model.layers == "fused" else 10) * rotated
    spread, whole = layout.spread_tokens * e, layout.tokens * e
    forward = spread * (norms + residual) + whole * (activation * inner + rotation)
    backward = spread * (norms_backward + residual_backward) + whole * (activation_backward * inner + rotation)
    return memory_seconds(hardware, forward), memory_seconds(hardware, backward)


def _tensor_comm(
    model: Architecture, layout: Layout, hardware: Hardware, products: tuple[float, float, float]
) -> tuple[float, float]:
    """Return the exposed forward and backward seconds of a layer's tensor-parallel traffic.

    In the backward pass it overlaps with the matrix products of the gradients, with `overlap_tensor` in both passes. products: the
    seconds of the forward products, of the gradients of inputs and of weights.
    """
    forward, inputs, weights = products
    ranks = group(layout.tensor, 1, hardware)
    whole = model.element_bytes * model.hidden_size * layout.tokens
    if not layout.sequence_parallel:
        each = all_reduce_seconds(hardware, ranks, whole)
        return 2 * each, exposed(hardware, 2 * each, weights / 2)
    each = gather_seconds(hardware, ranks, whole)
    hidden = exposed(hardware, 2 * each, inputs / 2) + exposed(hardware, 2 * each, weights / 2)
    if layout.overlap_tensor:  # the first of as many pieces as ranks is always exposed
        first = each / layout.tensor
        ahead = max(4 * first, exposed(hardware, 4 * each, forward))
        return ahead, max(2 * first, exposed(hardware, 2 * each, inputs / 2)) + hidden
    return 4 * each, 2 * each + hidden


def _context_comm(
    model: Architecture, layout: Layout, hardware: Hardware, attention: tuple[float, float]
) -> tuple[float, float]:
    """Return the exposed forward and backward seconds of the ring of keys and values, which overlaps with the attention."""
    if layout.context == 1:
        return 0.0, 0.0
    ranks = group(layout.context, layout.tensor, hardware)
    heads = max(1, model.num_query_groups // layout.tensor)
    each = gather_seconds(hardware, ranks, 2 * model.element_bytes * heads * model.head_dim * layout.tokens * layout.context)
    return exposed(hardware, each, attention[0]), exposed(hardware, 2 * each, attention[1])


def transfer_seconds(model: Architecture, layout: Layout, hardware: Hardware, software: Software) -> float:
    """Return the seconds to send the activations of one micro-batch to the next stage."""
    if layout.pipeline == 1:
        return 0.0
    tokens = layout.tokens // layout.tensor if software.scattered_transfers else layout.spread_tokens
    stride = layout.tensor * layout.context * layout.data
    speed = hardware.node_gb_per_second if 2 * stride <= hardware.gpus_per_node else hardware.network_gb_per_second
    return model.element_bytes * model.hidden_size * tokens / (speed * hardware.collective_efficiency * 1e9)


def data_comm_seconds(
    model: Architecture, layout: Layout, hardware: Hardware, times: PassTimes, gradient_bytes: int = 4
) -> float:
    """Return the exposed seconds of reducing gradients and gathering parameters.

    If the config overlaps them, passes hide a part.
    """
    copies = layout.data * layout.context
    if copies == 1:
        return 0.0
    ranks = group(copies, layout.tensor, hardware)
    parameters = max(buffer_elements(model, layout, stage) for stage in {0, layout.pipeline - 1})
    gradients = gather_seconds(hardware, ranks, gradient_bytes * parameters)
    gathered = gather_seconds(hardware, ranks, (model.element_bytes if layout.distributed_optimizer else 4) * parameters)
    if layout.overlap_grad_reduce:
        gradients = exposed_with_passes(hardware, layout, gradients, times.backward)
    if layout.overlap_param_gather:
        gathered = exposed_with_passes(hardware, layout, gathered, times.forward)
    return gradients + gathered


def num_data_nodes(layout: Layout, hardware: Hardware) -> int:
    """Return the number of nodes of a data-parallel group."""
    ranks = group(layout.data * layout.context, layout.tensor, hardware)
    return math.ceil(ranks.size / ranks.in_node)


def exposed_with_passes(hardware: Hardware, layout: Layout, collective: float, passes: tuple[tuple[float, ...], ...]) -> float:
    """Return the seconds that data-parallel traffic adds to the passes.

    A plain schedule overlaps it with one micro-batch. With chunks, the interleaved schedule runs each chunk for as many micro-batches
    as stages before the next one, and the traffic of a chunk starts or is needed at its own time. The traffic of the outermost chunk
    overlaps with one of its passes only.
    """
    one = max(map(sum, passes))
    if layout.chunks == 1:
        return delay(hardware, collective, one)
    whole = delay(hardware, collective, min(layout.pipeline, layout.num_microbatches) * one)
    return max(whole, delay(hardware, collective / layout.chunks, one / layout.chunks))


def optimizer_seconds(model: Architecture, layout: Layout, hardware: Hardware) -> float:
    """Return the seconds of the optimizer: it zeroes, measures and scales gradients, and updates weights and moments."""
    parameters = max(sum(stage_parameters(model, layout, stage).values()) for stage in {0, layout.pipeline - 1})
    copies = layout.data * layout.context if layout.distributed_optimizer else 1
    moved = memory_seconds(hardware, parameters * (4 + (4 + 8 + 4 + 24 + model.element_bytes) / copies))
    return moved + (muon_seconds(model, layout, hardware) if layout.muon else 0.0)


SLOWER = {"medium": 1, "high": 2, "highest": 16}
"""optimizer.muon_fp32_matmul_prec -> time of a product on a GPU, relative to bf16: TF32 has half its rate, and fp32 without tensor
cores about a sixteenth (19.5 of 312 TFLOP/s on an A100, 67 of 989 on an H100; NVIDIA's data sheets)."""
Product = tuple[int, int, int]
"""Rows, columns and depth of a product of matrices."""


def muon_products(model: Architecture, layout: Layout) -> list[list[Product]]:
    """Return the products of one Newton-Schulz iteration for each matrix of a layer, on each tensor-parallel rank.

    The matrices are that of queries, keys and values, or each of the three, then fc1, proj and fc2 (`matrix_shards.matrix_sizes`).
    For a matrix of m rows and n columns, m <= n, these are X X^T, A A and B X: 2 m m n, 2 m m m and 2 m m n operations. `duplicated`
    takes the whole matrix on every rank, `blockwise` the rank's part alone, and `distributed` the rank's part of X with the length of
    the whole other side.
    """
    assert layout.muon is not None
    hidden, keys = model.hidden_size, model.head_dim * model.num_query_groups
    joint = [model.query_width, keys, keys] if layout.muon.split_qkv else [model.query_width + 2 * keys]
    by_rows = [(rows, hidden) for rows in (*joint, (model.gates - 1) * model.ffn_hidden_size)]
    by_columns = [(hidden, columns) for columns in (model.query_width, model.ffn_hidden_size)]
    tensor = 1 if layout.muon.tp_mode == "duplicated" else layout.tensor
    parts = [(rows // tensor, columns, columns) for rows, columns in by_rows]
    parts += [(columns // tensor, rows, rows) for rows, columns in by_columns]
    found = []
    for part, other, side in parts:
        short, long = (side, part) if layout.muon.tp_mode == "distributed" else sorted((part, other))
        found.append([(short, short, long), (short, short, short), (short, long, short)])
    return found


def muon_flops(model: Architecture, layout: Layout) -> int:
    """Return the operations of the products of Muon's iterations for all matrices of a pipeline stage, on one tensor-parallel rank.

    With the layer-wise optimizer the data-parallel ranks share them; otherwise each has all.
    """
    assert layout.muon is not None
    layers = model.num_layers // layout.pipeline
    once = sum(2 * math.prod(product) for products in muon_products(model, layout) for product in products)
    return layers * layout.muon.steps * once


def muon_seconds(model: Architecture, layout: Layout, hardware: Hardware) -> float:
    """Return the seconds of the Newton-Schulz iterations on the rank with most of them.

    The layer-wise optimizer gives whole matrices to the data-parallel ranks.
    """
    assert layout.muon is not None
    slower = 1 if hardware.is_cpu else SLOWER[layout.muon.precision]
    *joint, fc1, proj, fc2 = (
        sum(matmul_seconds(hardware, rows, columns, depth) for rows, columns, depth in products)
        for products in muon_products(model, layout)
    )
    each = {"qkv": sum(joint), "fc1": fc1, "proj": proj, "fc2": fc2}
    if layout.distributed_optimizer:
        total = max(matrix_shards(model, layout, stage).most(each) for stage in {0, layout.pipeline - 1})
    else:
        total = model.num_layers // layout.pipeline * sum(each.values())
    return slower * layout.muon.steps * total


@dataclass(frozen=True, slots=True)
class Group:
    """Ranks of one collective: their number, and the number of those in one node."""

    size: int
    in_node: int

    def bandwidth(self, hardware: Hardware) -> float:
        """Return the bytes per second of a ring: that of the links in a node, or of its members' network cards between nodes."""
        inside = hardware.node_gb_per_second
        between = min(inside, hardware.network_gb_per_second * self.in_node)
        return (inside if self.size <= self.in_node else between) * hardware.collective_efficiency * 1e9


def group(size: int, stride: int, hardware: Hardware) -> Group:
    """Return the group of ranks that are `stride` apart. megatron-core's order is tensor, context, data, pipeline."""
    return Group(size, max(1, min(size, hardware.gpus_per_node // stride)))


def matmul_seconds(hardware: Hardware, rows: int, columns: int, depth: int, element_bytes: int = 2, added: int = 0) -> float:
    """Return the seconds of a product [rows, depth] x [depth, columns].

    added: further bytes that are read or written, such as an accumulated gradient.
    """
    fraction = shape_efficiency(rows, columns, depth, hardware.multiprocessors, hardware.matmul_half_depth)
    compute = 2 * rows * columns * depth / (hardware.peak_tflops * 1e12 * hardware.matmul_efficiency * fraction)
    return max(compute, memory_seconds(hardware, element_bytes * (rows * depth + depth * columns + rows * columns) + added))


@cache
def shape_efficiency(rows: int, columns: int, depth: int, multiprocessors: int, half_depth: float) -> float:
    """Return the fraction of the best efficiency that a product [rows, depth] x [depth, columns] can reach.

    It is below 1 if tiles do not fill whole waves of units, or if the depth is small.
    """
    best = 0.0
    for high, wide in TILES:
        tiles = math.ceil(rows / high) * math.ceil(columns / wide)
        filled = (rows * columns) / (high * wide * multiprocessors * math.ceil(tiles / multiprocessors))
        reuse = (high * wide / (high + wide)) / (256 * 128 / (256 + 128))
        best = max(best, filled * reuse**0.25)
    return best * depth / (depth + half_depth)


def memory_seconds(hardware: Hardware, num_bytes: float) -> float:
    """Return the seconds of a kernel that is limited by memory bandwidth."""
    return num_bytes / (hardware.memory_gb_per_second * 1e9 * hardware.memory_efficiency)


def flash_seconds(hardware: Hardware, forward_flops: float) -> tuple[float, float]:
    """Return the forward and backward seconds of flash attention, for the forward FLOPs under a causal mask."""
    peak = hardware.peak_tflops * 1e12
    backward = 2.5 * forward_flops / (peak * hardware.attention_backward_efficiency)
    return forward_flops / (peak * hardware.attention_efficiency), backward


def gather_seconds(hardware: Hardware, ranks: Group, whole_bytes: float) -> float:
    """Return the seconds of a ring all-gather to, or reduce-scatter from, `whole_bytes` on each rank."""
    if ranks.size == 1:
        return 0.0
    return (ranks.size - 1) * (whole_bytes / ranks.size / ranks.bandwidth(hardware) + hardware.latency_us * 1e-6)


def all_reduce_seconds(hardware: Hardware, ranks: Group, num_bytes: float) -> float:
    """Return the seconds of an all-reduce of `num_bytes`: a reduce-scatter, then an all-gather."""
    return 2 * gather_seconds(hardware, ranks, num_bytes)


def exposed(hardware: Hardware, collective: float, kernel_seconds: float) -> float:
    """Return the seconds of a collective that overlapping kernels of `kernel_seconds` do not hide."""
    return max(0.0, collective - hardware.overlap_efficiency * kernel_seconds)


def delay(hardware: Hardware, collective: float, kernel_seconds: float) -> float:
    """Return the seconds that a data-parallel collective adds to kernels of `kernel_seconds`, which it slows while they overlap."""
    slowdown = hardware.overlap_slowdown
    return max(collective * slowdown / (1 + slowdown), collective - kernel_seconds)

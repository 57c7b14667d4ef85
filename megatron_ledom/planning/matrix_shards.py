"""Matrices of the layers in the buffers of megatron-core's layer-wise optimizer, which Muon has with the distributed optimizer.

Each matrix is whole in the shard of one data-parallel rank. A bucket has a shard for each rank, all as long as the fullest one, so that the
buffers of weights and gradients are longer than the matrices. This is the packing of `_compute_per_buffer_param_layout`
(megatron-core 0.19, `optimizer/layer_wise_optimizer.py`), with sizes only; a test compares it with that function.
"""

import heapq
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache

from megatron_ledom.config.derived import bucket_elements, next_multiple
from megatron_ledom.planning.shapes import Architecture, Layout

FULL_ENOUGH = 0.9
"""A bucket grows until its matrices fill this part of the shards of its largest matrix."""
ALIGNMENT = 64
"""Elements to a multiple of which a matrix is aligned in its shard."""


@dataclass(frozen=True, slots=True)
class MatrixShards:
    """The shards of all matrices of a pipeline stage."""

    padded: int
    """Elements of the buffer of weights, and of that of gradients, on each rank."""
    ranks: tuple[Counter[str], ...]
    """For each data-parallel rank, the number of matrices that it updates, by name."""

    def most(self, of_matrix: Mapping[str, float]) -> float:
        """Return the sum of the rank with most, of a number for each matrix: its elements or its seconds."""
        return max(sum(of_matrix[name] * count for name, count in rank.items()) for rank in self.ranks)


def matrix_sizes(model: Architecture, layout: Layout) -> dict[str, int]:
    """Return the elements of the matrices of a layer on a tensor-parallel rank, by name in the order of the backward pass."""
    hidden, keys, inner = model.hidden_size, model.head_dim * model.num_query_groups, model.ffn_hidden_size
    return {
        "fc2": hidden * (inner // layout.tensor),
        "fc1": (model.gates - 1) * inner // layout.tensor * hidden,
        "qkv": (model.query_width + 2 * keys) // layout.tensor * hidden,
        "proj": hidden * (model.query_width // layout.tensor),
    }


def matrix_shards(model: Architecture, layout: Layout, stage: int) -> MatrixShards:
    """Return the shards of a pipeline stage. Only the first chunk of the first stage has several buckets, for the overlap."""
    layers = model.num_layers // (layout.pipeline * layout.chunks)
    is_bucketed = layout.overlap_grad_reduce and stage == 0
    limit = bucket_elements(layout.bucket_size, layout.data) if is_bucketed else None
    sizes = tuple(matrix_sizes(model, layout).items())
    return _shards_of_chunks(sizes, layers, layout.chunks, layout.data * layout.context, limit)


@cache
def _shards_of_chunks(
    sizes: tuple[tuple[str, int], ...], layers: int, chunks: int, num_shards: int, limit: int | None
) -> MatrixShards:
    """Return the shards of `chunks` chunks of `layers` layers each; the first chunk has buckets of at least `limit` elements."""
    padded, ranks, by_name = 0, tuple(Counter[str]() for _ in range(num_shards)), dict(sizes)
    for index in range(chunks):
        for bucket in _buckets([*by_name] * layers, by_name, num_shards, limit if index == 0 else None):
            padded += _pack(bucket, by_name, ranks)
    return MatrixShards(padded, ranks)


def _buckets(names: list[str], sizes: dict[str, int], num_shards: int, limit: int | None) -> Iterator[list[str]]:
    """Yield the names of each bucket, from `names` in the order of the backward pass; without a limit there is one.

    A bucket ends at `limit` elements, or later if its largest matrix would leave most of its shards empty.
    """
    bucket: list[str] = []
    elements = largest = 0
    for name in names:
        bucket.append(name)
        elements, largest = elements + sizes[name], max(largest, sizes[name])
        if limit is not None and elements >= max(limit, int(num_shards * largest * FULL_ENOUGH)):
            yield bucket
            bucket, elements, largest = [], 0, 0
    if bucket:
        yield bucket


def _pack(bucket: list[str], sizes: dict[str, int], ranks: tuple[Counter[str], ...]) -> int:
    """Add each matrix of a bucket, the largest first, to the rank with the shortest shard; return the elements of all shards."""
    num_shards = len(ranks)
    shards = [(0, rank) for rank in range(num_shards)]
    for name in sorted(bucket, key=lambda one: -sizes[one]):
        length, rank = shards[0]
        heapq.heapreplace(shards, (next_multiple(length, ALIGNMENT) + sizes[name], rank))
        ranks[rank][name] += 1
    divisor = math.lcm(ALIGNMENT, math.lcm(num_shards, 128) // num_shards)
    return num_shards * next_multiple(max(shards)[0], divisor)

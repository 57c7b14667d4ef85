"""Tensors that are laid out as the optimizer's main weights: collected into whole tensors for a checkpoint, and filled from them.

The ordinary optimizer has a main weight for each weight of the rank. The distributed optimizer has this rank's slice of it, cut from
a buffer of all weights. A checkpoint has whole tensors under the names of the weights, so that any layout can load them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories

Pair = tuple[torch.nn.Parameter, torch.Tensor]


def weight_pairs(part: Any) -> Iterator[Pair]:
    """Yield each weight with the main weight of one optimizer: itself, an fp32 copy, or this rank's slice of one."""
    if hasattr(part, "model_float16_groups"):  # distributed optimizer
        both = [
            (part.model_float16_groups, part.shard_fp32_from_float16_groups),
            (part.model_fp32_groups, part.shard_fp32_groups),
        ]
    elif hasattr(part, "float16_groups"):
        same = part.fp32_from_fp32_groups
        both = [(part.float16_groups, part.fp32_from_float16_groups), (same, same)]
    else:
        groups = [group["params"] for group in part.param_groups]
        both = [(groups, groups)]
    for params, mains in both:
        for one, other in zip(params, mains, strict=True):
            yield from zip(one, other, strict=True)


def single_optimizers(optimizer: Any) -> Iterator[tuple[Any, bool]]:
    """Yield each optimizer of a chain, and True for those of megatron-core's layer-wise optimizer.

    There a data-parallel rank has whole main weights, but not of every weight.
    """
    for part in optimizer.chained_optimizers:
        inner = getattr(part, "chained_optimizers", None)
        yield from [(part, False)] if inner is None else ((one, True) for one in inner)


class MainWeights:
    """The main weights of a rank, and the layout that other tensors share with them."""

    def __init__(self, optimizer: Any) -> None:
        found = [
            (part, is_own) for part, is_own in single_optimizers(optimizer) if not getattr(part, "is_stub_optimizer", False)
        ]
        self._parts = [part for part, _ in found]
        self._owned = {id(weight) for part, is_own in found if is_own for weight, _ in weight_pairs(part)}
        """Weights whose main weight no other data-parallel rank has."""
        self._pairs = [pair for part in self._parts for pair in weight_pairs(part)]

    @property
    def tensors(self) -> list[torch.Tensor]:
        """The main weights of this rank, without gradients. They share the optimizer's memory."""
        return [main.detach() for _, main in self._pairs]

    def sharded(self, model_state: Any, prefix: str, values: Sequence[torch.Tensor] | None) -> dict[str, Any]:
        """Return the sharded state of whole tensors, named `prefix`.WEIGHT. Call on every rank.

        model_state: the sharded state of the model chunks. values: in the order of `tensors`; None to load a checkpoint.
        """
        weights = {id(one.data): one for one in nested_values(extract_sharded_tensors_and_factories(model_state)[0])}
        return {
            str(index): make_sharded_optimizer_tensor(self._to_write(weights[id(weight)], weight), whole, prefix)
            for index, (weight, whole) in enumerate(self._whole(values))
        }

    def _to_write(self, weight_state: Any, weight: torch.nn.Parameter) -> Any:
        """Return the sharded state of a weight, written by its owner if only one data-parallel rank has its main weight."""
        if id(weight) not in self._owned:
            return weight_state
        return replace(weight_state, replica_id=(*weight_state.replica_id[:2], 0))

    def to_model(self, model: list[Any]) -> None:
        """Copy the main weights into the model, with its gathering over the data-parallel ranks, as after an update."""
        for part in self._parts:
            if hasattr(part, "_copy_main_params_to_model_params"):  # fp32 without the distributed optimizer: they are the same
                part._copy_main_params_to_model_params()
        if any(hasattr(part, "gbuf_ranges") for part in self._parts):
            for chunk in model:
                chunk.start_param_sync(force_sync=True)

    def _whole(self, values: Sequence[torch.Tensor] | None) -> Iterator[Pair]:
        """Yield every weight of this rank with its whole tensor on the host; with None, with an empty one."""
        mine = None if values is None else dict(zip([id(weight) for weight, _ in self._pairs], values, strict=True))
        for part in self._parts:
            if hasattr(part, "gbuf_ranges"):
                for buffer, ranges in zip(part.buffers, part.gbuf_ranges, strict=True):
                    (by_bucket,) = ranges.values()
                    for index, range_map in enumerate(by_bucket):
                        yield from _gathered(buffer, index, range_map["param_map"], mine)
            else:
                for weight, _ in weight_pairs(part):
                    yield weight, _empty(weight) if mine is None else mine[id(weight)]

    def fill(self, values: Sequence[torch.Tensor], loaded: dict[str, Any]) -> None:
        """Copy into `values`, in the order of `tensors`, this rank's slices of what was loaded of `sharded`; the others stay."""
        order = enumerate(self._whole(None))
        wholes = {id(weight): loaded[str(index)] for index, (weight, _) in order if str(index) in loaded}
        slices = {id(weight): where for part in self._parts for weight, where in _slices(part)}
        for (weight, _), value in zip(self._pairs, values, strict=True):
            if id(weight) not in wholes:
                continue
            whole = wholes[id(weight)]
            if id(weight) in slices:
                whole = whole.flatten()[slices[id(weight)]]
            value.copy_(whole.view(value.shape))


def _empty(weight: torch.Tensor) -> torch.Tensor:
    return torch.empty(weight.shape, dtype=torch.float32)


def _slices(part: Any) -> Iterator[tuple[torch.nn.Parameter, slice]]:
    """Yield the weights of which this rank has a slice, with its position in the flat weight."""
    for ranges in getattr(part, "gbuf_ranges", []):
        for by_bucket in ranges.values():
            for range_map in by_bucket:
                for weight, where in range_map["param_map"].items():
                    yield weight, slice(where["param"].start, where["param"].end)


def _gathered(buffer: Any, index: int, param_map: Any, mine: dict[int, torch.Tensor] | None) -> Iterator[Pair]:
    """Yield the weights of one bucket with whole tensors, put together from the slices of the data-parallel ranks."""
    bucket, group = buffer.buckets[index], buffer.data_parallel_group
    positions = {weight: (start, end) for weight, (start, end, number) in buffer.param_index_map.items() if number == index}
    if mine is None:
        yield from ((weight, _empty(weight)) for weight in positions)
        return
    ranks = dist.get_world_size(group)
    local = torch.zeros(bucket.grad_data.numel() // ranks, dtype=torch.float32, device=bucket.grad_data.device)
    for weight, where in param_map.items():
        local[where["gbuf_local"].start : where["gbuf_local"].end] = mine[id(weight)]
    slices = [torch.empty_like(local) for _ in range(ranks)]
    dist.all_gather(slices, local, group)
    whole = torch.cat([one.cpu() for one in slices])
    for weight, (start, end) in positions.items():
        yield weight, whole[start - bucket.offset : end - bucket.offset].view(weight.shape)

"""The gradient norm of each parameter, over whatever layout: which part of the model a bad step comes from."""

import re
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.transformer.module import param_is_not_shared

from megatron_ledom.checkpoint.store import unwrapped


@torch.no_grad()
def squared_norms(model: list[Any], optimizer: Any) -> dict[str, float]:
    """Squared gradient norm of each parameter of the whole model, by name; their sum is the square of the gradient norm.

    Call on every rank, after `measure_gradient` and before the next step.
    """
    names = {id(param): name for chunk in model for name, param in _named(unwrapped(chunk))}
    total: dict[str, float] = defaultdict(float)
    for part in optimizer.chained_optimizers:
        mine: dict[str, float] = defaultdict(float)
        for param, main in [] if part.is_stub_optimizer else _pairs(part):
            duplicate = not tensor_parallel.param_is_not_tensor_parallel_duplicate(main, getattr(part, "tp_group", None))
            if main.grad is not None and param_is_not_shared(main) and not duplicate:
                mine[names[id(param)]] += float(main.grad.double().square().sum())
        group = part.get_grad_stats_parallel_group()
        everyone: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(everyone, dict(mine), group)
        for name, square in (pair for found in everyone for pair in found.items()):
            total[name] += square
    return dict(total)


def _pairs(part: Any) -> Iterator[tuple[Any, Any]]:
    """Each weight of the model with the main weight that carries its gradient: itself, an fp32 copy, or this rank's piece."""
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


def _named(chunk: Any) -> Iterator[tuple[str, Any]]:
    """Parameters of a model chunk, their layers numbered as in the whole model."""
    for name, param in chunk.named_parameters():
        found = re.match(r"decoder\.layers\.(\d+)\.", name)
        if found is None:
            yield name, param
        else:
            number = chunk.decoder.layers[int(found[1])].layer_number - 1
            yield f"decoder.layers.{number}.{name[found.end() :]}", param

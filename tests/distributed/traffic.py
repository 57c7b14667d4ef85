"""Count the bytes that ranks send to each other in a training step, at torch's process groups, for all callers.

Bytes are those of ring algorithms, the fewest that a rank has to send: over N ranks 2 (N-1)/N of an all-reduced tensor,
(N-1)/N of a whole gathered or scattered tensor, all of a point-to-point message.
"""

import functools
import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

counted: Counter[str] = Counter()
"""Bytes of the current step by `kind operation`, such as `TP all-reduce`."""
_counting = False


def count_traffic() -> None:
    """Let each run, as a hook of ranks, write traffic-RANK.json into its run folder: bytes per step by kind and operation."""
    from megatron_ledom.training import trainer

    for method, (operation, whole, fraction) in OPERATIONS.items():
        if not hasattr(dist.ProcessGroup, method):
            continue  # a name of another torch version
        setattr(dist.ProcessGroup, method, _counted(getattr(dist.ProcessGroup, method), operation, whole, fraction))
    step = trainer.train_step

    def counted_step(config: Any, *arguments: Any, **sizes: Any) -> Any:
        global _counting
        _counting = True
        result = step(config, *arguments, **sizes)
        _counting = False
        _write(config)
        return result

    trainer.train_step = counted_step  # type: ignore[assignment]


def _write(config: Any) -> None:
    """Write the traffic of the last step."""
    folder = Path(config.run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"traffic-{os.environ['RANK']}.json").write_text(json.dumps(counted))
    counted.clear()


def read_traffic(run_dir: Path) -> dict[str, int]:
    """Return the bytes per step by `kind operation` of the rank that sends most in all."""
    ranks = [json.loads(path.read_text()) for path in sorted(run_dir.glob("traffic-*.json"))]
    assert ranks, f"no traffic in {run_dir}"
    return dict(max(ranks, key=lambda sent: sum(sent.values())))


def _size(value: Any) -> int:
    """Return the bytes of a tensor, or of all tensors in nested lists."""
    return value.numel() * value.element_size() if isinstance(value, torch.Tensor) else sum(map(_size, value))


def _counted(method: Callable[..., Any], operation: str, whole: int, fraction: Callable[[int], float]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(group: Any, *arguments: Any, **options: Any) -> Any:
        if _counting and group.size() > 1:
            kind = "PP" if operation == "send" else _kind(group)  # two stages communicate through the group of all ranks
            counted[f"{kind} {operation}"] += round(fraction(group.size()) * _size(arguments[whole]))
        return method(group, *arguments, **options)

    return call


def _kind(group: Any) -> str:
    """Return the kind of a group: TP, CP, PP, or DP (the ranks over which gradients are reduced, with the context-parallel ones)."""
    from megatron.core import parallel_state as state

    groups = {
        "TP": state.get_tensor_model_parallel_group(),
        "CP": state.get_context_parallel_group(),
        "PP": state.get_pipeline_model_parallel_group(),
        "DP": state.get_data_parallel_group(with_context_parallel=True),
    }
    return next((kind for kind, known in groups.items() if known is group or known == group), "all ranks")


def _ring(size: int) -> float:
    return (size - 1) / size


OPERATIONS: dict[str, tuple[str, int, Callable[[int], float]]] = {
    # method of a process group -> operation, index of the argument with the whole tensor, fraction of its bytes that is sent
    "allreduce": ("all-reduce", 0, lambda size: 2 * _ring(size)),
    "allreduce_coalesced": ("all-reduce", 0, lambda size: 2 * _ring(size)),
    "allgather": ("all-gather", 0, _ring),
    "all_gather_single_coalesced": ("all-gather", 0, _ring),
    "all_gather_single": ("all-gather", 0, _ring),
    "_allgather_base": ("all-gather", 0, _ring),
    "allgather_into_tensor_coalesced": ("all-gather", 0, _ring),
    "reduce_scatter": ("reduce-scatter", 1, _ring),
    "reduce_scatter_single_coalesced": ("reduce-scatter", 1, _ring),
    "reduce_scatter_single": ("reduce-scatter", 1, _ring),
    "_reduce_scatter_base": ("reduce-scatter", 1, _ring),
    "reduce_scatter_tensor_coalesced": ("reduce-scatter", 1, _ring),
    "broadcast": ("broadcast", 0, _ring),
    "send": ("send", 0, lambda size: 1.0),
}

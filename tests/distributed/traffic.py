"""What ranks send to each other in a training step, counted at torch's process groups, whoever calls them.

A rank's bytes are those of ring algorithms, the fewest that a rank has to send: over N ranks 2 (N-1)/N of an all-reduced
tensor, (N-1)/N of the whole of a gathered or scattered one, all of a point-to-point message.
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
"""Bytes by `kind operation`, such as `TP all-reduce`, of the step that runs."""
_counting = False


def count_traffic() -> None:
    """A hook for ranks: from now on each run leaves traffic-RANK.json in its run folder: bytes a step by kind and operation."""
    from megatron_ledom.training import trainer

    for method, (operation, whole, share) in OPERATIONS.items():
        if not hasattr(dist.ProcessGroup, method):
            continue  # another version's name
        setattr(dist.ProcessGroup, method, _counted(getattr(dist.ProcessGroup, method), operation, whole, share))
    step = trainer.train_step

    def counted_step(config: Any, *arguments: Any) -> Any:
        global _counting
        _counting = True
        result = step(config, *arguments)
        _counting = False
        _leave(config)
        return result

    trainer.train_step = counted_step  # type: ignore[assignment]


def _leave(config: Any) -> None:
    """The traffic of one step, the last one that was made."""
    folder = Path(config.run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"traffic-{os.environ['RANK']}.json").write_text(json.dumps(counted))
    counted.clear()


def read_traffic(run_dir: Path) -> dict[str, int]:
    """Bytes a step by `kind operation`, of the rank that sends most in all."""
    ranks = [json.loads(path.read_text()) for path in sorted(run_dir.glob("traffic-*.json"))]
    assert ranks, f"no traffic in {run_dir}"
    return dict(max(ranks, key=lambda sent: sum(sent.values())))


def _size(value: Any) -> int:
    """Bytes of a tensor, or of all in lists of them."""
    return value.numel() * value.element_size() if isinstance(value, torch.Tensor) else sum(map(_size, value))


def _counted(method: Callable[..., Any], operation: str, whole: int, share: Callable[[int], float]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(group: Any, *arguments: Any, **options: Any) -> Any:
        if _counting and group.size() > 1:
            kind = "PP" if operation == "send" else _kind(group)  # between two stages it goes through the group of all ranks
            counted[f"{kind} {operation}"] += round(share(group.size()) * _size(arguments[whole]))
        return method(group, *arguments, **options)

    return call


def _kind(group: Any) -> str:
    """TP, CP, PP, or DP: the ranks over which gradients are reduced, the context-parallel ones included."""
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
    # method of a process group -> operation, which argument holds the whole tensor, bytes sent of its bytes
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

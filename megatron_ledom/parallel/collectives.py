"""Operations that all ranks call together: work of rank 0 for all, comparison of values, completion of overlapped weights.

An error of one rank is raised on every rank; otherwise the others would wait for ever.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch.distributed as dist

from megatron_ledom.errors import LedomError

Result = TypeVar("Result")


def from_first_rank(work: Callable[[], Result]) -> Result:
    """Run `work` on rank 0 and return its result, which must be picklable, on every rank. Call on every rank.

    An error of rank 0 is raised on every rank: a LedomError or OSError unchanged, any other as a RuntimeError on the others.
    """
    found: list[Any] = [None, None]
    cause: Exception | None = None
    if dist.get_rank() == 0:
        try:
            found[0] = work()
        except Exception as error:
            cause = error
            is_known = isinstance(error, LedomError | OSError)
            found[1] = error if is_known else RuntimeError(f"rank 0 failed: {type(error).__name__}: {error}")
    dist.broadcast_object_list(found, src=0)
    if cause is not None:
        raise cause
    if found[1] is not None:
        raise found[1]
    result: Result = found[0]
    return result


def on_every_rank(work: Callable[[], Result]) -> Result:
    """Run `work` on every rank and return its result. Call on every rank. A collective in `work` must fail on all ranks or none.

    If it fails on any rank, every rank raises: a failed one its own error, the others that of the first failed rank.
    """
    cause: Exception | None = None
    shared: LedomError | RuntimeError | None = None
    try:
        result = work()
    except Exception as error:
        cause = error
        shared = error if isinstance(error, LedomError) else RuntimeError(f"{type(error).__name__}: {error}")
    found: list[LedomError | RuntimeError | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, shared)
    if cause is not None:
        raise cause
    for rank, error_of_rank in enumerate(found):
        if error_of_rank is not None:
            raise type(error_of_rank)(f"rank {rank}: {error_of_rank}")
    return result


def check_same(what: str, value: object, advice: str) -> None:
    """Raise RuntimeError on every rank if the text of `value` differs between ranks. Call on every rank.

    The error is not a LedomError, because no setting is wrong and another start may succeed.
    """
    texts: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(texts, str(value))
    other = next((rank for rank, text in enumerate(texts) if text != texts[0]), None)
    if other is not None:
        raise RuntimeError(f"{what} is {texts[0]} on rank 0, but {texts[other]} on rank {other}; {advice}")


@contextmanager
def gathered_weights(model: list[Any]) -> Iterator[None]:
    """Complete the weights of the wrapped chunks for the context, so that they are those of the last step.

    With overlapped parameter gathering, a rank completes its copy only during the next forward pass. Until then, a save or a
    validation would use the weights of the previous step.
    """
    stale = [chunk for chunk in model if chunk.use_forward_hook]
    for chunk in stale:
        chunk.disable_forward_pre_hook(param_sync=True)
    try:
        yield
    finally:
        for chunk in stale:
            chunk.enable_forward_pre_hook()

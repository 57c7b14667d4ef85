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
            found[1] = _to_share(error)
    dist.broadcast_object_list(found, src=0)
    if cause is not None:
        raise cause
    if found[1] is not None:
        raise found[1]
    result: Result = found[0]
    return result


def on_every_rank(work: Callable[[], Result]) -> Result:
    """Run `work` on every rank and return its result. Call on every rank. A collective in `work` must fail on all ranks or none.

    If it fails, every rank raises the error of the first failed rank, so that all end with one exit code. That rank raises its own
    error, the others a copy that names the rank: of the same type for a LedomError or OSError, otherwise a RuntimeError.
    """
    cause: Exception | None = None
    try:
        result = work()
    except Exception as error:
        cause = error
    found: list[LedomError | OSError | RuntimeError | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, None if cause is None else _to_share(cause))
    for rank, failure in enumerate(found):
        if cause is not None and rank == dist.get_rank():
            raise cause
        if isinstance(failure, OSError) and failure.errno is not None:
            raise OSError(failure.errno, f"{failure.strerror} (rank {rank})", failure.filename) from cause
        if isinstance(failure, OSError):
            raise OSError(f"rank {rank}: {failure}") from cause
        if failure is not None:
            raise type(failure)(f"rank {rank}: {failure}") from cause
    return result


def _to_share(error: Exception) -> LedomError | OSError | RuntimeError:
    """Return an error that every rank can unpickle and raise."""
    return error if isinstance(error, LedomError | OSError) else RuntimeError(f"{type(error).__name__}: {error}")


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

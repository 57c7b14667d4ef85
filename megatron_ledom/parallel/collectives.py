"""Operations that all ranks call together: one rank works for all, values are compared, overlapped weights are completed.

An error that one rank alone met would let the others wait in vain; these functions raise it on every rank.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch.distributed as dist

from megatron_ledom.errors import LedomError

Result = TypeVar("Result")


def from_first_rank(work: Callable[[], Result]) -> Result:
    """What `work` returns on rank 0, which alone does it; picklable. Call on every rank.

    An error of rank 0 is raised on every rank: a LedomError or an OSError as it is, any other as a RuntimeError on the others.
    """
    found: list[Any] = [None, None]
    cause: Exception | None = None
    if dist.get_rank() == 0:
        try:
            found[0] = work()
        except Exception as error:
            cause = error
            told = isinstance(error, LedomError | OSError)
            found[1] = error if told else RuntimeError(f"rank 0 failed: {type(error).__name__}: {error}")
    dist.broadcast_object_list(found, src=0)
    if cause is not None:
        raise cause
    if found[1] is not None:
        raise found[1]
    result: Result = found[0]
    return result


def check_same(what: str, value: object, advice: str) -> None:
    """Raise RuntimeError on every rank where not all ranks have the same `value`, by its text. Call on every rank.

    It is no LedomError: nobody's settings are wrong, and another start may find them agreed.
    """
    texts: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(texts, str(value))
    other = next((rank for rank, text in enumerate(texts) if text != texts[0]), None)
    if other is not None:
        raise RuntimeError(f"{what} is {texts[0]} on rank 0, but {texts[other]} on rank {other}; {advice}")


@contextmanager
def gathered_weights(model: list[Any]) -> Iterator[None]:
    """Inside, the wrapped chunks' weights are those of the last step.

    With overlapped parameter gathering a rank's copy is only brought up to date during the next forward pass; a save or a
    validation that reads it before would use the weights of the step before.
    """
    stale = [chunk for chunk in model if chunk.use_forward_hook]
    for chunk in stale:
        chunk.disable_forward_pre_hook(param_sync=True)
    try:
        yield
    finally:
        for chunk in stale:
            chunk.enable_forward_pre_hook()

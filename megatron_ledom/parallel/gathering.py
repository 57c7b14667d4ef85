"""Weights that are whole: needed wherever they are read outside the training step."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


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

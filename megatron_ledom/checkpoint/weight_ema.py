"""The exponential moving average of the weights (`optimizer.ema_decay`), in fp32 and sharded like the main weights.

After n updates of the weights w it is sum(decay^(n-k) w_k) / sum(decay^(n-k)) over the updates k = 1..n: the average that
`ledom average-checkpoints --decay` would make of a checkpoint after every update. The initial weights are no part of it. Iterations
without an update leave it unchanged.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from megatron_ledom.checkpoint.averaging import EMA
from megatron_ledom.checkpoint.main_weights import MainWeights


class WeightEma:
    """The moving average of one rank. Make the same calls on every rank."""

    def __init__(self, optimizer: Any, decay: float) -> None:
        self._optimizer, self._decay = optimizer, decay
        self._main = MainWeights(optimizer)
        self._averages = [main.clone() for main in self._main.tensors]
        self._weight_sum = 0.0

    def restart(self) -> None:
        """Begin a new average; until the next update it is the present weights."""
        self._weight_sum = 0.0
        for average, main in zip(self._averages, self._main.tensors, strict=True):
            average.copy_(main)

    @torch.no_grad()
    def update(self) -> None:
        """Include the weights after an update of the optimizer."""
        self._weight_sum = self._decay * self._weight_sum + 1.0
        if self._averages:
            torch._foreach_lerp_(self._averages, self._main.tensors, 1.0 / self._weight_sum)

    def sharded_state(self, model_state: dict[str, Any], *, loading: bool) -> dict[str, Any]:
        """Return what a checkpoint stores of the average, given the sharded state of the model chunks."""
        values = None if loading else self._averages
        return {"weight_sum": self._weight_sum, "weights": self._main.sharded(model_state, EMA, values)}

    def load(self, state: dict[str, Any]) -> None:
        """Continue from the loaded `sharded_state`."""
        self._weight_sum = float(state["weight_sum"])
        self._main.fill(self._averages, state["weights"])

    @contextmanager
    def in_place_of_weights(self, model: list[Any]) -> Iterator[None]:
        """Compute with the average inside the context; afterwards the weights are the same as before, bit for bit."""
        self._swap(model)
        try:
            yield
        finally:
            self._swap(model)

    @torch.no_grad()
    def _swap(self, model: list[Any]) -> None:
        for average, main in zip(self._averages, self._main.tensors, strict=True):
            kept = main.clone()
            main.copy_(average)
            average.copy_(kept)
        self._main.to_model(model)

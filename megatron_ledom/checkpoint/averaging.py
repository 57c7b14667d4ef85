"""Average the weights of checkpoints of any layouts, block by block: sums in fp64, and one rounding to the fp32 main weights.

What is averaged are the fp32 main weights that the optimizer updates; in an fp32 run these are the weights themselves. bf16 weights
of the result are its main weights rounded to bf16, as after every step of a run.
"""

from collections.abc import Sequence

import torch

from megatron_ledom.checkpoint.stored_tensors import StoredTensors
from megatron_ledom.checkpoint.weights_only import Piece
from megatron_ledom.errors import DataError, MismatchError

MAIN = "optimizer.state.fp32_param"
"""Prefix of the fp32 main weights of a bf16 run, as megatron-core's ordinary optimizer names them."""
MAIN_PREFIXES = (MAIN, "optimizer.state.param")
"""Prefixes of main weights: those of the ordinary and of the distributed optimizer."""
EMA = "ema"
"""Prefix of the exponential moving average of the weights (`optimizer.ema_decay`)."""
LAYERS = "decoder.layers."
"""Beginning of the names of tensors whose first axis is the layer."""
EXTRA_STATE = "_extra_state"
BLOCK_ELEMENTS = 1 << 20
"""Elements that are averaged at once: 8 MiB in fp64, twice."""


def weight_names(stored: StoredTensors) -> list[str]:
    """Return the names of the weights of a checkpoint, in the order of the file.

    Without those of the optimizer, of the EMA and of the modules of multi-token prediction, which an average does not have.
    """
    others = ("optimizer.", f"{EMA}.", "mtp.")
    return [name for name in stored.entries if not name.startswith(others) and not name.endswith(EXTRA_STATE)]


class AveragedWeights:
    """The average of the weights of several checkpoints. `pieces` lists what to store, `read` computes one piece."""

    def __init__(self, sources: Sequence[StoredTensors], factors: Sequence[float], *, ema: bool = False) -> None:
        """factors: weight of each checkpoint; they are divided by their sum. ema: average the moving averages instead.

        Raises MismatchError if the checkpoints have other weights, DataError if one has no moving average.
        """
        self._sources, self._factors, self._ema = sources, factors, ema
        self._names = weight_names(sources[0])
        self._last: tuple[str, int | None, torch.Tensor] | None = None
        for stored in sources:
            self._check(stored)

    def _check(self, stored: StoredTensors) -> None:
        first = self._sources[0]
        shapes = {name: tuple(stored.entries[name].size) for name in weight_names(stored)}
        wanted = {name: tuple(first.entries[name].size) for name in self._names}
        if different := sorted(name for name in shapes.keys() | wanted if shapes.get(name) != wanted.get(name)):
            name = different[0]
            raise MismatchError(
                f"{stored.checkpoint} has {name} as {shapes.get(name)}, {first.checkpoint} as {wanted.get(name)} ({len(different)} such"
                " tensors): only checkpoints of one architecture can be averaged"
            )
        if self._ema and (absent := [name for name in self._names if f"{EMA}.{name}" not in stored.entries]):
            raise DataError(
                f"{stored.checkpoint} has no moving average of {absent[0]}: its run was trained without optimizer.ema_decay; average the"
                " weights themselves"
            )

    def pieces(self) -> list[Piece]:
        """Return the tensors of the result, layer by layer; the main weight of a bf16 weight precedes it."""
        found = []
        for name in self._names:
            entry = self._sources[0].entries[name]
            shape, layers = entry.size, [None]
            if name.startswith(LAYERS):
                shape, layers = entry.size[1:], [*range(entry.size[0])]  # type: ignore[list-item]
            for layer in layers:
                if entry.properties.dtype is not torch.float32:
                    found.append(Piece(f"{MAIN}.{name}", layer, shape, torch.float32))
                found.append(Piece(name, layer, shape, entry.properties.dtype))
        return found

    def read(self, piece: Piece) -> torch.Tensor:
        """Return one piece in its type. Raises DataError for a source that is damaged or not finite."""
        name = piece.name.removeprefix(f"{MAIN}.")
        if self._last is None or self._last[:2] != (name, piece.layer):
            self._last = None  # first, so that its memory is free
            self._last = name, piece.layer, self._averaged(name, piece.layer, piece.shape)
        return self._last[2].to(piece.dtype)

    def _averaged(self, name: str, layer: int | None, shape: torch.Size) -> torch.Tensor:
        """Return the average of one tensor in fp32."""
        average = torch.empty(shape)
        rows = max(1, BLOCK_ELEMENTS // max(1, shape[1:].numel()))
        whole = sum(self._factors)
        for start in range(0, shape[0], rows):
            block = average[start : start + rows]
            total, part = torch.zeros(block.shape, dtype=torch.float64), torch.empty(block.shape, dtype=torch.float64)
            for stored, factor in zip(self._sources, self._factors, strict=True):
                stored.fill(part, self._source_name(stored, name), layer, start)
                if not part.isfinite().all():
                    raise DataError(
                        f"{stored.checkpoint} has values in {name} that are not finite; leave this checkpoint out of the average"
                    )
                total.add_(part.mul_(factor))
            block.copy_(total.div_(whole))
        return average

    def _source_name(self, stored: StoredTensors, name: str) -> str:
        """Return the name of the tensor to average: the moving average, or the main weight, or the weight if it has none."""
        names = [f"{EMA}.{name}"] if self._ema else [f"{prefix}.{name}" for prefix in MAIN_PREFIXES]
        return next((found for found in names if found in stored.entries), name)

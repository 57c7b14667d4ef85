"""Single tensors, or single layers of them, read from a checkpoint without building a model.

megatron-core stores the tensors of all layers under one name with the layer as first axis, in the chunks that the ranks held;
torch's reader finds what is wanted in them, its weights-only loader reads them. No process group is needed.
"""

import os
import pickle
from typing import Any

import torch
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_ledom.errors import DataError

METADATA = ".metadata"
NAMES = {("torch", "Size"), ("torch", "float32"), ("torch", "bfloat16"), ("torch", "float64"), ("torch", "int64")} | {
    ("torch", "uint8"),
    ("torch", "float16"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
}
MODULES = ("metadata", "planner", "filesystem")
"""Of torch.distributed.checkpoint. With NAMES: all that a list of tensors is made of; nothing else is unpickled."""
UNREADABLE = (
    OSError,
    pickle.UnpicklingError,
    EOFError,
    ValueError,
    AttributeError,
    IndexError,
    KeyError,
    TypeError,
    RuntimeError,
)


class _MetadataReader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Classes that describe tensors; a file that asks for another one is refused before it can do harm."""
        if module in [f"torch.distributed.checkpoint.{known}" for known in MODULES] or (module, name) in NAMES:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def read_metadata(checkpoint: str) -> Metadata:
    """Which tensors there are, and where their chunks lie. Raises DataError when the list cannot be read."""
    path = os.path.join(checkpoint, METADATA)
    try:
        with open(path, "rb") as file:
            metadata: Metadata = _MetadataReader(file).load()
        metadata.state_dict_metadata.items()
    except UNREADABLE as error:
        raise DataError(f"{path} cannot be read ({type(error).__name__}: {error})") from error
    return metadata


def tensors_of(checkpoint: str) -> dict[str, TensorStorageMetadata]:
    """Shape and type of every tensor, by name. Raises DataError when the list cannot be read."""
    entries = read_metadata(checkpoint).state_dict_metadata
    return {name: entry for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}


class _Into(DefaultLoadPlanner):
    """Gives torch's reader the one tensor that is to be filled."""

    def __init__(self, target: torch.Tensor) -> None:
        super().__init__()
        self._target = target

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        """The part of the tensor that one read fills."""
        return narrow_tensor_by_index(self._target, read_item.dest_offsets, read_item.lengths)

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """Nothing: the part is filled in place."""


class StoredTensors:
    """The tensors of one checkpoint; each is read when it is asked for."""

    def __init__(self, checkpoint: str) -> None:
        self.checkpoint = checkpoint
        metadata = read_metadata(checkpoint)
        self.entries = {
            name: entry for name, entry in metadata.state_dict_metadata.items() if isinstance(entry, TensorStorageMetadata)
        }
        """Shape, type and chunks of every tensor, by name."""
        outside = {
            place.relative_path
            for place in metadata.storage_data.values()
            if place.relative_path != os.path.basename(place.relative_path)
        }
        if outside:
            raise DataError(f"{checkpoint} names files outside of it ({sorted(outside)[0]}); it is damaged, use an earlier one")
        self._reader = FileSystemReader(checkpoint)
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)

    def read(self, name: str, layer: int | None = None) -> torch.Tensor:
        """A whole tensor, or the part of one layer without the layer axis. Raises DataError as `fill`."""
        size = self._entry(name).size
        target = torch.empty(size if layer is None else size[1:], dtype=self._entry(name).properties.dtype)
        self.fill(target, name, layer)
        return target

    def fill(self, target: torch.Tensor, name: str, layer: int | None = None, first_row: int = 0) -> None:
        """Fill `target`, of any type, from `first_row` of a tensor or of one layer of it.

        Raises DataError when that is not stored, in part or at all, or in another shape.
        """
        entry = self._entry(name)
        stored = entry.size if layer is None else entry.size[1:]
        if target.shape[1:] != stored[1:] or first_row + target.shape[0] > stored[0]:
            raise DataError(
                f"{self.checkpoint} has {name} as {tuple(stored)}, expected {tuple(target.shape)} from row {first_row} on; it is"
                " damaged, or of another model"
            )
        offsets = [first_row, *[0] * (target.dim() - 1)]
        box = target if layer is None else target[None]
        chunk = ChunkStorageMetadata(torch.Size(offsets if layer is None else [layer, *offsets]), box.shape)
        items = create_read_items_for_chunk_list(name, entry, [chunk])
        found = sum(item.lengths.numel() for item in items)
        if found != target.numel():
            raise DataError(
                f"{self.checkpoint}: {name}{'' if layer is None else f', layer {layer},'} is stored with {found:,} of"
                f" {target.numel():,} elements; the checkpoint is damaged, use an earlier one"
            )
        try:
            self._reader.read_data(LoadPlan(items), _Into(box))
        except UNREADABLE as error:
            raise DataError(
                f"{self.checkpoint} cannot be read at {name} ({type(error).__name__}: {error}); it is damaged, use an earlier one"
            ) from error

    def _entry(self, name: str) -> TensorStorageMetadata:
        if name not in self.entries:
            raise DataError(
                f"{self.checkpoint} has no tensor {name}; it is damaged, or of a model that this version does not know"
            )
        return self.entries[name]

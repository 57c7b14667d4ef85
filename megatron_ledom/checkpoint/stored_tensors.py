"""Read single tensors, or single layers of them, from a checkpoint without building a model.

megatron-core stores the tensors of all layers under one name with the layer as first axis, in the chunks of the ranks that
wrote them. torch's planner finds the parts of the chunks to read, and its weights-only loader finds their bytes. No process group
is needed.
"""

import mmap
import os
import pickle
from typing import Any

import torch
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.utils import _create_file_view

from megatron_ledom.errors import DataError
from megatron_ledom.platform.core_state import load_restricted

METADATA = ".metadata"
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


def read_metadata(checkpoint: str) -> Metadata:
    """Return the list of the tensors and the positions of their chunks. Raises DataError if it cannot be read."""
    path = os.path.join(checkpoint, METADATA)
    try:
        with open(path, "rb") as file:
            metadata: Metadata = load_restricted(file)
        metadata.state_dict_metadata.items()
    except UNREADABLE as error:
        raise DataError(
            f"{path} cannot be read ({type(error).__name__}: {error}); the checkpoint is damaged, use an earlier one"
        ) from error
    return metadata


def tensors_of(checkpoint: str) -> dict[str, TensorStorageMetadata]:
    """Return shape and type of every tensor by name. Raises DataError if the list cannot be read."""
    entries = read_metadata(checkpoint).state_dict_metadata
    return {name: entry for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}


class StoredTensors:
    """The tensors of one checkpoint, each read when it is requested."""

    def __init__(self, checkpoint: str) -> None:
        self.checkpoint = checkpoint
        metadata = read_metadata(checkpoint)
        self.entries = {
            name: entry for name, entry in metadata.state_dict_metadata.items() if isinstance(entry, TensorStorageMetadata)
        }
        """Shape, type and chunks of every tensor, by name."""
        outside = {
            stored_at.relative_path
            for stored_at in metadata.storage_data.values()
            if stored_at.relative_path != os.path.basename(stored_at.relative_path)
        }
        if outside:
            raise DataError(
                f"{checkpoint} names files outside of its folder ({sorted(outside)[0]}); it is damaged, use an earlier one"
            )
        self._storage = metadata.storage_data

    def read(self, name: str, layer: int | None = None) -> torch.Tensor:
        """Return a whole tensor, or one layer of it without the layer axis. It is memory-mapped if it is stored in one piece.

        Raises DataError as `fill` does.
        """
        size = self._entry(name).size
        shape = size if layer is None else size[1:]
        items = self._items(name, shape, layer, 0)
        if len(items) == 1:
            part = self._part(name, items[0])
            return part if layer is None else part[0]
        target = torch.empty(shape, dtype=self._entry(name).properties.dtype)
        self._fill(target, name, layer, items)
        return target

    def fill(self, target: torch.Tensor, name: str, layer: int | None = None, first_row: int = 0) -> None:
        """Fill `target`, of any type, with a tensor or one layer of it, from row `first_row`.

        Raises DataError if the tensor is missing, incomplete or has another shape.
        """
        self._fill(target, name, layer, self._items(name, target.shape, layer, first_row))

    def _fill(self, target: torch.Tensor, name: str, layer: int | None, items: list[ReadItem]) -> None:
        box = target if layer is None else target[None]
        for item in items:
            narrow_tensor_by_index(box, item.dest_offsets, item.lengths).detach().copy_(self._part(name, item))

    def _items(self, name: str, shape: torch.Size, layer: int | None, first_row: int) -> list[ReadItem]:
        """Return the parts of stored chunks that make up the requested rows. Raises DataError as `fill` does."""
        entry = self._entry(name)
        stored = entry.size if layer is None else entry.size[1:]
        if shape[1:] != stored[1:] or first_row + shape[0] > stored[0]:
            raise DataError(
                f"{self.checkpoint} has {name} as {tuple(stored)}, expected {tuple(shape)} from row {first_row} on; it is"
                " damaged, or belongs to another model"
            )
        offsets = [first_row, *[0] * (len(shape) - 1)]
        chunk = ChunkStorageMetadata(torch.Size(offsets), shape)
        if layer is not None:
            chunk = ChunkStorageMetadata(torch.Size([layer, *offsets]), torch.Size([1, *shape]))
        items = create_read_items_for_chunk_list(name, entry, [chunk])
        found = sum(item.lengths.numel() for item in items)
        if found != shape.numel():
            raise DataError(
                f"{self.checkpoint}: {name}{'' if layer is None else f', layer {layer},'} is stored with {found:,} of"
                f" {shape.numel():,} elements; the checkpoint is damaged, use an earlier one"
            )
        return items

    def _part(self, name: str, item: ReadItem) -> torch.Tensor:
        """Return the requested part of one stored chunk, mapped from its file. Raises DataError if it cannot be read."""
        try:
            return self._mapped(item)
        except OSError as error:
            raise DataError(
                f"{self.checkpoint} cannot be read at {name} ({error}); check that it still exists and is readable"
            ) from error
        except UNREADABLE as error:
            raise DataError(
                f"{self.checkpoint} cannot be read at {name} ({type(error).__name__}: {error}); it is damaged, use an earlier one"
            ) from error

    def _mapped(self, item: ReadItem) -> torch.Tensor:
        stored_at = self._storage[item.storage_index]
        if getattr(stored_at, "transform_descriptors", None):
            raise ValueError("its files are compressed")
        with open(os.path.join(self.checkpoint, stored_at.relative_path), "rb", buffering=0) as file:
            view: Any = _create_file_view(file, stored_at.offset, stored_at.length)
            chunk = torch.load(view, map_location="meta", weights_only=True)  # type, strides and offset
            part = narrow_tensor_by_index(chunk, item.storage_offsets, item.lengths)
            begin = chunk.untyped_storage()._checkpoint_offset + part.storage_offset() * part.itemsize
            span = 1 + sum((size - 1) * stride for size, stride in zip(part.shape, part.stride(), strict=True))
            if begin + span * part.itemsize > stored_at.length:
                raise ValueError("a chunk extends beyond its stored length")
            vector = _map_vector(file.fileno(), stored_at.offset + begin, part.dtype, span)
        return vector.as_strided(part.shape, part.stride())

    def _entry(self, name: str) -> TensorStorageMetadata:
        if name not in self.entries:
            raise DataError(
                f"{self.checkpoint} has no tensor {name}; it is damaged, or of a model that this version does not support"
            )
        return self.entries[name]


def _map_vector(descriptor: int, offset: int, dtype: torch.dtype, length: int) -> torch.Tensor:
    """Map a vector [length] from an open file at a byte offset, without a copy. Writing to it does not change the file.

    Raises ValueError if the file is too short.
    """
    before = offset % mmap.ALLOCATIONGRANULARITY
    pages = mmap.mmap(descriptor, before + length * dtype.itemsize, access=mmap.ACCESS_COPY, offset=offset - before)
    pages.madvise(mmap.MADV_WILLNEED)  # starts reading from the disk while the previous tensor is written
    return torch.frombuffer(pages, dtype=dtype, count=length, offset=before)

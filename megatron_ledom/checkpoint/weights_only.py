"""Write a checkpoint of imported or averaged weights, tensor by tensor in one process. A run starts from it.

The format is that of training, so any layout can load it. It has no optimizer state, and the manifest records this. Averaged bf16
weights have fp32 main weights beside them.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX, FileSystem, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.serialization import get_crc32_options, set_crc32_options

from megatron_ledom.checkpoint.folder import COMMON_FILES, COMMON_STATE, save_backends
from megatron_ledom.checkpoint.manifest import CheckpointManifest, save_manifest
from megatron_ledom.errors import first_cause
from megatron_ledom.storage.hashed_file import HashedFile, read_ahead
from megatron_ledom.storage.hashes import checksum

Thing = TypeVar("Thing")
CONTENT = {"distrib_optim_sharding_type": "fully_reshardable"}


@dataclass(frozen=True, slots=True)
class Piece:
    """A tensor to store, or one layer of a tensor that stacks all layers."""

    name: str
    layer: int | None
    shape: torch.Size
    """Shape without the layer axis."""
    dtype: torch.dtype
    """Type in which it is stored."""

    @property
    def num_bytes(self) -> int:
        """Size in the file."""
        return self.shape.numel() * self.dtype.itemsize

    @property
    def offsets(self) -> torch.Size:
        """Position of its first element in the stored tensor."""
        return torch.Size([0] * len(self.shape) if self.layer is None else [self.layer, *[0] * len(self.shape)])

    @property
    def stored_shape(self) -> torch.Size:
        """Shape with the layer axis."""
        return self.shape if self.layer is None else torch.Size([1, *self.shape])


class _HashedFiles(FileSystem):
    """torch's file system, but files of tensors are hashed while they are written. `files`: name -> file."""

    def __init__(self, threads: ThreadPoolExecutor) -> None:
        self._threads = threads
        self.files: dict[str, HashedFile] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        """Yield the open file."""
        if not str(path).endswith(DEFAULT_SUFFIX):
            with super().create_stream(path, mode) as stream:
                yield stream
            return
        self.files[os.path.basename(path)] = file = HashedFile(str(path), self._threads)
        with closing(file):
            yield file


class _Writer(FileSystemWriter):
    """torch's writer, but its metadata contains no path objects, which the restricted reader refuses."""

    def __init__(self, folder: str, file_system: FileSystem) -> None:
        super().__init__(folder, single_file_per_rank=True, thread_count=1, per_thread_copy_ahead=0, sync_files=False)
        self.fs = file_system

    def storage_meta(self) -> StorageMeta:
        """Return the metadata, with the path as a text."""
        return StorageMeta(checkpoint_id=str(self.path))


class _TensorSource(DefaultSavePlanner):
    """Gives torch's writer each tensor only when it writes it, so that few are in memory."""

    def __init__(self, tensors: Iterator[tuple[Piece, torch.Tensor]]) -> None:
        """`tensors`: in the order in which the writer needs them."""
        super().__init__()
        self._tensors = tensors

    def resolve_data(self, write_item: WriteItem) -> Any:
        """Return the tensor of one item, with its layer axis."""
        piece, tensor = next(self._tensors)
        assert (piece.name, piece.offsets) == (write_item.index.fqn, write_item.index.offset), (piece, write_item)
        assert (tensor.shape, tensor.dtype) == (piece.shape, piece.dtype), (piece, tensor.shape, tensor.dtype)
        return tensor.view(piece.stored_shape)


def save_weights(
    folder: str,
    manifest: CheckpointManifest,
    pieces: Sequence[Piece],
    read: Callable[[Piece], torch.Tensor],
    max_file_size: int,
) -> CheckpointManifest:
    """Write a checkpoint into the empty `folder`. `read` is called for one piece after the other; the manifest is written last.

    Files have at most `max_file_size` bytes unless a piece is larger. Returns the manifest with their sizes and checksums.
    """
    num_layers = 1 + max((piece.layer for piece in pieces if piece.layer is not None), default=0)
    groups = grouped([(piece, piece.num_bytes) for piece in pieces], max_file_size)
    plans = [SavePlan([_item(piece, num_layers) for piece in group]) for group in groups]
    with ThreadPoolExecutor(4) as threads:
        source = _TensorSource(read_ahead(((piece, read(piece)) for piece in pieces), threads))
        file_system = _HashedFiles(threads)
        writer = _Writer(folder, file_system)
        writer.set_up_storage_writer(is_coordinator=True)
        plans = writer.prepare_global_plan([writer.prepare_local_plan(plan) for plan in plans])
        with _without_crc32():
            results = [_written(writer, plan, source) for plan in plans]
        files = {name: file.sums() for name, file in file_system.files.items()}
    writer.finish(Metadata(_entries(pieces, num_layers)), results)
    torch.save({"content_metadata": CONTENT}, os.path.join(folder, COMMON_STATE))
    save_backends(folder)
    files |= {name: checksum(os.path.join(folder, name)) for name in COMMON_FILES}
    manifest = replace(manifest, files=dict(sorted(files.items())), weights_only=True)
    save_manifest(manifest, folder)
    return manifest


@contextmanager
def _without_crc32() -> Iterator[None]:
    """Keep torch from computing CRC-32 sums, which it never checks; the manifest has the sha256 of each file."""
    before = get_crc32_options()
    set_crc32_options(False)
    try:
        yield
    finally:
        set_crc32_options(before)


def _written(writer: _Writer, plan: SavePlan, source: _TensorSource) -> Any:
    """Return torch's record of every tensor in a file. Raises the original error of the disk, which torch wraps."""
    try:
        return writer.write_data(plan, source).wait()
    except RuntimeError as error:
        raise first_cause(error) from error


def grouped(pieces: Sequence[tuple[Thing, int]], max_size: int) -> list[list[Thing]]:
    """Group things, given with their bytes, in order, into as few groups as possible.

    A group has at most `max_size` bytes; a larger thing is alone in its group.
    """
    groups: list[list[Thing]] = [[]]
    size = 0
    for piece, num_bytes in pieces:
        if groups[-1] and size + num_bytes > max_size:
            groups.append([])
            size = 0
        groups[-1].append(piece)
        size += num_bytes
    return groups


def _whole_shape(piece: Piece, num_layers: int) -> torch.Size:
    return piece.shape if piece.layer is None else torch.Size([num_layers, *piece.shape])


def _item(piece: Piece, num_layers: int) -> WriteItem:
    chunk = ChunkStorageMetadata(piece.offsets, piece.stored_shape)
    data = TensorWriteData(chunk, TensorProperties(dtype=piece.dtype), _whole_shape(piece, num_layers))
    return WriteItem(MetadataIndex(piece.name, piece.offsets), WriteItemType.SHARD, tensor_data=data)


def _entries(pieces: Sequence[Piece], num_layers: int) -> dict[str, Any]:
    entries: dict[str, TensorStorageMetadata] = {}
    for piece in pieces:
        empty = TensorStorageMetadata(TensorProperties(dtype=piece.dtype), _whole_shape(piece, num_layers), [])
        entries.setdefault(piece.name, empty).chunks.append(ChunkStorageMetadata(piece.offsets, piece.stored_shape))
    return dict(entries)

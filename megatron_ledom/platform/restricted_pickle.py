"""The one way in which a checkpoint's list of tensors is unpickled: with the classes that such a list is made of, and no others.

A pickle names functions to call. torch's own reader of that list calls whatever it is told to.
"""

import pickle
from types import SimpleNamespace
from typing import IO, Any

NAMES = {
    "torch": ("Size", "float64", "float32", "float16", "bfloat16", "int64", "uint8"),
    "torch.serialization": ("_get_layout",),
    "collections": ("OrderedDict",),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.distributed.checkpoint.metadata": (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.planner": ("BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"),
}
"""All that a list of tensors is made of, by module; nothing else is unpickled, nor a name with a dot: those modules import others."""


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Classes that describe tensors; a file that asks for another one is refused before it can do harm."""
        if name in NAMES.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def load_restricted(file: IO[bytes]) -> Any:
    """The object of an open file. Raises UnpicklingError where it names what is not in NAMES."""
    return _Reader(file).load()


def restricted_module() -> SimpleNamespace:
    """The module `pickle` for a library that reads with it: what it writes is as ever."""
    return SimpleNamespace(**{**vars(pickle), "load": load_restricted})

"""Replacements for megatron-core's handling of saved state: restricted unpickling, results of writer processes, parameter groups.

A pickle names functions to call, and torch's reader of a checkpoint's list of tensors calls whatever it is told to. `load_restricted`
loads only the classes that such a list is made of.

A parameter group holds settings (max_lr, min_lr, lr, betas, eps, weight_decay, ...) beside the number of updates made. megatron-core
0.16 loads the stored settings over those of the run, and its schedule then follows the stored max_lr and min_lr; 0.19 takes max_lr and
min_lr as part of a group's identity, and refuses a checkpoint of another learning rate. Both load what `use_settings_of` leaves.
"""

import os
import pickle
import queue
import tempfile
from types import SimpleNamespace
from typing import IO, Any

from megatron_ledom.errors import MismatchError

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


POSITION = ("params", "step")
"""What a checkpoint decides of a group: all the rest are settings."""
Group = dict[str, Any]


def use_settings_of(optimizer: Any, stored: Any) -> None:
    """Give every group of a loaded optimizer state, before it is loaded, the settings of `optimizer`.

    stored: what megatron-core's `optimizer.sharded_state_dict` became when it was read. Changed in place.
    Raises MismatchError for a group that the run has not.
    """
    parts = optimizer.chained_optimizers
    states = [stored] if len(parts) == 1 else [stored[index] for index in range(len(parts))]
    for part, state in zip(parts, states, strict=True):
        kept = state.get("optimizer", state)  # fp32 weights without the distributed optimizer: no outer layer
        if "param_groups" in kept:
            kept["param_groups"] = [_with_settings(group, part.param_groups) for group in kept["param_groups"]]


def settings_of(group: Group) -> Group:
    """A group without its parameters and the number of updates."""
    return {key: value for key, value in group.items() if key not in POSITION}


def _with_settings(stored: Group, own_groups: list[Group]) -> Group:
    own = [group for group in own_groups if _identity(group) == _identity(stored)]
    if len(own) != 1:
        decay, is_expert = _identity(stored)
        raise MismatchError(
            f"the checkpoint has a parameter group (wd_mult {decay}, is_expert_parallel {is_expert}) of which this run has"
            f" {len(own)} instead of 1; it was written by another optimizer: use another run_dir for a new run"
        )
    return {key: stored[key] for key in POSITION if key in stored} | settings_of(own[0])


def _identity(group: Group) -> tuple[float, bool]:
    """What tells the groups of one optimizer apart, here as in every version of megatron-core."""
    return float(group.get("wd_mult", 1.0)), bool(group.get("is_expert_parallel", False))


class SaveResults:
    """One value from a writer process to the rank that forked it, kept in memory that outlives the process.

    It stands in for the queue that megatron-core's writer makes, which is served by a process of its own: a SIGTERM to all
    processes of a job, as batch systems send it, ends that process, and the next save then hangs for ever. A pipe would not do
    either: a writer with much to tell would wait for a reader, who waits for its end.
    """

    def __init__(self) -> None:
        in_memory = hasattr(os, "memfd_create")  # on Linux
        file = open(os.memfd_create("save_results"), "r+b") if in_memory else tempfile.TemporaryFile()  # noqa: SIM115
        self._file: IO[bytes] = file

    def put(self, value: Any) -> None:
        """Leave the value. Call once, in either process."""
        pickle.dump(value, self._file)
        self._file.flush()

    def get_nowait(self) -> Any:
        """The value, once the process that puts it has ended. Raises queue.Empty when it ended before it had put all of it."""
        self._file.seek(0)
        try:
            return pickle.Unpickler(self._file).load()  # written by a process that this one forked
        except (EOFError, pickle.UnpicklingError) as error:
            raise queue.Empty from error

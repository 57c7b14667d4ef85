"""Replacements for megatron-core's handling of saved state: restricted unpickling, results of writer processes, parameter groups.

A pickle names functions to call, and torch's reader of a checkpoint's list of tensors calls any of them. `load_restricted`
loads only the classes of such a list.

A parameter group contains settings (max_lr, min_lr, lr, betas, eps, weight_decay, ...) and the number of updates. megatron-core
0.16 replaces the settings of the run with the stored ones, and its schedule then follows the stored max_lr and min_lr; 0.19
identifies a group by max_lr and min_lr, and refuses a checkpoint with another learning rate. After
`use_settings_of` both load the state and keep the settings of the run.
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
"""Names allowed in a list of tensors, by module. None has a dot, because a dotted name could reach other modules."""


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Return a class that describes tensors. Raises UnpicklingError for any other name."""
        if name in NAMES.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def load_restricted(file: IO[bytes]) -> Any:
    """Return the object in an open file. Raises UnpicklingError for a name that is not in NAMES."""
    return _Reader(file).load()


def restricted_module() -> SimpleNamespace:
    """Return the module `pickle` with a restricted `load`; writing is unchanged."""
    return SimpleNamespace(**{**vars(pickle), "load": load_restricted})


POSITION = ("params", "step")
"""Keys of a group that come from the checkpoint; all others are settings."""
Group = dict[str, Any]


def use_settings_of(optimizer: Any, stored: Any) -> None:
    """Give every group of a loaded optimizer state, before it is loaded, the settings of `optimizer`.

    stored: the loaded `optimizer.sharded_state_dict` of megatron-core, changed in place.
    Raises MismatchError for a group that the run does not have.
    """
    parts = optimizer.chained_optimizers
    states = [stored] if len(parts) == 1 else [stored[index] for index in range(len(parts))]
    for part, state in zip(parts, states, strict=True):
        kept = state.get("optimizer", state)  # no outer level: fp32 weights without the distributed optimizer
        if "param_groups" in kept:
            kept["param_groups"] = [_with_settings(group, part.param_groups) for group in kept["param_groups"]]


def settings_of(group: Group) -> Group:
    """Return a group without its parameters and its number of updates."""
    return {key: value for key, value in group.items() if key not in POSITION}


def _with_settings(stored: Group, own_groups: list[Group]) -> Group:
    own = [group for group in own_groups if _identity(group) == _identity(stored)]
    if len(own) != 1:
        decay, is_expert = _identity(stored)
        raise MismatchError(
            f"the checkpoint has a parameter group (wd_mult {decay}, is_expert_parallel {is_expert}), this run has"
            f" {len(own)} of them, expected 1; another optimizer wrote it: use another run_dir for a new run"
        )
    return {key: stored[key] for key in POSITION if key in stored} | settings_of(own[0])


def _identity(group: Group) -> tuple[float, bool]:
    """Return the values that distinguish the groups of an optimizer in every version of megatron-core."""
    return float(group.get("wd_mult", 1.0)), bool(group.get("is_expert_parallel", False))


class SaveResults:
    """Passes one value from a writer process to the rank that forked it, through memory that outlives the process.

    It replaces the queue of megatron-core's writer, which runs in its own process. Batch systems send SIGTERM to all processes
    of a job; that ends the queue's process, and the next save hangs for ever. A pipe does not work either: a writer with a large
    value would wait for the reader, while the reader waits for the writer to end.
    """

    def __init__(self) -> None:
        in_memory = hasattr(os, "memfd_create")  # on Linux
        file = open(os.memfd_create("save_results"), "r+b") if in_memory else tempfile.TemporaryFile()  # noqa: SIM115
        self._file: IO[bytes] = file

    def put(self, value: Any) -> None:
        """Store the value. Call once, in either process."""
        pickle.dump(value, self._file)
        self._file.flush()

    def get_nowait(self) -> Any:
        """Return the value; call after the writer's end. Raises queue.Empty if it ended before storing the whole value."""
        self._file.seek(0)
        try:
            return pickle.Unpickler(self._file).load()  # written by a process that this one forked
        except (EOFError, pickle.UnpicklingError) as error:
            raise queue.Empty from error

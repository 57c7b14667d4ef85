"""The checkpoints of a run: `iter_0001000/` and the pointer `latest`.

A checkpoint is written under a temporary name and renamed when all of it is on disk; `latest` changes last. A kill at any
moment leaves the checkpoint that `latest` names whole.
"""

import logging
import os
import shutil
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.validation import StrictHandling
from torch.distributed.checkpoint.api import CheckpointException

from megatron_ledom.checkpoint.manifest import CheckpointManifest, load_manifest, save_manifest
from megatron_ledom.errors import DataError
from megatron_ledom.parallel.gathering import gathered_weights

log = logging.getLogger(__name__)

LATEST = "latest"
UNREADABLE = (OSError, KeyError, ValueError, RuntimeError, EOFError, CheckpointingException, CheckpointException)
"""What a damaged checkpoint raises; torch's CheckpointException gathers the ranks' errors and is no Exception."""


class CheckpointStore:
    """Saves and loads this run's sharded checkpoints; every method but `latest` is called on all ranks together."""

    def __init__(self, folder: str, metadata: dict[str, Any]) -> None:
        self.folder = folder
        self.metadata = metadata

    def latest(self) -> str | None:
        """The folder of the newest finished checkpoint, or None for a new run."""
        return latest_checkpoint(self.folder)

    def load_manifest(self, checkpoint: str) -> CheckpointManifest:
        """What the checkpoint says of itself."""
        return load_manifest(checkpoint)

    def save(self, manifest: CheckpointManifest, model: list[Any], optimizer: Any, scheduler: Any) -> None:
        """Write one checkpoint: temporary name, manifest, rename, pointer."""
        name = f"iter_{manifest.iteration:07d}"
        final, part = os.path.join(self.folder, name), os.path.join(self.folder, name + ".part")
        if dist.get_rank() == 0:
            os.makedirs(self.folder, exist_ok=True)
            shutil.rmtree(part, ignore_errors=True)
            os.makedirs(part)
        dist.barrier()
        content = {key: value for key, value in self.metadata.items() if key != "dp_cp_group"}
        with gathered_weights(model):
            state = self._sharded(model, optimizer, scheduler, loading=False)
            dist_checkpointing.save(state, part, content_metadata=content)
        dist.barrier()
        if dist.get_rank() == 0:
            save_manifest(manifest, part)
            shutil.rmtree(final, ignore_errors=True)
            os.rename(part, final)
            _fsync_folder(self.folder)
            _point_latest(self.folder, name)
        dist.barrier()
        log.info("saved %s", final)

    def load(self, checkpoint: str, model: list[Any], optimizer: Any, scheduler: Any) -> None:
        """Fill model, optimizer and scheduler from a checkpoint of any layout."""
        wanted = self._sharded(model, optimizer, scheduler, loading=True)
        state = _read(checkpoint, wanted, strict=StrictHandling.RAISE_ALL)
        for key, chunk in zip(_model_keys(model), model, strict=True):
            unwrapped(chunk).load_state_dict(state[key])
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])

    def _sharded(self, model: list[Any], optimizer: Any, scheduler: Any, *, loading: bool) -> dict[str, Any]:
        state = sharded_weights(model, self.metadata)
        state["optimizer"] = optimizer.sharded_state_dict(state, is_loading=loading, metadata=self.metadata)
        state["scheduler"] = scheduler.state_dict()
        return state


def sharded_weights(model: list[Any], metadata: dict[str, Any]) -> dict[str, Any]:
    """The sharded state of the model chunks, under the keys that checkpoints use."""
    chunks = zip(_model_keys(model), model, strict=True)
    return {key: unwrapped(chunk).sharded_state_dict(metadata=metadata) for key, chunk in chunks}


def load_weights(checkpoint: str, model: list[Any], metadata: dict[str, Any]) -> None:
    """Fill a model with the weights of a checkpoint of any layout, and leave the rest of it on disk."""
    state = _read(checkpoint, sharded_weights(model, metadata))
    for key, chunk in zip(_model_keys(model), model, strict=True):
        unwrapped(chunk).load_state_dict(state[key])


def _read(checkpoint: str, wanted: dict[str, Any], **how: Any) -> dict[str, Any]:
    """megatron-core's load; whatever a damaged file makes of it becomes a DataError."""
    try:
        state: dict[str, Any] = dist_checkpointing.load(wanted, checkpoint, **how)
    except UNREADABLE as error:
        failures = list(error.failures.values()) if isinstance(error, CheckpointException) else []
        reason = failures[0][0] if failures else error  # the whole text of the former is every rank's traceback
        raise DataError(
            f"{checkpoint} cannot be read ({type(reason).__name__}: {reason}); it is damaged, or of another layer"
            f" implementation: use an earlier one, to which {LATEST} beside it has to point if the run shall go on from there"
        ) from error
    return state


def latest_checkpoint(folder: str) -> str | None:
    """The checkpoint that `folder/latest` names, None without one. Raises DataError when it names none that is whole."""
    try:
        with open(os.path.join(folder, LATEST), encoding="utf-8") as file:
            name = file.read().strip()
    except (FileNotFoundError, NotADirectoryError):
        return None
    checkpoint = os.path.join(folder, name)
    if not os.path.isdir(checkpoint):
        raise DataError(
            f"{folder}/{LATEST} names {name!r}, which is not there; write the name of a finished checkpoint into it"
        )
    return checkpoint


def unwrapped(model: Any) -> Any:
    """The GPTModel inside its wrappers for precision and data parallelism."""
    while hasattr(model, "module"):
        model = model.module
    return model


def _model_keys(model: list[Any]) -> list[str]:
    return ["model"] if len(model) == 1 else [f"model{index}" for index in range(len(model))]


def _point_latest(folder: str, name: str) -> None:
    part = os.path.join(folder, LATEST + ".part")
    with open(part, "w", encoding="utf-8") as file:
        file.write(name + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.rename(part, os.path.join(folder, LATEST))
    _fsync_folder(folder)


def _fsync_folder(folder: str) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

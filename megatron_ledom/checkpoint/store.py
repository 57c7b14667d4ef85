"""The checkpoints of a run, seen from its training: save the state, take it up again.

A checkpoint is written under a temporary name and renamed when all of it is on disk; `latest` changes last. A kill at any
moment leaves the checkpoint that `latest` names whole.
"""

import logging
import pickle
import re
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.validation import StrictHandling
from torch.distributed.checkpoint.api import CheckpointException

from megatron_ledom.checkpoint import stored_tensors
from megatron_ledom.checkpoint.folder import LATEST, advising_another, latest_checkpoint
from megatron_ledom.checkpoint.manifest import CheckpointManifest, check_sizes, load_manifest
from megatron_ledom.checkpoint.writing import CheckpointWriter
from megatron_ledom.config.schema import CheckpointConfig
from megatron_ledom.errors import DataError, TransientError, may_pass
from megatron_ledom.parallel.collectives import from_first_rank, gathered_weights
from megatron_ledom.platform.core_state import use_settings_of
from megatron_ledom.storage.hashes import content_problems, refuse_damaged

log = logging.getLogger(__name__)

EXTRA_STATE = "_extra_state"
"""What a layer keeps besides its weights: fp8 scales, or nothing. It is no part of a model's weights."""
UNREADABLE = (*stored_tensors.UNREADABLE, CheckpointingException, CheckpointException)
"""What a damaged checkpoint raises; torch's CheckpointException gathers the ranks' errors and is no Exception."""


class CheckpointStore:
    """Saves and loads this run's sharded checkpoints; every method is called on all ranks together."""

    def __init__(self, folder: str, metadata: dict[str, Any], settings: CheckpointConfig) -> None:
        self.folder = folder
        self.metadata = metadata
        self.settings = settings
        self.writer = CheckpointWriter(folder, settings, metadata["dp_cp_group"])

    def latest(self) -> str | None:
        """The folder of the newest finished checkpoint as rank 0 sees it, the same on every rank; None for a new run."""
        return from_first_rank(lambda: latest_checkpoint(self.folder))

    def load_manifest(self, checkpoint: str) -> CheckpointManifest:
        """What the checkpoint says of itself."""
        return load_manifest(checkpoint)

    def save(self, manifest: CheckpointManifest, model: list[Any], optimizer: Any, scheduler: Any) -> None:
        """Begin a checkpoint of the state as it is now; with `async_save` it is finished by `poll`, `finish` or the next save.

        Weights that are not finite are not saved: the checkpoint before stays the one to return to.
        """
        self.writer.wait()  # before the host holds another copy of the state
        content = {key: value for key, value in self.metadata.items() if key != "dp_cp_group"}
        with gathered_weights(model):
            if not _are_finite(model):
                log.error("iteration %d is not saved: there are weights that are not finite", manifest.iteration)
                return
            state = self._sharded(model, optimizer, scheduler, loading=False)
            self.writer.save(manifest, state, content)

    def poll(self) -> None:
        """Finish the pending checkpoint if it is written. Call once a step. Raises as `CheckpointWriter.save`."""
        self.writer.poll()

    def finish(self) -> None:
        """Finish the pending checkpoint, waiting for it. Raises as `CheckpointWriter.save`."""
        self.writer.finish()

    def keep_for_replay(self, iterations: list[int]) -> None:
        """From now on the checkpoint before each of these, and of no others, outlives `checkpoint.keep_last`."""
        self.writer.replayed = iterations

    def seconds_to_finish(self) -> float:
        """What a run that stops now would wait for its checkpoints, by those it has made; 0 before the first."""
        return self.writer.seconds_to_finish()

    def load(self, checkpoint: str, model: list[Any], optimizer: Any, scheduler: Any) -> None:
        """Fill model, optimizer and scheduler from a checkpoint of any layout; of imported weights, the model alone.

        Of the optimizer, moments and number of updates are the checkpoint's; its settings stay those it was built with.
        """
        with advising_another(checkpoint):
            self._load(checkpoint, model, optimizer, scheduler)

    def _load(self, checkpoint: str, model: list[Any], optimizer: Any, scheduler: Any) -> None:
        if self.settings.verify_on_load:
            self._verify(checkpoint)
        if load_manifest(checkpoint).weights_only:
            load_weights(checkpoint, model, self.metadata)
            optimizer.reload_model_params()  # its fp32 copies
            return
        wanted = self._sharded(model, optimizer, scheduler, loading=True)
        state = _read(checkpoint, wanted, strict=StrictHandling.RAISE_ALL)
        for key, chunk in zip(_model_keys(model), model, strict=True):
            unwrapped(chunk).load_state_dict(state[key])
        use_settings_of(optimizer, state["optimizer"])
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])

    def _verify(self, checkpoint: str) -> None:
        """Read every file once, each rank its share; a fault that one finds stops all."""
        found: list[list[str]] = [[] for _ in range(dist.get_world_size())]
        files = load_manifest(checkpoint).files
        dist.all_gather_object(found, content_problems(checkpoint, files, dist.get_rank(), dist.get_world_size()))
        refuse_damaged(checkpoint, [fault for faults in found for fault in faults])

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
    wanted = sharded_weights(model, metadata)
    extra = {key: [name for name in part if name.endswith(EXTRA_STATE)] for key, part in wanted.items()}
    for key, names in extra.items():
        for name in names:
            del wanted[key][name]
    state = _read(checkpoint, wanted)
    for key, chunk in zip(_model_keys(model), model, strict=True):
        unwrapped(chunk).load_state_dict(state[key] | dict.fromkeys(extra[key]))


def _read(checkpoint: str, wanted: dict[str, Any], **how: Any) -> dict[str, Any]:
    """megatron-core's load of a checkpoint of the right sizes; whatever a damaged file makes of it becomes a DataError."""
    check_sizes(checkpoint)
    try:
        state: dict[str, Any] = dist_checkpointing.load(wanted, checkpoint, **how)
    except UNREADABLE as error:
        failures = list(error.failures.values()) if isinstance(error, CheckpointException) else []
        reason = failures[0][0] if failures else error  # the whole text of the former is every rank's traceback
        if isinstance(reason, pickle.UnpicklingError):
            raise DataError(not_a_state(checkpoint, reason)) from error
        if may_pass(reason):
            raise TransientError(f"{checkpoint} cannot be read ({reason}); check the disk, then start again") from error
        raise DataError(
            f"{checkpoint} cannot be read ({type(reason).__name__}: {reason}); it is damaged, or of another layer"
            f" implementation: use an earlier one, to which {LATEST} beside it has to point if the run shall go on from there"
        ) from error
    return state


def not_a_state(checkpoint: str, error: pickle.UnpicklingError) -> str:
    """What to say of a file that asks for more than tensors and settings."""
    asked = re.search(r"(?:asks for|GLOBAL) ([\w.]+)", str(error))
    found = f"asks for {asked[1]}" if asked else "is no pickle of a checkpoint"
    return (
        f"{checkpoint} has a file that {found}, which no saved run does and which could run code; nothing of it was run. It is"
        f" damaged, or somebody else made it: use another one, to which {LATEST} beside it has to point"
    )


def _are_finite(model: list[Any]) -> bool:
    """Whether every weight of every rank is a number; the same answer on all ranks."""
    finite = torch.stack([weight.detach().isfinite().all() for chunk in model for weight in chunk.parameters()]).all()
    answer = finite.to(torch.int32)
    dist.all_reduce(answer, op=dist.ReduceOp.MIN)
    return bool(answer)


def unwrapped(model: Any) -> Any:
    """The GPTModel inside its wrappers for precision and data parallelism."""
    while hasattr(model, "module"):
        model = model.module
    return model


def _model_keys(model: list[Any]) -> list[str]:
    return ["model"] if len(model) == 1 else [f"model{index}" for index in range(len(model))]

"""Save and load the state of a run.

A checkpoint is written under a temporary name and renamed when all of it is on disk; then `latest` is changed. If the run is
killed at any moment, the checkpoint that `latest` names stays complete.
"""

import logging
import os
import pickle
import re
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding
from megatron.core.dist_checkpointing.validation import StrictHandling, maybe_report_missing_and_unexpected_keys
from torch.distributed.checkpoint.api import CheckpointException

from megatron_ledom.checkpoint import stored_tensors
from megatron_ledom.checkpoint.averaging import EMA, MAIN
from megatron_ledom.checkpoint.folder import COMMON_STATE, LATEST, advising_another, latest_checkpoint
from megatron_ledom.checkpoint.main_weights import MainWeights
from megatron_ledom.checkpoint.manifest import CheckpointManifest, check_sizes, load_manifest
from megatron_ledom.checkpoint.weight_ema import WeightEma
from megatron_ledom.checkpoint.writing import CheckpointWriter
from megatron_ledom.config.schema import CheckpointConfig
from megatron_ledom.errors import DataError, TransientError, may_pass
from megatron_ledom.parallel.collectives import from_first_rank, gathered_weights, on_every_rank
from megatron_ledom.platform.core_state import use_settings_of
from megatron_ledom.platform.core_versions import core_text, needs_common_file
from megatron_ledom.storage.hashes import content_problems, refuse_damaged

log = logging.getLogger(__name__)

EXTRA_STATE = "_extra_state"
"""State of a layer that is not a weight: fp8 scales, or nothing."""
EXTRA_STATE_OF_NORMS = "layernorm._extra_state"
"""Only Transformer Engine's norms have it, and it is empty: a checkpoint without it has the same keys for all kinds of layers.

Checkpoints of version 0.2.0 and earlier have it; it is not read.
"""
UNREADABLE = (*stored_tensors.UNREADABLE, CheckpointingException, CheckpointException)
"""Exceptions for a damaged checkpoint. torch's CheckpointException, with the errors of all ranks, is not an Exception."""


class CheckpointStore:
    """Saves and loads the sharded checkpoints of a run. All ranks must call each method together."""

    def __init__(self, folder: str, metadata: dict[str, Any], settings: CheckpointConfig) -> None:
        self.folder = folder
        self.metadata = metadata
        self.settings = settings
        self.writer = CheckpointWriter(folder, settings, metadata["dp_cp_group"])
        self.seconds_to_copy = 0.0
        """Estimated seconds to copy a checkpoint to the mirror, on the first rank."""

    def latest(self) -> str | None:
        """Return the folder of the latest finished checkpoint, the same on every rank; None for a new run."""
        return from_first_rank(lambda: latest_checkpoint(self.folder))

    def load_manifest(self, checkpoint: str) -> CheckpointManifest:
        """Return the manifest of a checkpoint."""
        return on_every_rank(lambda: load_manifest(checkpoint))

    def save(
        self, manifest: CheckpointManifest, model: list[Any], optimizer: Any, scheduler: Any, ema: WeightEma | None = None
    ) -> None:
        """Start a checkpoint of the current state. With `async_save`, `poll`, `finish` or the next save completes it.

        Weights that are not finite are not saved, so that the run can return to the previous checkpoint.
        """
        self.writer.wait()  # before the host needs memory for another copy of the state
        content = {key: value for key, value in self.metadata.items() if key != "dp_cp_group"}
        with gathered_weights(model):
            if not _are_finite(model):
                log.error("iteration %d was not saved: some weights are not finite", manifest.iteration)
                return
            state = self._sharded(model, optimizer, scheduler, ema, loading=False)
            self.writer.save(manifest, state, content)

    def poll(self) -> None:
        """Complete the pending checkpoint if it is written. Call it once per step. Raises the errors of `CheckpointWriter.save`."""
        self.writer.poll()

    def finish(self) -> None:
        """Wait for the pending checkpoint and complete it. Raises the errors of `CheckpointWriter.save`."""
        self.writer.finish()

    def keep_for_replay(self, iterations: list[int]) -> None:
        """Keep the checkpoint before each of these iterations, even if `checkpoint.keep_last` would delete it.

        Replaces the iterations of an earlier call.
        """
        self.writer.replayed = iterations

    def seconds_to_finish(self) -> float:
        """Return the estimated seconds to write and copy the checkpoints if the run stops now; 0 before the first save."""
        return self.writer.seconds_to_finish() + self.seconds_to_copy

    @property
    def newest(self) -> int | None:
        """Iteration of the last checkpoint that this launch completed, on the first rank; None before the first."""
        return self.writer.newest

    def load(
        self,
        checkpoint: str,
        model: list[Any],
        optimizer: Any,
        scheduler: Any,
        ema: WeightEma | None = None,
        *,
        unread: str | None = None,
    ) -> None:
        """Fill model, optimizer and scheduler from a checkpoint of any layout; from imported or averaged weights, only the model.

        The optimizer gets its moments and number of updates from the checkpoint and keeps its own settings. unread: see `start_from`.
        """
        with advising_another(checkpoint):
            verify = self.settings.verify_on_load
            self.start_from(checkpoint, model, optimizer, scheduler, ema, verify=verify, unread=unread)

    def start_from(
        self,
        checkpoint: str,
        model: list[Any],
        optimizer: Any,
        scheduler: Any,
        ema: WeightEma | None,
        *,
        only_weights: bool = False,
        verify: bool = True,
        unread: str | None = None,
    ) -> None:
        """Do the same as `load` from a checkpoint of any run; with `only_weights`, fill only the model and begin a new `ema`.

        verify: compare the sha256 of every file. unread: beginning of the names of weights that keep their values, where only
        weights are read.
        """
        manifest = self.load_manifest(checkpoint)
        if verify:
            _check_content(checkpoint, manifest)
        if manifest.weights_only or only_weights:
            load_weights(checkpoint, model, self.metadata, unread=unread)
            optimizer.reload_model_params()  # its fp32 copies
            if manifest.average is not None and manifest.run_config(checkpoint).model.params_dtype != "fp32":
                load_main_weights(checkpoint, model, optimizer, self.metadata, unread)
            if ema is not None:
                ema.restart()
            return
        stored_ema = ema if manifest.has_ema else None
        wanted = self._sharded(model, optimizer, scheduler, stored_ema, loading=True)
        state = _read(checkpoint, wanted, exact=True)

        def fill() -> None:
            """Move the state that was read into the run."""
            _fill(model, state)
            use_settings_of(optimizer, state["optimizer"])
            optimizer.load_state_dict(state["optimizer"])
            scheduler.load_state_dict(state["scheduler"])
            if stored_ema is not None:
                stored_ema.load(state[EMA])
            elif ema is not None:
                ema.restart()

        on_every_rank(fill)
        if (ema is not None) != manifest.has_ema:
            log.warning(
                "%s has no moving average of the weights: it begins at iteration %d"
                if ema is not None
                else "the moving average in %s is dropped at iteration %d: optimizer.ema_decay is not set",
                checkpoint,
                manifest.iteration,
            )

    def _sharded(
        self, model: list[Any], optimizer: Any, scheduler: Any, ema: WeightEma | None, *, loading: bool
    ) -> dict[str, Any]:
        state = sharded_weights(model, self.metadata)
        average = None if ema is None else ema.sharded_state(state, loading=loading)
        state["optimizer"] = optimizer.sharded_state_dict(state, is_loading=loading, metadata=self.metadata)
        state["scheduler"] = scheduler.state_dict()
        if average is not None:
            state[EMA] = average
        return state


def _is_of_ema(key: str) -> bool:
    """Return True for a key of the moving average, which a run without `optimizer.ema_decay` does not read."""
    return key.startswith(f"{EMA}.")


def sharded_weights(model: list[Any], metadata: dict[str, Any]) -> dict[str, Any]:
    """Return the sharded state of the model chunks under the keys of checkpoints."""
    chunks = zip(_model_keys(model), model, strict=True)
    states = {key: unwrapped(chunk).sharded_state_dict(metadata=metadata) for key, chunk in chunks}
    return {key: _without(state, EXTRA_STATE_OF_NORMS) for key, state in states.items()}


def load_weights(
    checkpoint: str, model: list[Any], metadata: dict[str, Any], prefix: str = "", *, unread: str | None = None
) -> None:
    """Fill a model with the weights of a checkpoint of any layout; nothing else is read.

    prefix: of the names of the tensors, such as `ema.` for the moving average. unread: beginning of the names of weights that keep
    their values.
    """
    wanted = {key: _without(part, EXTRA_STATE) for key, part in sharded_weights(model, metadata).items()}
    if unread is not None:
        wanted = {
            key: {name: value for name, value in part.items() if not name.startswith(unread)} for key, part in wanted.items()
        }
    add_prefix_for_sharding(wanted, prefix)
    state = _read(checkpoint, wanted, exact=False)
    on_every_rank(lambda: _fill(model, state, unread))


def load_main_weights(
    checkpoint: str, model: list[Any], optimizer: Any, metadata: dict[str, Any], unread: str | None = None
) -> None:
    """Fill the fp32 main weights from a checkpoint of averaged weights, of which the model has the rounded ones.

    unread: as in `load_weights`.
    """
    main = MainWeights(optimizer)
    wanted = main.sharded(sharded_weights(model, metadata), MAIN, None)
    if unread is not None:
        wanted = {index: one for index, one in wanted.items() if not one.key.startswith(f"{MAIN}.{unread}")}
    state = _read(checkpoint, {"main": wanted}, exact=False)
    on_every_rank(lambda: main.fill(main.tensors, state["main"]))


def _without(state: dict[str, Any], suffix: str) -> dict[str, Any]:
    """Return the entries of a chunk's state whose names do not end with `suffix`."""
    return {name: value for name, value in state.items() if not name.endswith(suffix)}


def _fill(model: list[Any], state: dict[str, Any], unread: str | None = None) -> None:
    """Load the state of every model chunk; extra state that it lacks is None, which layers ignore."""
    for key, chunk in zip(_model_keys(model), model, strict=True):
        module = unwrapped(chunk)
        now = module.state_dict()
        absent = dict.fromkeys(name for name in now if name.endswith(EXTRA_STATE))
        kept = {name: value for name, value in now.items() if unread is not None and name.startswith(unread)}
        module.load_state_dict(absent | kept | state[key])


def _check_content(checkpoint: str, manifest: CheckpointManifest) -> None:
    """Read every file once, each rank a part of them. Raises DataError on all ranks if any rank finds a damaged file."""
    found: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(found, content_problems(checkpoint, manifest.files, dist.get_rank(), dist.get_world_size()))
    refuse_damaged(checkpoint, [problem for problems in found for problem in problems])


def _read(checkpoint: str, wanted: dict[str, Any], *, exact: bool) -> dict[str, Any]:
    """Return the state that megatron-core loads from a checkpoint. Raises DataError on every rank if any finds it damaged.

    exact: the checkpoint must have no further keys.

    From megatron-core 0.18 a load has no collectives: without the agreement a healthy rank would wait for a damaged one.
    """
    manifest = on_every_rank(lambda: _check_files(checkpoint))
    try:
        return on_every_rank(lambda: _read_own(checkpoint, wanted, exact=exact))
    except DataError:
        _check_content(checkpoint, manifest)  # names the damaged file
        raise


def _check_files(checkpoint: str) -> CheckpointManifest:
    """Return the manifest. Raises DataError if files are missing, have another size, or are of a newer megatron-core."""
    manifest = check_sizes(checkpoint)
    if needs_common_file() and not os.path.exists(os.path.join(checkpoint, COMMON_STATE)):
        raise DataError(
            f"{checkpoint} has no {COMMON_STATE}: megatron-core 0.19 or newer wrote it without this package, and the installed"
            f" {core_text()} does not find that state elsewhere; load it with megatron-core 0.19 (Python 3.12 or newer) and save it"
            f" there, since this package writes {COMMON_STATE} with every version"
        )
    return manifest


def _read_own(checkpoint: str, wanted: dict[str, Any], *, exact: bool) -> dict[str, Any]:
    """Return this rank's part of the state."""
    state: dict[str, Any]
    try:
        if exact:
            state, left, absent = dist_checkpointing.load(wanted, checkpoint, strict=StrictHandling.RETURN_ALL)
            left = {key for key in left if not key.endswith(EXTRA_STATE_OF_NORMS) and (EMA in wanted or not _is_of_ema(key))}
            maybe_report_missing_and_unexpected_keys(left, absent)
        else:
            state = dist_checkpointing.load(wanted, checkpoint)
    except UNREADABLE as error:
        failures = list(error.failures.values()) if isinstance(error, CheckpointException) else []
        reason = failures[0][0] if failures else error  # the text of a CheckpointException has the traceback of every rank
        if isinstance(reason, pickle.UnpicklingError):
            raise DataError(not_a_state(checkpoint, reason)) from error
        if may_pass(reason):
            raise TransientError(f"{checkpoint} cannot be read ({reason}); check the disk, then start again") from error
        raise DataError(
            f"{checkpoint} cannot be read ({type(reason).__name__}: {reason}); it is damaged, or has another layer"
            f" implementation: resume from an earlier one by writing its name into the file {LATEST} next to it"
        ) from error
    return state


def not_a_state(checkpoint: str, error: pickle.UnpicklingError) -> str:
    """Return the error message for a file that contains more than tensors and settings."""
    requested = re.search(r"(?:names|asks for|GLOBAL) ([\w.]+)", str(error))
    found = f"needs {requested[1]}" if requested else "is not a pickle of a checkpoint"
    return (
        f"{checkpoint} has a file that {found}. No run writes such a file, and it could run code, so it was not loaded. The checkpoint is"
        f" damaged or not from this package: use another one by writing its name into the file {LATEST} next to it"
    )


def _are_finite(model: list[Any]) -> bool:
    """Return True if every weight of every rank is finite; the answer is the same on all ranks."""
    finite = torch.stack([weight.detach().isfinite().all() for chunk in model for weight in chunk.parameters()]).all()
    answer = finite.to(torch.int32)
    dist.all_reduce(answer, op=dist.ReduceOp.MIN)
    return bool(answer)


def unwrapped(model: Any) -> Any:
    """Return the GPTModel without its wrappers for precision and data parallelism."""
    while hasattr(model, "module"):
        model = model.module
    return model


def _model_keys(model: list[Any]) -> list[str]:
    return ["model"] if len(model) == 1 else [f"model{index}" for index in range(len(model))]

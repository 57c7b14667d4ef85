"""Write one checkpoint to the disk while training continues.

Each rank forks a process, which has a copy of the current state and writes the rank's part of it. megatron-core assigns the
parts and waits for the processes. When all have succeeded, the first rank writes the list of all tensors and the manifest with
size and sha256 of every file, renames the folder, updates `latest`, and moves outdated checkpoints to the trash. If one rank fails, all
ranks raise an error with the cause, and the earlier checkpoints do not change.
"""

import gc
import logging
import os
import queue
import shutil
import signal
import time
import traceback
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue, AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from megatron_ledom.checkpoint.folder import (
    COMMON_FILES,
    PART,
    checkpoint_name,
    latest_name,
    move_to_trash,
    put_in_place,
    retire,
    save_backends,
    sweep,
)
from megatron_ledom.checkpoint.manifest import CheckpointManifest, save_manifest
from megatron_ledom.config.schema import CheckpointConfig
from megatron_ledom.errors import DataError, LedomError, TransientError, cannot_write, first_cause
from megatron_ledom.platform.core_fixes import save_common
from megatron_ledom.platform.core_state import SaveResults
from megatron_ledom.platform.core_versions import save_options, take_common_state
from megatron_ledom.platform.processes import die_with_the_parent, leave_signals_to_the_parent
from megatron_ledom.storage.files import sync
from megatron_ledom.storage.hashes import FileSums, checksum
from megatron_ledom.storage.records import SAVES, append_record

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RankFiles:
    """The files that one rank wrote: megatron-core's record of their tensors, and their sizes and checksums."""

    results: list[Any]
    files: FileSums


@dataclass(slots=True)
class _Pending:
    """A save that was started and is not yet complete."""

    manifest: CheckpointManifest
    part: str
    storage: FileSystemWriterAsync
    metadata: Any
    """megatron-core's list of all tensors, on the first rank."""
    results: SaveResults
    process: Any = None
    """The writer process; None if this process writes."""

    def outcome(self) -> RankFiles | LedomError:
        """Return the files of this rank, or the error, after its writer has ended."""
        try:
            outcome: RankFiles | LedomError = self.results.get_nowait()
        except queue.Empty:
            code = None if self.process is None else self.process.exitcode
            how = f"was killed by {signal.Signals(-code).name}" if code and code < 0 else f"ended with code {code}"
            return TransientError(
                f"the process that wrote this rank's part of {self.part} {how}; often memory ran out: the host needs memory for a"
                " copy of the state"
            )
        return outcome


class CheckpointWriter:
    """Writes the checkpoints of a run, one at a time. All ranks must call each method together."""

    def __init__(self, folder: str, settings: CheckpointConfig, replicas: dist.ProcessGroup | None) -> None:
        self.folder, self.settings = folder, settings
        self.replayed: list[int] = []
        """Iterations to replay: the checkpoint before each is not deleted. Used on the first rank."""
        self.held: set[int] = set()
        """Iterations whose checkpoints are being copied and are not deleted now. Used on the first rank."""
        self.newest: int | None = None
        """Iteration of the last checkpoint that this launch completed. Set on the first rank."""
        self._longest_save, self._begun = 0.0, 0.0
        self._calls = AsyncCallsQueue(persistent=False)
        self._strategy = _Strategy("torch_dist", 1, thread_count=1)
        # ranks with the same tensors divide the writing among them
        self._spread = _Spread(self._strategy, replicas, do_cache_distribution=True)

    def save(self, manifest: CheckpointManifest, state: dict[str, Any], content: dict[str, Any]) -> None:
        """Start a checkpoint of the current sharded `state`; without `async_save` also complete it.

        Waits for the previous checkpoint first. Raises DataError or TransientError on every rank if either cannot be written.
        """
        self.wait()
        self._begun = time.monotonic()
        name = checkpoint_name(manifest.iteration)
        part = os.path.join(self.folder, name + PART)
        if not self._begin(name, part):
            return
        request = dist_checkpointing.save(
            state, part, self._spread, async_sharded_save=True, content_metadata=content, **save_options()
        )
        storage, metadata = self._strategy.planned
        buckets, results = request.async_fn_args[1:] if request.async_fn_args else ([], SaveResults())
        pending = _Pending(manifest, part, storage, metadata, results)
        write = partial(
            _write_files,
            transforms=[storage.transforms],
            part=part,
            parent=os.getpid() if self.settings.async_save else None,
        )
        request = AsyncRequest(
            async_fn=write,
            async_fn_args=(dist.get_rank(), buckets, results),
            finalize_fns=[partial(self._finalize, pending)],
            preload_fn=request.preload_fn or _nothing,
        )
        if self.settings.async_save:
            self._calls.schedule_async_request(request)
            pending.process = self._calls.async_calls[-1].async_caller.process
        else:
            request.execute_sync()

    def poll(self) -> None:
        """Complete the pending checkpoint if every rank has written its files; otherwise return immediately."""
        self._calls.maybe_finalize_async_calls(blocking=False)

    def wait(self) -> None:
        """Wait until the pending checkpoint is complete."""
        self._calls.maybe_finalize_async_calls(blocking=True)

    def finish(self) -> None:
        """Complete the pending checkpoint, then delete the trash."""
        self.wait()
        if dist.get_rank() == 0:
            sweep(self.folder)

    def seconds_to_finish(self) -> float:
        """Return the estimated seconds of `save` and `finish` now: the rest of the pending save and a new one.

        A new save is assumed to take as long as the longest so far.
        """
        pending = time.monotonic() - self._begun if self._calls.async_calls else 0.0
        whole = max(self._longest_save, pending)
        return whole + (whole - pending if self._calls.async_calls else 0.0)

    def _begin(self, name: str, part: str) -> bool:
        """Create an empty folder to write into. Return False if this checkpoint already exists."""
        answer: list[Any] = [None, True]
        if dist.get_rank() == 0:
            try:
                answer[1] = latest_name(self.folder) != name or not os.path.isdir(os.path.join(self.folder, name))
                if answer[1]:
                    os.makedirs(self.folder, exist_ok=True)
                    if os.path.exists(part):
                        move_to_trash(self.folder, name + PART)
                    os.makedirs(part)
            except OSError as error:
                answer[0] = cannot_write(error, part)
        dist.broadcast_object_list(answer, src=0)
        if answer[0] is not None:
            raise answer[0]
        return bool(answer[1])

    def _finalize(self, pending: _Pending) -> None:
        """Publish the checkpoint if all ranks have written their files. Otherwise raises on every rank, as `save`."""
        outcomes: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object(pending.outcome(), outcomes, dst=0)
        failure: list[LedomError | None] = [None]
        if outcomes is not None:
            failure = [self._publish(pending, outcomes)]
        dist.broadcast_object_list(failure, src=0)
        if failure[0] is not None:
            raise failure[0]
        self._longest_save = max(self._longest_save, time.monotonic() - self._begun)
        log.info("saved %s", os.path.join(self.folder, checkpoint_name(pending.manifest.iteration)))

    def _publish(self, pending: _Pending, outcomes: list[RankFiles | LedomError]) -> LedomError | None:
        """Do the first rank's part of `_finalize`. After an error, delete the written files and return the error."""
        failures = {f"rank {rank}: ": what for rank, what in enumerate(outcomes) if isinstance(what, LedomError)}
        written = [outcome for outcome in outcomes if isinstance(outcome, RankFiles)]
        if not failures:
            try:
                _complete(pending, written)
                put_in_place(self.folder, checkpoint_name(pending.manifest.iteration))
            except OSError as error:
                failures = {"": cannot_write(error, error.filename or pending.part)}
        if failures:
            shutil.rmtree(pending.part, ignore_errors=True)
            is_transient = all(isinstance(what, TransientError) for what in failures.values())
            found = "; ".join(f"{who}{what}" for who, what in failures.items())
            return (TransientError if is_transient else DataError)(
                f"checkpoint {pending.manifest.iteration} was not saved; the earlier ones are unchanged: {found}"
            )
        self._record(pending.manifest.iteration)
        self.newest = pending.manifest.iteration
        retire(self.folder, self.settings, self.replayed, self.held)
        return None

    def _record(self, iteration: int) -> None:
        """Record in the run folder that a checkpoint exists. If all are lost later, the run must not start again at 0."""
        path = os.path.join(os.path.dirname(os.path.abspath(self.folder)), SAVES)
        try:
            append_record(path, {"iteration": iteration, "saved_at": datetime.now(UTC).isoformat(timespec="seconds")})
        except OSError as error:
            log.warning("%s cannot be written (%s); the checkpoint itself is saved", path, error.strerror)


class _Strategy(TorchDistSaveShardedStrategy):  # type: ignore[misc]
    """megatron-core's strategy, which also stores its list of tensors for `_finalize`.

    With megatron-core's own end of a save the other ranks wait for ever if the first rank cannot write.
    """

    planned: tuple[FileSystemWriterAsync, Any]

    def _get_save_and_finalize_callbacks(self, writer: Any, save_state_dict_ret: Any, *options: str) -> AsyncRequest:
        self.planned = writer, save_state_dict_ret[1]
        return super()._get_save_and_finalize_callbacks(writer, save_state_dict_ret, *options)


class _Spread(FullyParallelSaveStrategyWrapper):  # type: ignore[misc]
    """megatron-core's division of the writing among ranks. Every version writes the state that is equal on all ranks as common.pt."""

    def async_save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: str, *options: str) -> AsyncRequest:
        """Write common.pt, then return the request that writes the tensors."""
        common = take_common_state(sharded_state_dict)
        if common is not None:
            save_common(common, checkpoint_dir)
        return super().async_save(sharded_state_dict, checkpoint_dir, *options)


def _complete(pending: _Pending, written: list[RankFiles]) -> None:
    """Write the list of all tensors and the manifest to the disk."""
    part = pending.part
    pending.storage.finish(pending.metadata, [one.results for one in written])
    save_backends(part)
    files = {name: sums for one in written for name, sums in one.files.items()}
    files |= {name: checksum(os.path.join(part, name)) for name in COMMON_FILES}
    save_manifest(replace(pending.manifest, files=dict(sorted(files.items()))), part)
    sync(part)


def _nothing() -> list[Any]:
    """Return no data, for a rank whose tensors other ranks write."""
    return []


def _write_files(
    rank: int, buckets: list[Any], results: SaveResults, *, transforms: list[Any], part: str, parent: int | None
) -> None:
    """Write the files of one rank. Put its RankFiles, or the error, into `results`.

    `parent`: id of the parent of a forked process; None without a fork. The first rank deletes the trash before, because the
    new files need the space.
    """
    if parent is not None:
        leave_signals_to_the_parent()
        die_with_the_parent(parent)
        gc.disable()  # collecting objects of the parent process causes errors in CUDA
    path = part
    try:
        if rank == 0:
            sweep(os.path.dirname(part), keep=os.path.basename(part))
        written = RankFiles([], {})
        for bucket in buckets:
            path = str(bucket[0])
            written.results.extend(_write_file(bucket, transforms))
            written.files[os.path.basename(path)] = checksum(path)
        results.put(written)
    except OSError as error:
        results.put(cannot_write(error, path))
    except Exception:
        results.put(TransientError(f"{path} could not be written:\n{traceback.format_exc()}"))


def _write_file(bucket: Any, transforms: list[Any]) -> list[Any]:
    """Write one file with megatron-core's writer and fsync. Returns its record of every tensor in the file."""
    answers: queue.Queue[Any] = queue.Queue()
    counts: queue.Queue[int] = queue.Queue()
    counts.put(0)
    FileSystemWriterAsync.write_preloaded_data(transforms, 0, bucket, answers, counts, use_fsync=True)
    _, outcome = answers.get_nowait()
    if isinstance(outcome, Exception):
        raise first_cause(outcome)
    written: list[Any] = outcome
    return written

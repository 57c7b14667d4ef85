"""Write one checkpoint to the disk while training goes on.

Each rank forks a process that holds the state as it was at that moment and writes this rank's share of it; megatron-core
plans the shares and waits for the processes. When all ranks' have ended well, the first rank writes what names the parts,
then the manifest with every file's size and sha256, renames the folder, lets `latest` name it, and retires what is
outdated. Whatever fails on one rank is an error with its cause on every rank, and the checkpoints before stay as they were.
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
from megatron_ledom.platform.core_state import SaveResults
from megatron_ledom.platform.processes import die_with_the_parent, leave_signals_to_the_parent
from megatron_ledom.storage.files import sync
from megatron_ledom.storage.hashes import FileSums, checksum
from megatron_ledom.storage.records import SAVES, append_record

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RankFiles:
    """The files of one rank: megatron-core's record of what it wrote, and their sums."""

    results: list[Any]
    files: FileSums


@dataclass(slots=True)
class _Pending:
    """A save that has begun."""

    manifest: CheckpointManifest
    part: str
    storage: FileSystemWriterAsync
    metadata: Any
    """megatron-core's plan of all tensors, on the first rank."""
    results: SaveResults
    process: Any = None
    """The writer process; None when written in this one."""

    def outcome(self) -> RankFiles | LedomError:
        """This rank's share, or what went wrong with it, once its writer has ended."""
        try:
            outcome: RankFiles | LedomError = self.results.get_nowait()
        except queue.Empty:
            code = None if self.process is None else self.process.exitcode
            how = f"was killed by {signal.Signals(-code).name}" if code and code < 0 else f"ended with code {code}"
            return TransientError(
                f"the process that wrote its share of {self.part} {how}; often memory ran out: the host needs room for a copy"
                " of the state"
            )
        return outcome


class CheckpointWriter:
    """Writes a run's checkpoints, one at a time; every method is called on all ranks together."""

    def __init__(self, folder: str, settings: CheckpointConfig, replicas: dist.ProcessGroup | None) -> None:
        self.folder, self.settings = folder, settings
        self.replayed: list[int] = []
        """Iterations whose replay shall stay short: the checkpoint before each is not retired. Of the first rank."""
        self._longest_save, self._begun = 0.0, 0.0
        self._calls = AsyncCallsQueue(persistent=False)
        self._strategy = _Strategy("torch_dist", 1, thread_count=1)
        # ranks that hold the same tensors share the writing of them
        self._spread = FullyParallelSaveStrategyWrapper(self._strategy, replicas, do_cache_distribution=True)

    def save(self, manifest: CheckpointManifest, state: dict[str, Any], content: dict[str, Any]) -> None:
        """Begin a checkpoint of the sharded `state` as it is now; without `async_save` also end it.

        Waits for the one before. Raises DataError or TransientError, on every rank, when that or this one cannot be written.
        """
        self.wait()
        self._begun = time.monotonic()
        name = checkpoint_name(manifest.iteration)
        part = os.path.join(self.folder, name + PART)
        if not self._begin(name, part):
            return
        request = dist_checkpointing.save(state, part, self._spread, async_sharded_save=True, content_metadata=content)
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
        """Finish the pending checkpoint if every rank has written its share; returns at once if not."""
        self._calls.maybe_finalize_async_calls(blocking=False)

    def wait(self) -> None:
        """Finish the pending checkpoint, however long that takes."""
        self._calls.maybe_finalize_async_calls(blocking=True)

    def finish(self) -> None:
        """Wait, then delete what is in the trash."""
        self.wait()
        if dist.get_rank() == 0:
            sweep(self.folder)

    def seconds_to_finish(self) -> float:
        """Return the seconds that `save` and `finish` would take now: the rest of the pending save and a whole one, as long as the longest so far."""
        pending = time.monotonic() - self._begun if self._calls.async_calls else 0.0
        whole = max(self._longest_save, pending)
        return whole + (whole - pending if self._calls.async_calls else 0.0)

    def _begin(self, name: str, part: str) -> bool:
        """An empty folder to write into; False when this very checkpoint is finished already."""
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
        """Make the checkpoint one that counts, if all shares are written. Raises on every rank if not, as `save`."""
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
        """The first rank's part of `_finalize`. Returns what went wrong; then what was written is deleted, to give room."""
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
            passing = all(isinstance(what, TransientError) for what in failures.values())
            found = "; ".join(f"{who}{what}" for who, what in failures.items())
            return (TransientError if passing else DataError)(
                f"checkpoint {pending.manifest.iteration} was not saved, those before it are untouched: {found}"
            )
        self._record(pending.manifest.iteration)
        retire(self.folder, self.settings, self.replayed)
        return None

    def _record(self, iteration: int) -> None:
        """Note beside the folder that the run has a checkpoint: without its checkpoints it must not begin anew."""
        path = os.path.join(os.path.dirname(os.path.abspath(self.folder)), SAVES)
        try:
            append_record(path, {"iteration": iteration, "saved_at": datetime.now(UTC).isoformat(timespec="seconds")})
        except OSError as error:
            log.warning("%s cannot be written (%s); the checkpoint is saved all the same", path, error.strerror)


class _Strategy(TorchDistSaveShardedStrategy):  # type: ignore[misc]
    """megatron-core's, which keeps what it has planned where `_finalize` finds it.

    Its own way to finish a save leaves the other ranks waiting when the first cannot write.
    """

    planned: tuple[FileSystemWriterAsync, Any]

    def _get_save_and_finalize_callbacks(self, writer: Any, save_state_dict_ret: Any) -> AsyncRequest:
        self.planned = writer, save_state_dict_ret[1]
        return super()._get_save_and_finalize_callbacks(writer, save_state_dict_ret)


def _complete(pending: _Pending, written: list[RankFiles]) -> None:
    """Write the list of all tensors and the manifest; both are on disk then."""
    part = pending.part
    pending.storage.finish(pending.metadata, [one.results for one in written])
    save_backends(part)
    files = {name: sums for one in written for name, sums in one.files.items()}
    files |= {name: checksum(os.path.join(part, name)) for name in COMMON_FILES}
    save_manifest(replace(pending.manifest, files=dict(sorted(files.items()))), part)
    sync(part)


def _nothing() -> list[Any]:
    """The share of a rank whose tensors others write."""
    return []


def _write_files(
    rank: int, buckets: list[Any], results: SaveResults, *, transforms: list[Any], part: str, parent: int | None
) -> None:
    """Write one rank's files and leave its RankFiles, or the reason why not, in `results`. In a forked process if `parent` is set.

    The first rank's process deletes the trash before: what is written next needs the room, and nobody waits for it.
    """
    if parent is not None:
        leave_signals_to_the_parent()
        die_with_the_parent(parent)
        gc.disable()  # collecting what belongs to the parent upsets CUDA
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
    """One file by megatron-core's writer, fsync included. Returns its record of every tensor in it."""
    answers: queue.Queue[Any] = queue.Queue()
    counts: queue.Queue[int] = queue.Queue()
    counts.put(0)
    FileSystemWriterAsync.write_preloaded_data(transforms, 0, bucket, answers, counts, use_fsync=True)
    _, outcome = answers.get_nowait()
    if isinstance(outcome, Exception):
        raise first_cause(outcome)
    written: list[Any] = outcome
    return written

"""The folder of a run: one launch at a time has it, and says in it what was started. All but the check is done by rank 0 alone."""

import errno
import fcntl
import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from megatron_ledom.checkpoint.folder import finished_checkpoints, latest_checkpoint
from megatron_ledom.config.derived import checkpoint_folder
from megatron_ledom.config.load import save_config
from megatron_ledom.config.schema import RunConfig
from megatron_ledom.data.blends.sources import RUN_TOKENIZER
from megatron_ledom.errors import FULL, NO_LOCKS, ConfigError, TransientError, UsageError, cannot_write
from megatron_ledom.platform.slurm import job_id
from megatron_ledom.storage.locks import this_process
from megatron_ledom.tokenizers.corpus_tokenizer import Tokenizer

log = logging.getLogger(__name__)

LOCK = "lock"
PATIENCE_SECONDS = 120.0
"""How long a launch waits for the one before: that may be saving still, or its node has died and the file server does not know
yet."""
POLL_SECONDS = 0.2


def check_writable(run_dir: str) -> None:
    """Refuse a run folder that could not be made or written to; makes nothing. Raises ConfigError."""
    nearest = os.path.abspath(run_dir)
    while not os.path.exists(nearest) and nearest != os.path.dirname(nearest):
        nearest = os.path.dirname(nearest)
    if not os.path.isdir(nearest):
        raise _not_writable(run_dir, f"{nearest} is no folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise _not_writable(run_dir, f"{nearest} is not yours to write to")


def _not_writable(run_dir: str, reason: str | None) -> ConfigError:
    return ConfigError(f"run_dir={run_dir} cannot be written ({reason}); name a folder you may write to")


@contextmanager
def lock_run(run_dir: str) -> Iterator[None]:
    """Inside, no other launch has this run folder, which is made if it is not there.

    Two launches of one run spoil each other's checkpoints. The lock is one of the kernel (POSIX), for `lock` in the folder, which
    says who has it. It is gone with this process, however that ends, and is not inherited by processes that this one starts.
    Raises UsageError when another launch has it for PATIENCE_SECONDS. A file system without locks is warned of.
    """
    path = os.path.join(run_dir, LOCK)
    try:
        os.makedirs(run_dir, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise _not_writable(run_dir, error.strerror) from error
    try:
        _wait_for(descriptor, run_dir)
        try:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{this_process(job_id(os.environ))}\n".encode(), 0)
        except OSError as error:
            raise cannot_write(error, path) from error
        yield
    finally:
        os.close(descriptor)  # and with it the lock


def _wait_for(descriptor: int, run_dir: str) -> None:
    end = None
    while not _take(descriptor):
        holder = os.pread(descriptor, 1000, 0).decode(errors="replace").strip() or "another process"
        if end is None:
            end = time.monotonic() + PATIENCE_SECONDS
            log.warning("run_dir=%s is in use by %s; waiting up to %.0f s for it to end", run_dir, holder, PATIENCE_SECONDS)
        if time.monotonic() >= end:
            raise UsageError(
                f"run_dir={run_dir} is in use by {holder}: two launches would spoil each other's checkpoints. Stop that one, or"
                f" set another run_dir; if it is gone with its node, delete {os.path.join(run_dir, LOCK)}"
            )
        time.sleep(POLL_SECONDS)


def _take(descriptor: int) -> bool:
    """Whether the lock is ours, or there are no locks here."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        if error.errno not in NO_LOCKS:
            raise
        log.warning("run_dir is on a file system without locks (%s): nothing hinders a second launch", error.strerror)
    return True


def check_still_latest(config: RunConfig, checkpoint: str | None) -> None:
    """Refuse to go on from a checkpoint that another launch has gone past before this one had the run folder.

    Raises TransientError: another start takes up the newer one.
    """
    latest = latest_checkpoint(checkpoint_folder(config))
    if latest != checkpoint:
        chosen = f"had chosen to go on from {checkpoint}" if checkpoint else "had found no checkpoint to go on from"
        found = f"another launch saved {latest}" if latest else "that has gone"
        raise TransientError(f"run_dir={config.run_dir}: this launch {chosen}, but {found} while it waited; start it again")


def warn_of_later_checkpoints(config: RunConfig, checkpoint: str | None) -> None:
    """Log which checkpoints lie behind the one, if any, that a run goes on from: it replaces them when it gets there."""
    if checkpoint is None:
        return
    done = int(os.path.basename(checkpoint).removeprefix("iter_"))
    later = [name for iteration, name in finished_checkpoints(checkpoint_folder(config)).items() if iteration > done]
    if later:
        log.warning(
            "the run goes on from %s, as `latest` says; it will replace what lies behind, %s: copy what you want to keep",
            os.path.basename(checkpoint),
            ", ".join(later),
        )


def write_start(config: RunConfig, tokenizer: Tokenizer | None, changed: list[str]) -> None:
    """Write the resolved config, a copy of the tokenizer, with eod as its eos, for the export, and into `data_changes.jsonl`,
    a line each start, what data.allow_changed_data let through."""
    try:
        if tokenizer is not None:
            tokenizer.save(os.path.join(config.run_dir, RUN_TOKENIZER))
        save_config(config, os.path.join(config.run_dir, "config.yaml"))
        if changed:
            with Path(config.run_dir, "data_changes.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps({"at": datetime.now(UTC).isoformat(timespec="seconds"), "changed": changed}) + "\n")
    except OSError as error:
        if error.errno in FULL:
            raise cannot_write(error, error.filename or config.run_dir) from error
        raise _not_writable(config.run_dir, error.strerror) from error

"""The folder of a run: one launch at a time has it, and says in it what was started. All but the check is done by rank 0 alone."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

from megatron_ledom.checkpoint.folder import finished_checkpoints, latest_checkpoint
from megatron_ledom.config.derived import checkpoint_folder
from megatron_ledom.config.load import save_config
from megatron_ledom.config.schema import RunConfig
from megatron_ledom.data.blends.sources import RUN_TOKENIZER
from megatron_ledom.errors import FULL, ConfigError, TransientError, cannot_write
from megatron_ledom.storage.locks import Lock, hold
from megatron_ledom.storage.records import append_record
from megatron_ledom.tokenizers.corpus_tokenizer import Tokenizer

log = logging.getLogger(__name__)

LOCK = "lock"
PATIENCE_SECONDS = 120.0
"""Time that a launch waits for the one before: that may be saving still, or its node has died and the file server does not know
yet."""


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

    Two launches of one run spoil each other's checkpoints. The lock is of this process alone, and is not inherited by those that it
    starts. Raises UsageError when another launch has it for PATIENCE_SECONDS. A file system without locks is warned of.
    """
    path = os.path.join(run_dir, LOCK)
    advice = (
        "two launches would spoil each other's checkpoints. Stop that one, or set another run_dir; if it is gone with its node,"
        f" delete {path}"
    )
    try:
        os.makedirs(run_dir, exist_ok=True)
    except OSError as error:
        raise _not_writable(run_dir, error.strerror) from error
    lock = Lock(path, is_inherited=False)
    with hold(lock, f"run_dir={run_dir}", advice, patience_seconds=PATIENCE_SECONDS, keep_file=True):
        yield


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
            record = {"at": datetime.now(UTC).isoformat(timespec="seconds"), "changed": changed}
            append_record(os.path.join(config.run_dir, "data_changes.jsonl"), record)
    except OSError as error:
        if error.errno in FULL:
            raise cannot_write(error, error.filename or config.run_dir) from error
        raise _not_writable(config.run_dir, error.strerror) from error

"""The folder of a run: its lock for one launch at a time, and the files of a start.

Only rank 0 calls these functions, except `check_writable`.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime

from megatron_ledom.checkpoint.folder import finished_checkpoints, latest_checkpoint
from megatron_ledom.config.derived import checkpoint_folder
from megatron_ledom.config.load import load_config, save_config
from megatron_ledom.config.schema import CheckpointConfig, RunConfig
from megatron_ledom.data.blends.sources import RUN_TOKENIZER
from megatron_ledom.errors import FULL, ConfigError, TransientError, cannot_write
from megatron_ledom.storage.locks import Lock, hold
from megatron_ledom.storage.records import append_record
from megatron_ledom.tokenizers.corpus_tokenizer import Tokenizer

log = logging.getLogger(__name__)

LOCK, RECORDED = "lock", "config.yaml"
PATIENCE_SECONDS = 120.0
"""Seconds that a launch waits for the previous one, which may still be saving, or whose node has died unnoticed by the file
server."""


def check_writable(run_dir: str) -> None:
    """Raise ConfigError if the run folder cannot be made or written to. Creates no files."""
    nearest = os.path.abspath(run_dir)
    while not os.path.exists(nearest) and nearest != os.path.dirname(nearest):
        nearest = os.path.dirname(nearest)
    if not os.path.isdir(nearest):
        raise _not_writable(run_dir, f"{nearest} is not a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise _not_writable(run_dir, f"you have no permission to write to {nearest}")


def _not_writable(run_dir: str, reason: str | None) -> ConfigError:
    return ConfigError(f"run_dir={run_dir} cannot be written ({reason}); name a folder you may write to")


@contextmanager
def lock_run(run_dir: str) -> Iterator[None]:
    """Lock the run folder for this launch inside the context; makes the folder if it does not exist.

    Two launches of one run would damage each other's checkpoints. Child processes do not inherit the lock. Raises UsageError
    if another launch holds the lock for PATIENCE_SECONDS. Logs a warning on a file system without locks.
    """
    path = os.path.join(run_dir, LOCK)
    advice = (
        "two launches would damage each other's checkpoints. Stop that one, or set another run_dir; if it ended with its node,"
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
    """Raise TransientError if another launch saved a newer checkpoint before this one locked the run folder.

    Another start then resumes from the newer one.
    """
    latest = latest_checkpoint(checkpoint_folder(config))
    if latest != checkpoint:
        chosen = f"was to resume from {checkpoint}" if checkpoint else "found no checkpoint to resume from"
        found = f"another launch saved {latest}" if latest else "that checkpoint was removed"
        raise TransientError(f"run_dir={config.run_dir}: this launch {chosen}, but {found} while it waited; start it again")


def warn_of_later_checkpoints(config: RunConfig, checkpoint: str | None) -> None:
    """Log a warning about checkpoints after the one from which the run resumes, because the run will replace them."""
    if checkpoint is None:
        return
    done = int(os.path.basename(checkpoint).removeprefix("iter_"))
    later = [name for iteration, name in finished_checkpoints(checkpoint_folder(config)).items() if iteration > done]
    if later:
        log.warning(
            "the run resumes from %s, as `latest` says; it will replace later checkpoints, %s: copy those you want to keep",
            os.path.basename(checkpoint),
            ", ".join(later),
        )


def as_recorded(config: RunConfig) -> RunConfig:
    """Return the config, but with checkpoint.keep_last=null if the run recorded that and the config has the default.

    Earlier versions kept all checkpoints by default: a new default must not delete those of a run that resumes. Call on every rank
    before `write_start`.
    """
    path, default = os.path.join(config.run_dir, RECORDED), CheckpointConfig().keep_last
    if config.checkpoint.keep_last != default or not os.path.isfile(path):
        return config
    kept_all = replace(config, checkpoint=replace(config.checkpoint, keep_last=None))
    try:
        if load_config(path).checkpoint.keep_last is not None:
            return config
    except ConfigError as error:
        log.warning(
            "the run may have kept all checkpoints, so all are kept further: %s. Set checkpoint.keep_last to choose", error
        )
        return kept_all
    log.warning(
        "this run has kept all checkpoints (checkpoint.keep_last=null in %s), and %d is only the default: all are kept further. Set"
        " checkpoint.keep_last=null to confirm it. To delete the older ones, set another number, or write keep_last: %d into that file",
        *(path, default, default),
    )
    return kept_all


def write_start(config: RunConfig, tokenizer: Tokenizer | None, changed: list[str]) -> None:
    """Write the resolved config and, for the export, a copy of the tokenizer with eod as its eos.

    Appends to `data_changes.jsonl` the changes that data.allow_changed_data accepted, one line per start.
    """
    try:
        if tokenizer is not None:
            tokenizer.save(os.path.join(config.run_dir, RUN_TOKENIZER))
        save_config(config, os.path.join(config.run_dir, RECORDED))
        if changed:
            record = {"at": datetime.now(UTC).isoformat(timespec="seconds"), "changed": changed}
            append_record(os.path.join(config.run_dir, "data_changes.jsonl"), record)
    except OSError as error:
        if error.errno in FULL:
            raise cannot_write(error, error.filename or config.run_dir) from error
        raise _not_writable(config.run_dir, error.strerror) from error

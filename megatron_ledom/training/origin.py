"""The checkpoint of another run with which a new run starts: `init_from` is found, checked and recorded.

The run folder has the record in `init_from.json` from the first start on, and every checkpoint of the run in its manifest: a list
of checkpoints, the oldest first, because the other run may itself have started from one. As soon as the run has a checkpoint of
its own, `init_from` is only compared with the record.
"""

import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path

from megatron_ledom.checkpoint.chain import describe_checkpoint
from megatron_ledom.checkpoint.folder import advising_another, find_checkpoint
from megatron_ledom.checkpoint.manifest import (
    ARCHITECTURE_KEYS,
    MANIFEST,
    ROTARY_KEYS,
    CheckpointManifest,
    check_architecture,
    check_optimizer_kind,
    check_sizes,
    load_manifest,
)
from megatron_ledom.config.schema import RunConfig
from megatron_ledom.direction import BOTH
from megatron_ledom.errors import ConfigError, DataError, MismatchError
from megatron_ledom.provenance import Provenance
from megatron_ledom.storage.files import write_json
from megatron_ledom.storage.jobs import differences
from megatron_ledom.storage.records import Record

log = logging.getLogger(__name__)

FILE = "init_from.json"
OTHERWISE = "start from another run with init_from"
TAKEN = {"weights": "the weights", "optimizer": "weights and optimizer state", "all": "weights, optimizer state and position"}
"""Value of init_state -> what a run takes, in words."""
WITH_ORIGINAL = ("llama3", "yarn")
"""Values of model.rope_scaling that use rope_scaling_original_max_position."""


@dataclass(frozen=True, slots=True)
class Origin:
    """The checkpoint of another run from which a run starts."""

    checkpoint: str
    """Its folder."""
    manifest: CheckpointManifest
    state: str
    """Value of `init_state`."""
    chain: list[Record]
    """Records of this checkpoint, last, and of those from which its own run started."""

    def describe(self) -> str:
        """Return a text such as `the weights of runs/base/checkpoints/iter_0001000`."""
        return f"{TAKEN[self.state]} of {self.checkpoint}"


def find_origin(config: RunConfig, provenance: Provenance, checkpoint: str | None) -> Origin | None:
    """Return the checkpoint to start from; None if the run starts from scratch, or resumes from its own `checkpoint`.

    provenance: that of the run's data. Everything but the sha256 of the files is checked. Raises MismatchError if the
    checkpoint does not fit the run or `init_from` is not that of the first start, UsageError if there is no such checkpoint.
    """
    recorded = _recorded(config, checkpoint)
    _compare_origin(config, recorded, checkpoint)
    if checkpoint is not None or config.init_from is None:
        return None
    where = recorded[-1]["path"] if recorded else find_checkpoint(config.init_from)
    if _run_of(where) == os.path.realpath(config.run_dir):
        raise ConfigError(f"init_from={config.init_from} is in run_dir={config.run_dir} itself; name another run")
    manifest = check_sizes(where)
    chain = [*manifest.started_from, describe_checkpoint(where, manifest, config.init_from, config.init_state)]
    if recorded and recorded[-1]["manifest_sha256"] != chain[-1]["manifest_sha256"]:
        raise MismatchError(
            f"{where} is not the checkpoint from which run_dir={config.run_dir} has started: the sha256 of its {MANIFEST} is another"
            " one. Restore it, or use another run_dir for a new run"
        )
    if manifest.weights_only and config.init_state != "weights":
        raise MismatchError(f"{where} has imported or averaged weights and no optimizer state; set init_state=weights")
    check_continues(manifest.iteration, config, where)
    check_follows(
        manifest.run_config(where), config, where, is_trained=not manifest.weights_only or manifest.average is not None
    )
    manifest.provenance.check_same(provenance, f"the checkpoint {where}", "this run's data")
    return Origin(where, manifest, config.init_state, chain)


def _recorded(config: RunConfig, checkpoint: str | None) -> list[Record]:
    """Return the checkpoints from which the run has started, as its own latest `checkpoint` or its folder records them."""
    if checkpoint is None:
        return read_chain(config.run_dir)
    with advising_another(checkpoint):
        return load_manifest(checkpoint).started_from


def check_same_origin(config: RunConfig, checkpoint: str | None) -> None:
    """Raise MismatchError if the run has started from another checkpoint than `init_from`. `checkpoint`: its own latest."""
    _compare_origin(config, _recorded(config, checkpoint), checkpoint)


def _compare_origin(config: RunConfig, recorded: list[Record], checkpoint: str | None) -> None:
    """Do `check_same_origin`. Without `init_from`, a run with its own checkpoint resumes."""
    has_started = checkpoint is not None or bool(recorded)
    if not has_started or (config.init_from is None and checkpoint is not None):
        return
    last = recorded[-1] if recorded else {}
    given = None if config.init_from is None else os.path.abspath(config.init_from)
    known = {last.get("path"), last["init_from"] and os.path.abspath(last["init_from"])} if last else {None}
    same_place = given in known or config.init_from == last.get("init_from")
    if same_place and config.init_state == last.get("init_state", config.init_state):
        return
    began = (
        f"from init_from={last['init_from']} ({last['path']}) with init_state={last['init_state']}"
        if last
        else "without init_from"
    )
    raise MismatchError(
        f"init_from={config.init_from} and init_state={config.init_state}, but run_dir={config.run_dir} has started {began}; restore"
        " that, or use another run_dir for a new run"
    )


def check_follows(before: RunConfig, config: RunConfig, where: str, *, is_trained: bool = True) -> None:
    """Refuse a run that cannot start from a run of the config `before`; log changes of its rotary positions.

    where: the name of that run or its checkpoint. is_trained: False for imported weights, whose config does not record the
    length of their training. Raises MismatchError or ConfigError.
    """
    kept = [key for key in ARCHITECTURE_KEYS if key not in ROTARY_KEYS]
    check_architecture(before, config, where, kept, OTHERWISE)
    if before.data.direction != config.data.direction:
        kind = "two-way" if before.data.direction == BOTH else before.data.direction
        raise MismatchError(
            f"{where} is a {kind} model, but data.direction={config.data.direction}; use data of its direction, or {OTHERWISE}"
        )
    if config.init_state != "weights":
        check_optimizer_kind(before, config, where, f"{OTHERWISE}, or set init_state=weights")
    _check_context(before, config, where, is_trained=is_trained)


def check_continues(iteration: int, config: RunConfig, where: str) -> None:
    """Raise ConfigError if a run that continues at an iteration of another one would have no iteration to do."""
    if config.init_state == "all" and iteration >= config.train.train_iters:
        raise ConfigError(
            f"init_state=all continues {where} at iteration {iteration:,}, but train.train_iters={config.train.train_iters} counts from its"
            " beginning too; set it higher, or init_state=optimizer to count from 0"
        )


def _check_context(before: RunConfig, config: RunConfig, where: str, *, is_trained: bool) -> None:
    """Check that the rotary settings of a longer context follow from those of the run before."""
    old, new = before.model, config.model
    changes = differences(
        {key: getattr(old, key) for key in ROTARY_KEYS}, {key: getattr(new, key) for key in ROTARY_KEYS}, "model."
    )
    for change in changes:
        log.info("rotary positions differ from those of %s: %s", where, change)
    first = old.rope_scaling_original_max_position if old.rope_scaling in WITH_ORIGINAL else before.data.seq_length
    first_is_known = is_trained and old.rope_scaling != "linear"
    if changes and first_is_known and new.rope_scaling in WITH_ORIGINAL and new.rope_scaling_original_max_position != first:
        raise MismatchError(
            f"model.rope_scaling_original_max_position={new.rope_scaling_original_max_position}, but the first training of {where} had"
            f" {first} positions; set it to {first}"
        )
    length, longest = config.data.seq_length, int(first * new.rope_scaling_factor)
    if new.rope_scaling in ("linear", "yarn") and changes and first_is_known and length > longest:
        raise MismatchError(
            f"data.seq_length={length} is above model.rope_scaling_factor={new.rope_scaling_factor:g} x {first} positions, the length of"
            f" the first training of {where}; set the factor to at least {length / first:g}"
        )
    if not changes and length > max(before.data.seq_length, longest if new.rope_scaling else 0):
        log.warning(
            "data.seq_length=%d, but %s had %d, and the rotary settings are the same: the model has seen no later positions. Most"
            " models need a higher model.rotary_base or model.rope_scaling for them",
            length,
            where,
            before.data.seq_length,
        )


def write_chain(config: RunConfig, origin: Origin | None) -> None:
    """Record in the run folder from which checkpoint the run starts. Call on rank 0, after it has locked the run folder."""
    if origin is not None:
        write_json(os.path.join(config.run_dir, FILE), origin.chain)


def read_chain(run_dir: str) -> list[Record]:
    """Return the checkpoints from which a run started, the oldest first; [] for none. Raises DataError for a damaged file."""
    path = Path(run_dir, FILE)
    try:
        chain = json.loads(path.read_bytes())
        for record in chain:
            checked = (record["path"], record["init_from"], record["init_state"], record["manifest_sha256"])
            numbers = (record["iteration"], record["consumed_train_tokens"])
            if record["init_state"] not in TAKEN or set(map(type, checked)) != {str} or set(map(type, numbers)) != {int}:
                raise ValueError("a value has another type")
        return list(chain)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise DataError(
            f"{path} is damaged ({error}), so the checkpoint with which this run started is not known; restore it from the"
            f" `started_from` in the {MANIFEST} of a checkpoint of this run, or use another run_dir"
        ) from error


def first_iteration(config: RunConfig) -> int:
    """Return the iteration with which a run began: 0, or that of the checkpoint from which it has started with its position."""
    chain = read_chain(config.run_dir)
    return int(chain[-1]["iteration"]) if chain and chain[-1]["init_state"] == "all" else 0


def _run_of(checkpoint: str) -> str:
    """Return the real path of the run folder of a checkpoint."""
    return os.path.dirname(os.path.dirname(os.path.realpath(checkpoint)))

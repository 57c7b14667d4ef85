"""The manifest of a checkpoint, `manifest.json`, which is written last, and the checks before a run loads it."""

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

import megatron_ledom
from megatron_ledom.config.batch_schedule import batch_phases, iterations_for, largest_batch
from megatron_ledom.config.derived import head_dim, query_groups
from megatron_ledom.config.load import config_from_dict, to_dict
from megatron_ledom.config.schema import ModelConfig, RunConfig
from megatron_ledom.errors import ConfigError, DataError, MismatchError
from megatron_ledom.provenance import Provenance
from megatron_ledom.storage.files import write_synced
from megatron_ledom.storage.hashes import FileSums, refuse_damaged, size_problems
from megatron_ledom.storage.jobs import differences

log = logging.getLogger(__name__)

FORMAT_VERSION = 2
WITH_READINGS = 3
"""The format of a run with another unit than token or with markers, which earlier versions of this package refuse."""
WITHOUT_CHECKSUMS = 1
"""The previous format, without `files`, `world_size` and the hash of the manifest. It can still be loaded."""
MANIFEST = "manifest.json"
OWN_HASH = "sha256_of_the_rest"
ARCHITECTURE_KEYS = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "make_vocab_size_divisible_by",
    "rotary_base",
    "rope_scaling",
    "rope_scaling_factor",
    "rope_scaling_original_max_position",
    "rope_scaling_low_freq_factor",
    "rope_scaling_high_freq_factor",
    "rope_scaling_beta_fast",
    "rope_scaling_beta_slow",
    "rope_scaling_attention_factor",
    "add_qkv_bias",
    "qk_layernorm",
    "layernorm_epsilon",
    "share_embeddings_and_output_weights",
    "params_dtype",
    "mtp_num_layers",
)
"""Keys of `model` that must be the same in a checkpoint and in the run that loads it."""
ROTARY_KEYS = tuple(key for key in ARCHITECTURE_KEYS if key.startswith(("rotary_", "rope_")))
"""Those that a run may change when it starts from the weights of another run, because no weight depends on them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointManifest:
    """State of a run at one iteration: position, provenance of the ids, and the whole config."""

    iteration: int
    consumed_train_samples: int
    consumed_train_tokens: int
    provenance: Provenance
    config: dict[str, Any]
    train_shards: list[list[Any]]
    """[fraction of the samples, sha256 of .bin, sha256 of .idx, first document, last document + 1, prefix] per shard."""
    world_size: int | None
    """Number of ranks that wrote the checkpoint; None in the previous format."""
    package_version: str
    created_at: str
    files: FileSums = field(default_factory=dict)
    """Size and sha256 of every other file, added when all are written. Empty in the previous format."""
    weights_only: bool = False
    """True for imported and averaged weights, which have no optimizer state."""
    average: dict[str, Any] | None = None
    """For averaged weights: the method, and iteration, share and manifest hash of each checkpoint (see `convert.average`)."""
    started_from: list[dict[str, Any]] = field(default_factory=list)
    """The checkpoints of other runs that this run started from by `init_from`, the oldest first (see training/origin.py)."""
    teacher: dict[str, Any] | None = None
    """With `train.auxiliary.kind`: width and hash of the weights of the teacher (see megatron_ledom/reverse_teacher.py)."""
    format_version: int = FORMAT_VERSION

    @classmethod
    def describe(
        cls,
        config: RunConfig,
        provenance: Provenance,
        train_shards: list[list[Any]],
        world_size: int,
        started_from: Sequence[dict[str, Any]] = (),
        *,
        teacher: dict[str, Any] | None = None,
        **position: int,
    ) -> "CheckpointManifest":
        """Return the manifest of the current state of a run, without the files."""
        return cls(
            iteration=position["iteration"],
            consumed_train_samples=position["consumed_train_samples"],
            consumed_train_tokens=position["consumed_train_tokens"],
            provenance=provenance,
            config=to_dict(config),
            train_shards=train_shards,
            world_size=world_size,
            package_version=megatron_ledom.__version__,
            created_at=datetime.now(UTC).isoformat(timespec="seconds"),
            started_from=list(started_from),
            teacher=teacher,
        )

    @property
    def has_ema(self) -> bool:
        """Return True if the checkpoint has a moving average of its weights."""
        return not self.weights_only and self.config.get("optimizer", {}).get("ema_decay") is not None

    def run_config(self, where: str) -> RunConfig:
        """Return the config with which the checkpoint was trained. `where` names the checkpoint in errors."""
        return config_from_dict(self.config, where)


def save_manifest(manifest: CheckpointManifest, folder: str) -> None:
    """Write `manifest.json` into the checkpoint folder, with its own hash."""
    values = {**asdict(manifest), "provenance": None, **manifest.provenance.to_dict()}
    del values["provenance"]
    values["format_version"] = FORMAT_VERSION if manifest.provenance.is_plain else WITH_READINGS
    for key in ("average", "teacher"):
        if values[key] is None:
            del values[key]
    content = json.dumps({**values, OWN_HASH: _hash(values)}, indent=2, allow_nan=False)
    write_synced(os.path.join(folder, MANIFEST), content.encode())


def load_manifest(folder: str) -> CheckpointManifest:
    """Read and check `manifest.json`. Raises DataError if it is missing, malformed, changed or of an unknown format."""
    path = os.path.join(folder, MANIFEST)
    values = _read_json(folder, path)
    version = values.get("format_version")
    if version == WITHOUT_CHECKSUMS:
        values |= {"world_size": None, "files": {}}
    elif version not in (FORMAT_VERSION, WITH_READINGS):
        raise DataError(
            f"{path} has format version {version}, but this package reads up to {WITH_READINGS}; update the package"
        )
    elif values.pop(OWN_HASH, None) != _hash(values):
        raise DataError(
            f"{path} was changed after it was written: its sha256 differs; the checkpoint is damaged, use an earlier one"
        )
    values.setdefault("weights_only", False)  # older checkpoints were never weights only
    values.setdefault("started_from", [])
    values.setdefault("average", None)
    values.setdefault("teacher", None)
    provenance = Provenance.from_dict(values, path)
    names = [name for name in CheckpointManifest.__dataclass_fields__ if name != "provenance"]
    missing = [name for name in names if name not in values]
    if missing:
        raise DataError(f"{path} lacks {', '.join(missing)}; the checkpoint is damaged, use an earlier one")
    return CheckpointManifest(provenance=provenance, **{name: values[name] for name in names})


def check_sizes(checkpoint: str) -> CheckpointManifest:
    """Return the manifest of a checkpoint. Raises DataError with the files that are missing or have another size."""
    manifest = load_manifest(checkpoint)
    if not manifest.files:
        log.warning("%s was written by a version without checksums: its files cannot be checked", checkpoint)
    refuse_damaged(checkpoint, size_problems(checkpoint, manifest.files))
    return manifest


def _read_json(folder: str, path: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            values = json.load(file)
    except FileNotFoundError as error:
        raise DataError(
            f"{folder} has no {MANIFEST}: it is not a finished checkpoint; give a folder such as RUN/checkpoints/iter_0001000"
        ) from error
    except IsADirectoryError as error:
        raise DataError(f"{path} is a folder, not a file; the checkpoint is damaged, use an earlier one") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON ({error}); the checkpoint is damaged, use an earlier one") from error
    if not isinstance(values, dict):
        raise DataError(f"{path} contains no JSON object; the checkpoint is damaged, use an earlier one")
    return values


def _hash(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def check_fits(manifest: CheckpointManifest, config: RunConfig, provenance: Provenance, where: str) -> None:
    """Raise MismatchError if architecture, optimizer, direction or tokenizer of the checkpoint differ from those of the run."""
    trained, otherwise = manifest.run_config(where), "another run_dir for a new run"
    check_architecture(trained, config, where, ARCHITECTURE_KEYS, otherwise)
    if not manifest.weights_only:
        check_optimizer_kind(trained, config, where, f"{otherwise}, which may begin with these weights")
    manifest.provenance.check_same(provenance, f"the checkpoint {where}", "this run's data")


def check_architecture(trained: RunConfig, config: RunConfig, where: str, keys: Sequence[str], otherwise: str) -> None:
    """Raise MismatchError if one of these keys of `model` differs. `otherwise` is what a user can use in place of its value."""
    if different := other_architecture(trained.model, config.model, keys):
        raise MismatchError(f"{where} has another architecture: {'; '.join(different)}; use its values, or {otherwise}")


def check_optimizer_kind(trained: RunConfig, config: RunConfig, where: str, otherwise: str) -> None:
    """Raise MismatchError if the run has not the kind of optimizer whose state the checkpoint has."""
    if trained.optimizer.optimizer != config.optimizer.optimizer:
        raise MismatchError(
            f"{where} has the state of optimizer.optimizer={trained.optimizer.optimizer}, which {config.optimizer.optimizer} cannot"
            f" load; set optimizer.optimizer={trained.optimizer.optimizer}, or {otherwise}"
        )
    is_distributed = trained.parallel.use_distributed_optimizer
    if is_distributed != config.parallel.use_distributed_optimizer:
        raise MismatchError(
            f"{where} has the state of {'a distributed' if is_distributed else 'an ordinary'} optimizer, which the other kind"
            f" cannot load; set parallel.use_distributed_optimizer={str(is_distributed).lower()}, or {otherwise}"
        )


def check_same_samples(manifest: CheckpointManifest, config: RunConfig, train_shards: list[list[Any]], where: str) -> list[str]:
    """Check that a resumed run draws the same samples as before. Raises MismatchError if it does not.

    With `data.allow_changed_data`, log a warning instead and return the changes. Imported weights have consumed no samples, so
    they are not checked. Raises ConfigError for a changed value that can have no effect any more, and for a checkpoint after
    `train.train_iters`.
    """
    if manifest.weights_only:
        return []
    trained = manifest.run_config(where)
    pairs = [
        ("data.seq_length", trained.data.seq_length, config.data.seq_length),
        ("train.seed", trained.train.seed, config.train.seed),
    ]
    changed = differences({key: old for key, old, _ in pairs}, {key: new for key, _, new in pairs})
    changed += _changed_shards(manifest.train_shards, train_shards)
    if changed and not config.data.allow_changed_data:
        raise MismatchError(
            f"{where} cannot resume with other samples: {'; '.join(changed)}; samples would be repeated or skipped silently:"
            " restore the old values, use another run_dir for a new run, or allow the change with data.allow_changed_data=true"
        )
    for change in changed:
        log.warning("OTHER TRAINING DATA than in %s, allowed by data.allow_changed_data=true: %s", where, change)
    counted = manifest.consumed_train_samples * config.data.seq_length
    if manifest.consumed_train_tokens != counted and config.train.batch_size_schedule is not None:
        raise ConfigError(
            f"the run has consumed {manifest.consumed_train_tokens:,} tokens in {manifest.consumed_train_samples:,} samples, not all of"
            f" data.seq_length={config.data.seq_length}, so train.batch_size_schedule would count the tokens up to {where} wrongly; remove the"
            " schedule, restore the length, or use another run_dir for a new run"
        )
    _check_still_decidable(manifest, trained, config, where)
    if manifest.iteration > config.train.train_iters:
        raise ConfigError(
            f"{where} is at iteration {manifest.iteration:,}, after the end train.train_iters={config.train.train_iters}; set it to"
            f" at least {manifest.iteration}"
        )
    _check_tokens_to_draw(manifest, config, where)
    return changed


def _check_tokens_to_draw(manifest: CheckpointManifest, config: RunConfig, where: str) -> None:
    """Raise ConfigError if a blend in tokens lists other tokens than the run will have drawn at its end, because its batch size was changed.

    The rule of `config/batch_checks.py` counts as if it never was.
    """
    data, consumed = config.data, manifest.consumed_train_samples
    if data.blend_unit != "tokens":
        return
    listed = sum(tokens for tokens, *_ in data.train_blend)
    drawn = manifest.consumed_train_tokens + (samples_at_end(manifest, config) - consumed) * data.seq_length
    if abs(listed - drawn) < largest_batch(config) * data.seq_length:
        return
    left = int((listed - manifest.consumed_train_tokens) // data.seq_length)
    fitting = iterations_for(config, consumed + left, iteration=manifest.iteration, consumed_samples=consumed)
    raise ConfigError(
        f"the numbers of data.train_blend add up to {listed:,.0f} tokens, but the run will have drawn {drawn:,} at train.train_iters="
        f"{config.train.train_iters}: {manifest.consumed_train_tokens:,} up to {where}, with other batch sizes than now. Restore them, or set"
        f" data.blend_unit=weight, which draws in the same proportions, and train.train_iters={fitting}"
    )


def _check_still_decidable(manifest: CheckpointManifest, trained: RunConfig, config: RunConfig, where: str) -> None:
    """Raise ConfigError for a changed value that has no effect on a resumed run."""
    done = sorted(
        iteration
        for iteration in set(config.train.skip_iterations).difference(trained.train.skip_iterations)
        if iteration <= manifest.iteration
    )
    if done:
        raise ConfigError(
            f"train.skip_iterations names {', '.join(map(str, done))}, but {where} has already done the iterations up to"
            f" {manifest.iteration}: remove them from the list, or resume from an earlier checkpoint by writing its name into the"
            " file `latest` next to it"
        )
    old, new = trained.model.init_method_std, config.model.init_method_std
    if old != new:
        raise ConfigError(
            f"model.init_method_std was {old} and is now {new}, but the weights of {where} are already initialized: restore the old value,"
            " or use another run_dir for a new run"
        )


def samples_at_end(manifest: CheckpointManifest, config: RunConfig) -> int:
    """Return the number of samples that a resumed run will have consumed at its end, with its current batch sizes."""
    consumed = manifest.consumed_train_samples
    phases = batch_phases(config, iteration=manifest.iteration, consumed_samples=consumed)
    return consumed + sum(phase.num_samples for phase in phases)


def _changed_shards(old: list[list[Any]], new: list[list[Any]]) -> list[str]:
    """Return the first difference between two blends, and the number of others; there may be thousands of shards."""
    if len(old) != len(new):
        return [f"data.train_blend had {len(old)} shards, has {len(new)}"]
    names = ("fraction of the samples", "content (sha256 of .bin)", "index (sha256 of .idx)", "first document", "last document")
    different = [(one, other) for one, other in zip(old, new, strict=True) if one[: len(names)] != other[: len(names)]]
    if not different:
        return []
    one, other = different[0]
    kinds = differences(dict(zip(names, one, strict=False)), dict(zip(names, other, strict=False)))
    more = f" (and {len(different) - 1} more)" if len(different) > 1 else ""
    return [f"data.train_blend: the shard {other[-1]}, in place of {one[-1]}: {', '.join(kinds)}{more}"]


def other_architecture(stored: ModelConfig, wanted: ModelConfig, keys: Sequence[str] = ARCHITECTURE_KEYS) -> list[str]:
    """Return a text for each of these keys of the architecture in which a checkpoint differs from the wanted model."""
    found, expected = _architecture(stored), _architecture(wanted)
    return [f"model.{key}={expected[key]} but the checkpoint has {found[key]}" for key in keys if found[key] != expected[key]]


def _architecture(model: ModelConfig) -> dict[str, Any]:
    """Return the values of ARCHITECTURE_KEYS, with defaults filled in."""
    values = {key: getattr(model, key) for key in ARCHITECTURE_KEYS}
    return {**values, "num_query_groups": query_groups(model), "kv_channels": head_dim(model)}

"""What a checkpoint says of itself: `manifest.json`, written last. It decides whether a run or a conversion may load it."""

import hashlib
import json
import logging
import os
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

import megatron_ledom
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
WITHOUT_CHECKSUMS = 1
"""The format before: no `files`, no `world_size`, no hash of the manifest. Such checkpoints still load."""
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
)
"""Keys of `model` that a checkpoint fixes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointManifest:
    """Position, meaning of the ids and the whole config of the run at one iteration."""

    iteration: int
    consumed_train_samples: int
    consumed_train_tokens: int
    provenance: Provenance
    config: dict[str, Any]
    train_shards: list[list[Any]]
    """[share of the samples, sha256 of .bin, of .idx, first document, behind the last, prefix] of each training shard."""
    world_size: int | None
    """Ranks that wrote it; None in a checkpoint of the format before."""
    package_version: str
    created_at: str
    files: FileSums = field(default_factory=dict)
    """Size and sha256 of every other file; filled in when all are written. Empty in a checkpoint of the format before."""
    weights_only: bool = False
    """Imported weights without optimizer state, which a run begins with."""
    format_version: int = FORMAT_VERSION

    @classmethod
    def describe(
        cls, config: RunConfig, provenance: Provenance, train_shards: list[list[Any]], world_size: int, **position: int
    ) -> "CheckpointManifest":
        """The manifest of a run's present state, without the files."""
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
        )

    def run_config(self, where: str) -> RunConfig:
        """The config that the checkpoint was trained with."""
        return config_from_dict(self.config, where)


def save_manifest(manifest: CheckpointManifest, folder: str) -> None:
    """Write `manifest.json` into the checkpoint folder, with its own hash."""
    values = {**asdict(manifest), "provenance": None, **manifest.provenance.to_dict()}
    del values["provenance"]
    content = json.dumps({**values, OWN_HASH: _hash(values)}, indent=2, allow_nan=False)
    write_synced(os.path.join(folder, MANIFEST), content.encode())


def load_manifest(folder: str) -> CheckpointManifest:
    """Read and check `manifest.json`. Raises DataError when it is missing, malformed, changed or of another format."""
    path = os.path.join(folder, MANIFEST)
    values = _read_json(folder, path)
    version = values.get("format_version")
    if version == WITHOUT_CHECKSUMS:
        values |= {"world_size": None, "files": {}}
    elif version != FORMAT_VERSION:
        raise DataError(f"{path} has format version {version}, this package reads {FORMAT_VERSION}; update it")
    elif values.pop(OWN_HASH, None) != _hash(values):
        raise DataError(
            f"{path} is not as it was written: its sha256 is another; the checkpoint is damaged, use an earlier one"
        )
    values.setdefault("weights_only", False)  # written before there were others
    provenance = Provenance.from_dict(values, path)
    names = [name for name in CheckpointManifest.__dataclass_fields__ if name != "provenance"]
    missing = [name for name in names if name not in values]
    if missing:
        raise DataError(f"{path} lacks {', '.join(missing)}; the checkpoint is damaged, use an earlier one")
    return CheckpointManifest(provenance=provenance, **{name: values[name] for name in names})


def check_sizes(checkpoint: str) -> CheckpointManifest:
    """The manifest of a checkpoint whose files are all there in full length. Raises DataError that names those which are not."""
    manifest = load_manifest(checkpoint)
    if not manifest.files:
        log.warning("%s was written before checkpoints had checksums: its files cannot be checked", checkpoint)
    refuse_damaged(checkpoint, size_problems(checkpoint, manifest.files))
    return manifest


def _read_json(folder: str, path: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            values = json.load(file)
    except FileNotFoundError as error:
        raise DataError(
            f"{folder} has no {MANIFEST}: it is no finished checkpoint; name a folder such as RUN/checkpoints/iter_0001000"
        ) from error
    except IsADirectoryError as error:
        raise DataError(f"{path} is a folder, not a file; the checkpoint is damaged, use an earlier one") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON ({error}); the checkpoint is damaged, use an earlier one") from error
    if not isinstance(values, dict):
        raise DataError(f"{path} holds no object; the checkpoint is damaged, use an earlier one")
    return values


def _hash(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def check_fits(manifest: CheckpointManifest, config: RunConfig, provenance: Provenance, where: str) -> None:
    """Refuse a checkpoint of another architecture, direction or tokenizer than the run's. Raises MismatchError."""
    trained = manifest.run_config(where)
    stored, wanted = _architecture(trained.model), _architecture(config.model)
    different = [
        f"model.{key}={wanted[key]} but the checkpoint has {stored[key]}"
        for key in ARCHITECTURE_KEYS
        if stored[key] != wanted[key]
    ]
    if different:
        raise MismatchError(
            f"{where} is of another architecture: {'; '.join(different)}; use its values, or another run_dir for a new run"
        )
    is_spread = trained.parallel.use_distributed_optimizer
    if is_spread != config.parallel.use_distributed_optimizer and not manifest.weights_only:
        raise MismatchError(
            f"{where} holds the state of {'a distributed' if is_spread else 'an ordinary'} optimizer, which the other kind"
            f" cannot take up; set parallel.use_distributed_optimizer={str(is_spread).lower()}, or another run_dir for a new run"
        )
    manifest.provenance.check_same(provenance, f"the checkpoint {where}", "this run's data")


def check_same_samples(manifest: CheckpointManifest, config: RunConfig, train_shards: list[list[Any]], where: str) -> list[str]:
    """Refuse to go on where the samples already consumed would not be those that this run counts. Raises MismatchError.

    With `data.allow_changed_data` it warns instead, and returns what has changed. Imported weights have consumed nothing.
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
            f"{where} cannot go on with other samples: {'; '.join(changed)}; samples would be repeated or left out without a"
            " word: restore the old values, use another run_dir for a new run, or go on all the same with"
            " data.allow_changed_data=true"
        )
    for change in changed:
        log.warning("OTHER TRAINING DATA than that of %s, by data.allow_changed_data=true: %s", where, change)
    _check_still_decidable(manifest, trained, config, where)
    if manifest.iteration > config.train.train_iters:
        raise ConfigError(
            f"{where} is of iteration {manifest.iteration:,}, train.train_iters={config.train.train_iters} ends before; set it to at"
            f" least {manifest.iteration}"
        )
    return changed


def _check_still_decidable(manifest: CheckpointManifest, trained: RunConfig, config: RunConfig, where: str) -> None:
    """Refuse a changed value that could have no effect any more. Raises ConfigError."""
    done = sorted(
        iteration
        for iteration in set(config.train.skip_iterations).difference(trained.train.skip_iterations)
        if iteration <= manifest.iteration
    )
    if done:
        raise ConfigError(
            f"train.skip_iterations names {', '.join(map(str, done))}, but {where} has done iterations up to {manifest.iteration},"
            " those too: take them out of the list, or go on from a checkpoint before them, to which the file `latest` beside it"
            " has to point"
        )
    old, new = trained.model.init_method_std, config.model.init_method_std
    if old != new:
        raise ConfigError(
            f"model.init_method_std was {old} and is {new}, but the weights of {where} are initialized already: restore the old value,"
            " or use another run_dir for a new run"
        )


def planned_samples(manifest: CheckpointManifest, config: RunConfig) -> int:
    """Samples that a run which goes on from a checkpoint will have consumed at its end, the batch size changed or not."""
    left = max(0, config.train.train_iters - manifest.iteration)
    return manifest.consumed_train_samples + left * config.train.global_batch_size


def _changed_shards(old: list[list[Any]], new: list[list[Any]]) -> list[str]:
    """What differs between two blends, the first difference in words: there may be thousands of shards."""
    if len(old) != len(new):
        return [f"data.train_blend had {len(old)} shards, has {len(new)}"]
    names = ("share of the samples", "content (sha256 of .bin)", "index (sha256 of .idx)", "first document", "last document")
    different = [(one, other) for one, other in zip(old, new, strict=True) if one[: len(names)] != other[: len(names)]]
    if not different:
        return []
    one, other = different[0]
    kinds = differences(dict(zip(names, one, strict=False)), dict(zip(names, other, strict=False)))
    more = f" (and {len(different) - 1} more)" if len(different) > 1 else ""
    return [f"data.train_blend: the shard {other[-1]}, where {one[-1]} was: {', '.join(kinds)}{more}"]


def _architecture(model: ModelConfig) -> dict[str, Any]:
    """The values of ARCHITECTURE_KEYS; a default left out equals the same number spelled out."""
    values = {key: getattr(model, key) for key in ARCHITECTURE_KEYS}
    return {**values, "num_query_groups": query_groups(model), "kv_channels": head_dim(model)}

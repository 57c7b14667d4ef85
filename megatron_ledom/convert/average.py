"""Average checkpoints into a new run folder: choose and check them, average and verify them at once, rename the folder.

The result is iteration 0 of a new run, as after an import: its weights export, and any layout trains on from them with a new optimizer.
"""

import json
import logging
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_ledom.checkpoint.averaging import AveragedWeights
from megatron_ledom.checkpoint.chain import describe_checkpoint, run_name, tokens_before
from megatron_ledom.checkpoint.folder import (
    LATEST,
    checkpoint_name,
    find_checkpoint,
    finished_checkpoints,
    latest_checkpoint,
    own_checkpoints,
)
from megatron_ledom.checkpoint.manifest import MANIFEST, CheckpointManifest, check_sizes, load_manifest, other_architecture
from megatron_ledom.checkpoint.stored_tensors import StoredTensors
from megatron_ledom.checkpoint.weights_only import save_weights
from megatron_ledom.config.derived import checkpoint_folder
from megatron_ledom.config.schema import ParallelConfig, RunConfig
from megatron_ledom.convert.hf_export import SHARD_BYTES, WeightsKind, versions
from megatron_ledom.convert.hf_folder import TOKENIZER, run_tokenizer
from megatron_ledom.convert.hf_import import MODEL_YAML, model_yaml
from megatron_ledom.errors import DataError, MismatchError, UsageError
from megatron_ledom.storage.files import PART_SUFFIX
from megatron_ledom.storage.folders import new_folder
from megatron_ledom.storage.hashed_file import one_thread
from megatron_ledom.storage.hashes import content_problems, refuse_damaged, sha256_of
from megatron_ledom.storage.records import Record
from megatron_ledom.tokenizers.corpus_tokenizer import load_tokenizer

log = logging.getLogger(__name__)

CARD = "average.json"


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint to average, and its factor; the factors need not add up to 1."""

    checkpoint: str
    manifest: CheckpointManifest
    factor: float


def average_checkpoints(
    load: Sequence[str],
    save: str,
    *,
    last: int | None = None,
    iterations: Sequence[int] = (),
    decay: float | None = None,
    factors: Sequence[float] = (),
    weights: WeightsKind = "main",
    max_shard_size: int = SHARD_BYTES,
) -> CheckpointManifest:
    """Average checkpoints into the new run folder `save`. Returns the manifest of the result.

    load: a run folder, of which `last` or `iterations` choose checkpoints; or checkpoints of any runs. Uniform by default; with
    `decay` the newest has factor 1 and each earlier one `decay` times that of the next; `factors` gives one for each checkpoint. weights:
    `ema` averages the moving averages of `optimizer.ema_decay`. Files have at most `max_shard_size` bytes unless a tensor is larger.
    """
    if factors and list(iterations) != sorted(iterations):
        raise UsageError(
            f"--factors belong to iterations in ascending order, but --iterations has {' '.join(map(str, iterations))}"
        )
    checkpoints = choose_checkpoints(load, last, iterations)
    sources = _check_sources(checkpoints, _factors(len(checkpoints), decay, factors))
    newest = sources[-1]
    averaged = AveragedWeights(
        [StoredTensors(one.checkpoint) for one in sources], [one.factor for one in sources], ema=weights == "ema"
    )
    config = _run_config(newest, save)
    position = {"iteration": 0, "consumed_train_samples": 0, "consumed_train_tokens": 0}
    manifest = replace(
        CheckpointManifest.describe(
            config, newest.manifest.provenance, [], 1, _chain_of(newest), teacher=newest.manifest.teacher, **position
        ),
        average=_record(sources, _method(decay, factors), weights),
    )
    folder = os.path.relpath(checkpoint_folder(config), save)
    latest = os.path.join(folder, LATEST)
    with new_folder(save, latest) as part, one_thread() as hashing:
        hashed = _begin_verification(sources, hashing)
        checkpoint = os.path.join(part, folder, checkpoint_name(0))
        os.makedirs(checkpoint)
        manifest = save_weights(checkpoint, manifest, averaged.pieces(), averaged.read, max_shard_size)
        _copy_tokenizer(newest, config, part)
        _check_verified(sources, hashed)
        card = {**(manifest.average or {}), **manifest.provenance.to_dict(), "versions": versions()}
        Path(part, CARD).write_text(json.dumps(card, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        Path(part, latest + PART_SUFFIX).write_text(f"{checkpoint_name(0)}\n", encoding="utf-8")
    log.info("averaged %d checkpoints into %s: %s", len(sources), save, ", ".join(_shares(sources)))
    return manifest


def choose_checkpoints(load: Sequence[str], last: int | None, iterations: Sequence[int]) -> list[str]:
    """Return the folders of the checkpoints to average, the newest last. Raises UsageError."""
    folder = os.path.join(load[0], "checkpoints")
    if len(load) > 1 or not os.path.isdir(folder):
        if last is not None or iterations:
            raise UsageError(
                "--last and --iterations choose among the checkpoints of one run, but --load names"
                f" {'several folders' if len(load) > 1 else load[0] + ', which is no run folder'}: give one run folder, or leave them out"
            )
        return [find_checkpoint(path) for path in load]
    names, skipped = _kept(folder)
    if skipped:
        log.warning("skipped, because they are of a branch that the run has abandoned: %s", ", ".join(skipped.values()))
    if iterations:
        if other := [os.path.join(folder, skipped[number]) for number in iterations if number in skipped]:
            raise UsageError(
                f"{', '.join(other)} is of a branch that the run has abandoned: it was set back to an earlier checkpoint, and continued from"
                " there. Leave it out of --iterations; to average it anyway, name the folder of each checkpoint with --load"
            )
        absent = [number for number in iterations if number not in names]
        if absent:
            raise UsageError(
                f"{load[0]} has no checkpoint of iteration {', '.join(map(str, absent))}; it has {', '.join(map(str, names)) or 'none'}"
                " (checkpoint.keep_last and keep_interval decide what a run keeps)"
            )
        return [os.path.join(folder, names[number]) for number in sorted(iterations)]
    if last is None:
        raise UsageError(
            f"{load[0]} has the checkpoints {', '.join(map(str, names)) or 'none'}: choose with --last N or --iterations"
        )
    trained = [name for name in names.values() if not load_manifest(os.path.join(folder, name)).weights_only]
    if not 1 <= last <= len(trained):
        raise UsageError(
            f"--last {last}, but {load[0]} has {len(trained)} trained checkpoints; give at most that many, or train with a larger"
            " checkpoint.keep_last or with checkpoint.keep_interval"
        )
    return [os.path.join(folder, name) for name in trained[-last:]]


def _kept(folder: str) -> tuple[dict[int, str], dict[int, str]]:
    """Return iteration -> name of the checkpoints up to `latest` that count, and of those that a run that was set back left between."""
    latest = latest_checkpoint(folder)
    newest = -1 if latest is None else int(os.path.basename(latest).removeprefix("iter_"))
    names = {number: name for number, name in finished_checkpoints(folder).items() if number <= newest}
    own = own_checkpoints(folder)
    return {number: name for number, name in names.items() if number in own}, {
        number: name for number, name in names.items() if number not in own
    }


def _method(decay: float | None, factors: Sequence[float]) -> str:
    return "exponential" if decay is not None else "weighted" if factors else "uniform"


def _factors(count: int, decay: float | None, factors: Sequence[float]) -> list[float]:
    """Return the factor of each checkpoint. Raises UsageError."""
    if decay is not None:
        if not 0 < decay < 1:
            raise UsageError(
                f"--decay {decay} must lie between 0 and 1: the newest checkpoint counts 1, the one before it {decay}"
            )
        return [decay ** (count - 1 - index) for index in range(count)]
    if not factors:
        return [1.0] * count
    if len(factors) != count:
        raise UsageError(f"--factors has {len(factors)} numbers for {count} checkpoints; give one for each, the newest last")
    if not all(0 < factor < float("inf") for factor in factors):
        raise UsageError(
            f"--factors {' '.join(map(str, factors))} must be positive; leave a checkpoint out instead of giving it 0"
        )
    return [*factors]


def _check_sources(checkpoints: Sequence[str], factors: Sequence[float]) -> list[Source]:
    """Return the sources, with the sizes of their files checked. Raises MismatchError if they do not belong together."""
    sources = [Source(path, check_sizes(path), factor) for path, factor in zip(checkpoints, factors, strict=True)]
    first = sources[0]
    model = first.manifest.run_config(first.checkpoint).model
    for one in sources[1:]:
        if different := other_architecture(one.manifest.run_config(one.checkpoint).model, model):
            raise MismatchError(
                f"{one.checkpoint} has another architecture than {first.checkpoint}: {'; '.join(different)}; only checkpoints of one"
                " architecture can be averaged"
            )
        one.manifest.provenance.check_same(first.manifest.provenance, f"the checkpoint {one.checkpoint}", first.checkpoint)
        if one.manifest.teacher != first.manifest.teacher:
            raise MismatchError(
                f"{one.checkpoint} was trained with the teacher {one.manifest.teacher}, {first.checkpoint} with {first.manifest.teacher}"
                " (train.auxiliary): their heads predict other states; average checkpoints with the same teacher"
            )
    paths = [os.path.realpath(one.checkpoint) for one in sources]
    twice = next((path for path in paths if paths.count(path) > 1), None)
    if twice is not None:
        raise UsageError(f"{twice} is named twice; name each checkpoint once, and use --factors to give one a larger share")
    return sources


def _run_config(newest: Source, save: str) -> RunConfig:
    """Return the config of the newest checkpoint with the paths of the new run, and without modules that are not averaged."""
    config = newest.manifest.run_config(newest.checkpoint)
    has_tokenizer = os.path.isdir(_tokenizer_of(newest))
    if config.model.mtp_num_layers is not None:
        log.info(
            "without the modules of model.mtp_num_layers=%d: a run that starts from the average has none",
            config.model.mtp_num_layers,
        )
    return replace(
        config,
        run_dir=save,
        model=replace(config.model, mtp_num_layers=None, mtp_loss_scaling_factor=None),
        data=replace(config.data, tokenizer=os.path.join(save, TOKENIZER) if has_tokenizer else config.data.tokenizer),
        parallel=ParallelConfig(),
    )


def _tokenizer_of(source: Source) -> str:
    return os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(source.checkpoint))), TOKENIZER)


def _copy_tokenizer(newest: Source, config: RunConfig, part: str) -> None:
    """Copy the tokenizer of the newest checkpoint's run, if it has one, and write the config keys that the weights fix."""
    if not os.path.isdir(_tokenizer_of(newest)):
        log.warning("%s is missing: an export of the average needs a tokenizer folder there", _tokenizer_of(newest))
        return
    folder = run_tokenizer(newest.checkpoint, newest.manifest.provenance)
    shutil.copytree(folder, os.path.join(part, TOKENIZER))
    tokenizer = load_tokenizer(folder, None, eod_id=newest.manifest.provenance.eod_id)
    Path(part, MODEL_YAML).write_text(model_yaml(config, tokenizer, "averaged"), encoding="utf-8")


def _begin_verification(sources: Sequence[Source], hashing: ThreadPoolExecutor) -> list[list[Future[list[str]]]]:
    """Let a thread compare the sha256 of every file of the sources with the manifests."""
    for one in sources:
        if not one.manifest.files:
            raise DataError(
                f"{one.checkpoint} was written by a version without checksums, so it cannot be verified; resume its run and save again"
            )
    return [
        [hashing.submit(content_problems, one.checkpoint, {name: sums}) for name, sums in one.manifest.files.items()]
        for one in sources
    ]


def _check_verified(sources: Sequence[Source], hashed: list[list[Future[list[str]]]]) -> None:
    """Wait for the verification. Raises DataError with the damaged files of a source."""
    for one, files in zip(sources, hashed, strict=True):
        refuse_damaged(one.checkpoint, [problem for file in files for problem in file.result()])


def _record(sources: Sequence[Source], method: str, weights: WeightsKind) -> dict[str, Any]:
    """Return what the manifest and average.json record of the average."""
    whole = sum(one.factor for one in sources)
    return {
        "method": method,
        "weights": weights,
        "checkpoints": [
            {
                "run": run_name(one.checkpoint),
                "iteration": one.manifest.iteration,
                "consumed_train_tokens": one.manifest.consumed_train_tokens,
                "tokens_in_all": tokens_before(_chain_of(one)),
                "share": one.factor / whole,
                "manifest_sha256": sha256_of(os.path.join(one.checkpoint, MANIFEST)),
                **_own_chain(one, sources[-1]),
            }
            for one in sources
        ],
    }


def _chain_of(source: Source) -> list[Record]:
    """Return the chain of a checkpoint, with itself as the last one."""
    own = describe_checkpoint(source.checkpoint, source.manifest, os.path.abspath(source.checkpoint), "weights")
    return [*source.manifest.started_from, own]


def _own_chain(source: Source, newest: Source) -> Record:
    """Return the chain of a checkpoint, unless its run and data are those of the newest one, whose chain the manifest has."""
    chain, other = _chain_of(source), _chain_of(newest)
    is_same_run = os.path.dirname(chain[-1]["path"]) == os.path.dirname(other[-1]["path"]) and chain[:-1] == other[:-1]
    return {} if is_same_run and chain[-1]["train_shards"] == other[-1]["train_shards"] else {"chain": chain}


def _shares(sources: Sequence[Source]) -> list[str]:
    whole = sum(one.factor for one in sources)
    return [f"{os.path.basename(one.checkpoint)} {one.factor / whole:.4g}" for one in sources]

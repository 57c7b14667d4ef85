"""Export a checkpoint to a Hugging Face folder: write weights and companion files, run the parity check, rename the folder."""

import logging
import os
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch

import megatron_ledom
from megatron_ledom.checkpoint.averaging import EMA
from megatron_ledom.checkpoint.folder import find_checkpoint
from megatron_ledom.checkpoint.manifest import MANIFEST, CheckpointManifest, check_sizes
from megatron_ledom.checkpoint.stored_tensors import StoredTensors
from megatron_ledom.config.load import config_from_dict, published
from megatron_ledom.convert.cards import write_model_card, write_verification_card
from megatron_ledom.convert.hf_config import build_hf_config
from megatron_ledom.convert.hf_folder import CONFIG, WeightsWriter, run_tokenizer, write_companions, write_config
from megatron_ledom.convert.rules import Sizes, Weight, weights_of
from megatron_ledom.convert.verify import Conversion, ParityCheck, VerifyMode, run_parity_check
from megatron_ledom.errors import DataError, UsageError
from megatron_ledom.model.dtypes import PARAMS_DTYPES
from megatron_ledom.storage.files import PART_SUFFIX
from megatron_ledom.storage.folders import new_folder
from megatron_ledom.storage.hashes import sha256_of

log = logging.getLogger(__name__)

CARD = "export.json"
WeightsKind = Literal["main", "ema"]
SHARD_BYTES = 5 * 10**9
PACKAGES = ("torch", "megatron-core", "transformers", "safetensors")


def export_hf(
    load: str,
    save: str,
    *,
    overwrite: bool = False,
    max_shard_size: int = SHARD_BYTES,
    verify: VerifyMode | None = "auto",
    architecture: str | None = None,
    weights: WeightsKind = "main",
) -> ParityCheck | None:
    """Export the checkpoint `load`, or the latest of the run folder `load`, to the folder `save`.

    Weight files have at most `max_shard_size` bytes each. The folder appears only after the parity check; `verify` None skips
    the check. `architecture`: a stock architecture; None: the first that fits. `weights`: `ema` exports the moving average of
    `optimizer.ema_decay`, rounded to the type of the weights. Returns the results of the check.
    """
    checkpoint = find_checkpoint(load)
    manifest = check_sizes(checkpoint)
    config = manifest.run_config(checkpoint)
    ema = weights == "ema"
    if ema and not manifest.has_ema:
        raise UsageError(
            f"{checkpoint} has no moving average of its weights: its run was trained without optimizer.ema_decay; export the weights themselves, or"
            " average its checkpoints with ledom average-checkpoints"
        )
    hf_config = build_hf_config(config, manifest.provenance, architecture)
    tokenizer = run_tokenizer(checkpoint, manifest.provenance)

    def may_replace() -> None:
        _check_target(save, checkpoint, overwrite)

    with new_folder(save, CONFIG, may_replace) as part:
        write_companions(part, tokenizer, manifest.provenance)
        sizes = Sizes(config.model, manifest.provenance.vocab_size)
        files = write_hf_weights(checkpoint, sizes, part, max_shard_size, ema=ema)
        dtype = PARAMS_DTYPES[config.model.params_dtype]
        check = run_parity_check(Conversion(checkpoint, manifest, part, hf_config, dtype, ema), verify)
        write_model_card(part, Path(save).name, checkpoint, manifest, hf_config, is_verified=check is not None, ema=ema)
        write_verification_card(part, CARD, _card(checkpoint, manifest, files, check, ema=ema))
        write_config(part, CONFIG + PART_SUFFIX, hf_config)
    if config.train.auxiliary.kind is not None:
        log.info(
            "the head of train.auxiliary.kind=%s served only to train: the export does not have it", config.train.auxiliary.kind
        )
    log.info("exported %s to %s as %s", checkpoint, save, hf_config.architectures[0])
    if config.model.mtp_num_layers is not None:
        log.info("without the modules of model.mtp_num_layers=%d, which only the training uses", config.model.mtp_num_layers)
    if manifest.iteration < config.train.train_iters and not manifest.weights_only:
        log.warning(
            "the run is not complete: %s is iteration %d of %d", checkpoint, manifest.iteration, config.train.train_iters
        )
    return check


def write_hf_weights(checkpoint: str, sizes: Sizes, folder: str, max_shard_size: int, *, ema: bool = False) -> dict[str, str]:
    """Convert every weight of a checkpoint, or its moving average, one at a time, into `folder`. Returns file name -> sha256."""
    weights = list(weights_of(sizes))
    shapes = {name: shape for weight in weights for name, shape in weight.hf_shapes().items()}
    stored = StoredTensors(checkpoint)
    dtype = PARAMS_DTYPES[sizes.model.params_dtype]  # the type of the checkpoint, so the conversion is exact
    return WeightsWriter(folder, shapes, dtype, max_shard_size).write(_converted(stored, weights, dtype, ema=ema))


def _converted(
    stored: StoredTensors, weights: list[Weight], dtype: torch.dtype, *, ema: bool
) -> Iterator[tuple[str, torch.Tensor]]:
    for weight in weights:
        core = stored.read(f"{EMA}.{weight.core}", weight.layer).to(dtype) if ema else stored.read(weight.core, weight.layer)
        if core.shape != weight.shape or core.dtype != dtype:
            raise DataError(
                f"{stored.checkpoint} has {weight.core} as {core.dtype} {tuple(core.shape)}, but by its config it should be {dtype}"
                f" {tuple(weight.shape)}; the checkpoint is damaged, use an earlier one"
            )
        yield from weight.split(core).items()


def _check_target(save: str, checkpoint: str, overwrite: bool) -> None:
    """Raise UsageError for a target that exists, unless it is an export that may be overwritten."""
    if not overwrite:
        raise UsageError(f"{save} exists already; give another folder with --save, or add --overwrite")
    inside = Path(checkpoint).resolve().is_relative_to(Path(save).resolve())
    if inside or not os.path.isfile(os.path.join(save, CARD)):
        raise UsageError(
            f"{save} is not an earlier export (it has no {CARD}), so --overwrite does not remove it; give another folder"
        )


def versions() -> dict[str, str]:
    """Return the versions of this package and of the packages on which a conversion depends."""
    return {"megatron-ledom": megatron_ledom.__version__, **{name: version(name) for name in PACKAGES}}


def _card(
    checkpoint: str, manifest: CheckpointManifest, files: dict[str, str], check: ParityCheck | None, *, ema: bool
) -> dict[str, Any]:
    """Return the content of export.json: the source, the files and the results of the parity check."""
    return {
        "checkpoint": os.path.basename(checkpoint),
        "checkpoint_manifest_sha256": sha256_of(os.path.join(checkpoint, MANIFEST)),
        **({"weights": "ema"} if ema else {}),
        "iteration": manifest.iteration,
        "consumed_train_tokens": manifest.consumed_train_tokens,
        **manifest.provenance.to_dict(),
        "package_version": manifest.package_version,
        "verification": asdict(check) if check else None,
        "versions": versions(),
        "files": files,
        "config": published(config_from_dict(manifest.config, "the checkpoint's manifest")),
    }

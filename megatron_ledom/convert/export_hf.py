"""A checkpoint becomes a Hugging Face folder: weights by the rules table, tokenizer, configs, logits gate, rename."""

import contextlib
import json
import logging
import os
import shutil
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from transformers import AutoTokenizer

from megatron_ledom.checkpoint.folder import find_checkpoint
from megatron_ledom.checkpoint.manifest import CheckpointManifest, load_manifest
from megatron_ledom.config.derived import head_dim, query_groups
from megatron_ledom.config.schema import RunConfig
from megatron_ledom.convert.core_model import whole_model
from megatron_ledom.convert.hf_config import build_generation_config, build_hf_config
from megatron_ledom.convert.rules import Dimensions, to_hf_weights
from megatron_ledom.convert.verify import check_logits
from megatron_ledom.errors import DataError, MismatchError, UsageError
from megatron_ledom.model.builder import DTYPES
from megatron_ledom.provenance import Provenance, vocabulary_hash

log = logging.getLogger(__name__)

TOKENIZER = "tokenizer"
CARD = "export.json"


def export_hf(load: str, save: str, *, overwrite: bool = False) -> float:
    """Export the checkpoint `load` (a run folder means its latest) to the folder `save`.

    The folder appears only after the logits gate has passed. Returns the gate's largest logit difference.
    """
    checkpoint = find_checkpoint(load)
    manifest = load_manifest(checkpoint)
    config = manifest.run_config(checkpoint)
    tokenizer = _tokenizer_folder(checkpoint)
    _check_target(save, checkpoint, overwrite)
    _check_tokenizer(tokenizer, manifest.provenance)
    part = save.rstrip("/") + ".part"
    shutil.rmtree(part, ignore_errors=True)
    made = _make_folder(part)
    try:
        with whole_model(checkpoint, manifest) as model:
            _save_weights(model.state_dict(), config, manifest, part)
            build_hf_config(config, manifest.provenance).save_pretrained(part)
            build_generation_config(manifest.provenance).save_pretrained(part)
            _save_tokenizer(tokenizer, part, manifest.provenance)
            difference = check_logits(model, part, manifest.provenance.vocab_size, config.data.seq_length)
        _save_card(part, checkpoint, manifest, difference)
        _replace_folder(part, save)
    finally:
        shutil.rmtree(part, ignore_errors=True)
        _remove_empty(made)
    log.info("exported %s to %s", checkpoint, save)
    return difference


def _check_target(save: str, checkpoint: str, overwrite: bool) -> None:
    """Refuse a target that exists, unless it is an export that may be overwritten. Raises UsageError."""
    if not os.path.exists(save):
        return
    if not overwrite:
        raise UsageError(f"{save} exists already; name another folder with --save, or give --overwrite")
    inside = Path(checkpoint).resolve().is_relative_to(Path(save).resolve())
    if inside or not os.path.isfile(os.path.join(save, CARD)):
        raise UsageError(
            f"{save} is no earlier export (it has no {CARD}), so --overwrite does not remove it; name another folder"
        )


def _replace_folder(new: str, folder: str) -> None:
    """Put `new` where `folder` is; the old content is moved aside first and removed last."""
    old = folder.rstrip("/") + ".old"
    shutil.rmtree(old, ignore_errors=True)
    if os.path.exists(folder):
        os.rename(folder, old)
    os.rename(new, folder)
    shutil.rmtree(old, ignore_errors=True)


def _make_folder(folder: str) -> list[Path]:
    """Make a folder; returns the folders above it that had to be made too, the innermost first. Raises UsageError."""
    made = [path for path in Path(folder).parents if not path.exists()]
    try:
        os.makedirs(folder)
    except OSError as error:
        raise UsageError(f"--save {folder} cannot be made ({error.strerror}); name a folder you may write to") from error
    return made


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):  # it holds the export, or what somebody else wrote
            folder.rmdir()


def _tokenizer_folder(checkpoint: str) -> str:
    """The run's copy of its tokenizer. Raises DataError without one."""
    folder = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(checkpoint))), TOKENIZER)
    if not os.path.isdir(folder):
        raise DataError(
            f"{folder} is missing, so the export would have no tokenizer: set data.tokenizer in the run's config and start the run"
            " once more (it copies the tokenizer and goes on), or copy the tokenizer folder there"
        )
    return folder


def _save_weights(weights: dict[str, torch.Tensor], config: RunConfig, manifest: CheckpointManifest, folder: str) -> None:
    dims = Dimensions(
        num_layers=config.model.num_layers,
        hidden_size=config.model.hidden_size,
        num_attention_heads=config.model.num_attention_heads,
        num_query_groups=query_groups(config.model),
        head_dim=head_dim(config.model),
        vocab_size=manifest.provenance.vocab_size,
        tied=config.model.share_embeddings_and_output_weights,
    )
    dtype = DTYPES[config.model.params_dtype]  # exact: the checkpoint's own type
    # a copy even where the type stays: rows cut from the padded vocabulary are a view, which safetensors refuses
    save_torch_state_dict({name: weight.to(dtype, copy=True) for name, weight in to_hf_weights(weights, dims)}, folder)


def _check_tokenizer(folder: str, provenance: Provenance) -> None:
    """Refuse a tokenizer folder that is not the one the run was trained with. Raises MismatchError."""
    file = Path(folder, "tokenizer.json")
    found = vocabulary_hash(file.read_bytes()) if file.is_file() else "none"
    if found != provenance.tokenizer_sha256:
        raise MismatchError(
            f"{file} has hash {found[:12]}, the run was trained with {provenance.tokenizer_sha256[:12]}: the export's ids would"
            " mean other texts; put the tokenizer there that the shards were made with"
        )


def _save_tokenizer(source: str, folder: str, provenance: Provenance) -> None:
    """Copy the run's tokenizer, and see that stock transformers stops where training said. Raises DataError if it would not."""
    shutil.copytree(source, folder, dirs_exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if tokenizer.eos_token_id != provenance.eod_id:
        raise DataError(
            f"the tokenizer in {source} has eos id {tokenizer.eos_token_id}, the run was trained with eod {provenance.eod_id}:"
            " generation would never stop; put the run's own tokenizer there"
        )


def _save_card(folder: str, checkpoint: str, manifest: CheckpointManifest, difference: float) -> None:
    """What was exported, from where, and that the gate passed."""
    card = {
        "checkpoint": os.path.basename(checkpoint),
        "iteration": manifest.iteration,
        "consumed_train_tokens": manifest.consumed_train_tokens,
        **manifest.provenance.to_dict(),
        "largest_logit_difference": difference,
        "package_version": manifest.package_version,
        "config": manifest.config,
    }
    with open(os.path.join(folder, CARD), "w", encoding="utf-8") as file:
        json.dump(card, file, indent=2)

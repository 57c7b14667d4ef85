"""Import a Hugging Face folder as a run folder: write the weights one at a time, run the parity check, rename the folder.

The checkpoint is iteration 0: a run of any layout starts from its weights with a new optimizer.
"""

import logging
import os
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import PreTrainedConfig

from megatron_ledom.checkpoint.folder import LATEST, checkpoint_name
from megatron_ledom.checkpoint.manifest import CheckpointManifest
from megatron_ledom.checkpoint.weights_only import Piece, save_weights
from megatron_ledom.config.checks import check_config
from megatron_ledom.config.derived import checkpoint_folder
from megatron_ledom.config.load import config_from_dict, published
from megatron_ledom.config.schema import RunConfig
from megatron_ledom.convert.cards import write_verification_card
from megatron_ledom.convert.hf_config import load_hf_config, read_model
from megatron_ledom.convert.hf_export import SHARD_BYTES, versions
from megatron_ledom.convert.hf_folder import (
    BLOCK_ELEMENTS,
    CONFIG,
    DTYPE_NAMES,
    EMBEDDING,
    HEAD,
    TOKENIZER,
    WeightsReader,
)
from megatron_ledom.convert.reading_options import ReadingOptions
from megatron_ledom.convert.rules import Sizes, Weight, weights_of
from megatron_ledom.convert.verify import Conversion, ParityCheck, VerifyMode, run_parity_check
from megatron_ledom.direction import BOTH, Direction, ModelDirection
from megatron_ledom.errors import DataError, MismatchError, UsageError
from megatron_ledom.model.dtypes import PARAMS_DTYPES
from megatron_ledom.provenance import Provenance, readings_from
from megatron_ledom.storage.files import PART_SUFFIX
from megatron_ledom.storage.folders import new_folder
from megatron_ledom.storage.hashed_file import one_thread
from megatron_ledom.storage.hashes import checksum
from megatron_ledom.tokenizers.corpus_tokenizer import Tokenizer, load_tokenizer

log = logging.getLogger(__name__)

CARD, MODEL_YAML = "import.json", "model.yaml"
AS_RECORDED = ReadingOptions()
IGNORED = (".rotary_emb.inv_freq",)
"""Endings of the names of unused tensors in old folders."""


def import_hf(
    load: str,
    save: str,
    *,
    direction: ModelDirection | None = None,
    order: ReadingOptions = AS_RECORDED,
    tokenizer: str | None = None,
    eod_token: str | None = None,
    seq_length: int | None = None,
    params_dtype: str | None = None,
    max_shard_size: int = SHARD_BYTES,
    verify: VerifyMode | None = "auto",
) -> ParityCheck | None:
    """Import the Hugging Face folder `load` as the new run folder `save`, to be trained in `direction`.

    `direction`: may be None if the folder records it. `order`: markers, and unit of the reverse documents. `tokenizer`: its
    folder or file; None: `load`. `eod_token`: None: the eos of the tokenizer. `seq_length`: length of the training samples;
    None: all positions of the model. `params_dtype`: bf16 or fp32; None: bf16 if all weights are bf16, else fp32, which is
    exact. Files have at most `max_shard_size` bytes. `verify` None skips the parity check. Returns the results of the check.
    """
    hf_config = load_hf_config(load)
    reader = WeightsReader(load, getattr(hf_config, "transformers_weights", None))
    eod_id = getattr(hf_config, "eod_id", None) if eod_token is None else None  # our exports record it
    loaded = load_tokenizer(load if tokenizer is None else tokenizer, eod_token, eod_id=eod_id)
    aim = _direction(hf_config, direction, load)
    model, positions = read_model(hf_config, os.path.join(load, CONFIG), seq_length)
    model |= {"vocab_size": loaded.vocab_size, "params_dtype": params_dtype or _dtype_of(reader)}
    config = _run_config(model, positions, os.path.join(load, CONFIG), save, aim)
    provenance = _provenance(hf_config, aim, order, loaded, load)
    sizes = Sizes(config.model, loaded.vocab_size)
    weights = _check_weights(reader, sizes)
    checkpoints = os.path.relpath(checkpoint_folder(config), save)
    latest = os.path.join(checkpoints, LATEST)
    with new_folder(save, latest) as part, one_thread() as hashing:
        sources = {name: hashing.submit(checksum, os.path.join(load, name)) for name in [CONFIG, *reader.files()]}
        checkpoint = os.path.join(part, checkpoints, checkpoint_name(0))
        os.makedirs(checkpoint)
        manifest = _write_checkpoint(checkpoint, config, provenance, reader, weights, max_shard_size)
        check = run_parity_check(Conversion(checkpoint, manifest, load, hf_config, reader.exact_dtype()), verify)
        loaded.save(os.path.join(part, TOKENIZER))
        Path(part, MODEL_YAML).write_text(model_yaml(config, loaded, "imported"), encoding="utf-8")
        sums = {name: found.result()["sha256"] for name, found in sources.items()}
        write_verification_card(part, CARD, _card(load, hf_config, sums, manifest, check))
        Path(part, latest + PART_SUFFIX).write_text(f"{checkpoint_name(0)}\n", encoding="utf-8")
    log.info(
        "imported %s to %s, for training in the %s direction with --config %s", load, save, aim, os.path.join(save, MODEL_YAML)
    )
    return check


def _direction(hf_config: PreTrainedConfig, given: ModelDirection | None, folder: str) -> ModelDirection:
    """Return the direction of training. Raises UsageError if neither the folder nor the user gives one."""
    recorded = getattr(hf_config, "direction", None)
    if given is None and recorded is None:
        raise UsageError(
            f"{folder} does not record the direction of its model (public models are forward); choose the direction of this run"
            " with --direction reverse, forward or both"
        )
    if given is not None and recorded is not None and given != recorded:
        log.warning(
            "%s is a %s model, and it will be trained in the %s direction, starting from its weights", folder, recorded, given
        )
    chosen = str(given if given is not None else recorded)
    return BOTH if chosen == BOTH else Direction(chosen)


def _provenance(
    hf_config: PreTrainedConfig, aim: ModelDirection, options: ReadingOptions, tokenizer: Tokenizer, folder: str
) -> Provenance:
    """Return the provenance of the training, with the model orders that the user gives, else those that the folder records."""
    try:
        known = readings_from(getattr(hf_config, "readings", None) or [])
    except DataError as error:
        raise DataError(f"{folder}/config.json: {error}; write the folder again") from error
    readings = options.readings(known, aim, tokenizer)
    return tokenizer.provenance(readings[0].direction).of_readings(*readings)


def _dtype_of(reader: WeightsReader) -> str:
    """Return bf16 if all weights are bf16, else fp32, which represents every other type exactly."""
    return "bf16" if set(reader.dtypes.values()) == {DTYPE_NAMES[torch.bfloat16]} else "fp32"


def _run_config(model: dict[str, Any], positions: int, where: str, save: str, direction: ModelDirection) -> RunConfig:
    """Return the config that the checkpoint records: architecture, direction and sequence length. The run sets the rest."""
    values = {
        "run_dir": save,
        "model": model,
        "data": {"direction": str(direction), "tokenizer": os.path.join(save, TOKENIZER), "seq_length": positions},
        "optimizer": {"lr_warmup_iters": 0},
        "train": {"train_iters": 1, "global_batch_size": 1},
    }
    config = config_from_dict(values, where)
    check_config(config, 1)
    return config


def _check_weights(reader: WeightsReader, sizes: Sizes) -> list[Weight]:
    """Return the weights to convert. Raises MismatchError with all missing, unknown and misshapen tensors."""
    weights = list(weights_of(sizes))
    expected = {name: shape for weight in weights for name, shape in weight.hf_shapes().items()}
    tied = sizes.model.share_embeddings_and_output_weights
    if tied and HEAD in reader.shapes and EMBEDDING not in reader.shapes:
        reader.rename(HEAD, EMBEDDING)  # they are the same weight, and stock transformers uses the one that exists
    problems = [f"{name} is missing" for name in expected if name not in reader.shapes]
    for name, shape in reader.shapes.items():
        if name in expected and reader.dtypes[name] not in DTYPE_NAMES.values():
            problems.append(f"{name} is of type {reader.dtypes[name]}, expected one of {', '.join(DTYPE_NAMES.values())}")
        if name not in expected:
            if not name.endswith(IGNORED) and not (tied and name == HEAD):
                problems.append(f"{name} is not a weight of the model that config.json describes")
        elif shape[1:] != expected[name][1:] or not _rows_fit(name, shape[0], expected[name][0]):
            problems.append(f"{name} has shape {list(shape)}, expected {list(expected[name])}")
    if tied and HEAD in reader.shapes and not problems and not _is_embedding(reader, HEAD):
        problems.append("tie_word_embeddings is true, but lm_head.weight is not model.embed_tokens.weight")
    if problems:
        more = f" (and {len(problems) - 8} more)" if len(problems) > 8 else ""
        raise MismatchError(
            f"{reader.folder} cannot be imported: {'; '.join(problems[:8])}{more}; check that config.json and tokenizer belong to these weights"
        )
    rows = reader.shapes[weights[0].hf[0]][0]
    if rows > sizes.vocab_size:
        log.info("skipped %d rows of the vocabulary that have no id in the tokenizer", rows - sizes.vocab_size)
    return weights


def _is_embedding(reader: WeightsReader, name: str) -> bool:
    """Return True if a tensor equals the embedding; rows are compared in blocks."""
    rows = reader.shapes[name][0]
    step = max(1, BLOCK_ELEMENTS // reader.shapes[name][1])
    blocks = [(start, min(start + step, rows)) for start in range(0, rows, step)]
    same = reader.shapes[name] == reader.shapes[EMBEDDING]
    return same and all(torch.equal(reader.read_rows(name, *ends), reader.read_rows(EMBEDDING, *ends)) for ends in blocks)


def _rows_fit(name: str, rows: int, expected: int) -> bool:
    """Return True if the number of rows fits. A vocabulary may have padding after the ids of the tokenizer."""
    return rows >= expected if name in (EMBEDDING, HEAD) else rows == expected


def _write_checkpoint(
    folder: str, config: RunConfig, provenance: Provenance, reader: WeightsReader, weights: list[Weight], max_file_size: int
) -> CheckpointManifest:
    dtype = PARAMS_DTYPES[config.model.params_dtype]
    by_piece = {(weight.core, weight.layer): weight for weight in weights}

    def read(piece: Piece) -> torch.Tensor:
        weight = by_piece[(piece.name, piece.layer)]
        return weight.join([reader.read(name).to(dtype) for name in weight.hf])

    manifest = CheckpointManifest.describe(
        config,
        provenance,
        [],
        1,
        iteration=0,
        consumed_train_samples=0,
        consumed_train_tokens=0,
    )
    pieces = [Piece(weight.core, weight.layer, weight.shape, dtype) for weight in weights]
    return save_weights(folder, manifest, pieces, read, max_file_size)


def model_yaml(config: RunConfig, tokenizer: Tokenizer, kind: str) -> str:
    """Return model.yaml: the config keys that imported or averaged (`kind`) weights fix. The user adds the rest."""
    keys = fields(config.model)
    model = {key.name: getattr(config.model, key.name) for key in keys if getattr(config.model, key.name) != key.default}
    values: dict[str, Any] = {
        "run_dir": config.run_dir,
        "model": model,
        "data": {
            "direction": str(config.data.direction),
            "tokenizer": config.data.tokenizer,
            "seq_length": config.data.seq_length,
        },
    }
    direction = config.data.direction
    shards = "forward and --direction reverse, with markers" if direction == BOTH else str(direction)
    head = (
        f"# The architecture of the {kind} weights. Add data.train_blend and the section train (train_iters, global_batch_size)\n"
        f"# on the command line, or in a file with `base:` this one. Shards need --tokenizer {config.data.tokenizer}"
        f" --eod-token '{tokenizer.eod_token}'\n# --direction {shards}.\n"
    )
    return head + yaml.safe_dump(values, sort_keys=False)


def _card(
    load: str, hf_config: PreTrainedConfig, sources: dict[str, str], manifest: CheckpointManifest, check: ParityCheck | None
) -> dict[str, Any]:
    """Return the content of import.json: the source, the files and the results of the parity check."""
    return {
        "imported_from": os.path.basename(os.path.abspath(load)),
        "source_architecture": (hf_config.architectures or ["unknown"])[0],
        "source_direction": getattr(hf_config, "direction", None),
        **manifest.provenance.to_dict(),
        "verification": asdict(check) if check else None,
        "versions": versions(),
        "source_files": sources,
        "files": {name: sums["sha256"] for name, sums in manifest.files.items()},
        "config": published(config_from_dict(manifest.config, "the checkpoint's manifest")),
    }

"""The loss of `train.auxiliary.kind: reverse_state`: a forward model learns to predict the states of a frozen reverse model.

At token t of a document, a head on the last hidden state of the forward model predicts the state of the reverse model that has
read the same document from its end back to token t + 2 (Mahajan et al. 2025, arXiv 2510.14751: a summary of the future). The
state depends on the tokens t + 2 to the end of the document and on no others. Where a sample ends before the document does, the
teacher begins with the last label of the sample. The last two tokens of a document, its eod and the last position of a sample have
no state, and so no such loss.

Shape letters: b micro-batch, T positions of a sample, s those of this context-parallel rank, W width of the teacher.
"""

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_ledom.checkpoint.manifest import CheckpointManifest
from megatron_ledom.config.schema import RunConfig
from megatron_ledom.data.dataset.batch import Batch, context_part, document_numbers
from megatron_ledom.direction import Direction, to_model_order
from megatron_ledom.errors import ConfigError, DataError, MismatchError
from megatron_ledom.parallel.groups import ParallelGroups
from megatron_ledom.provenance import Provenance
from megatron_ledom.storage.jobs import differences
from megatron_ledom.storage.records import Record
from megatron_ledom.tokenizers.json_objects import read_object

log = logging.getLogger(__name__)

EXPORT_CARD = "export.json"
"""File of an export that lists the sha256 of its weights."""
KEY = "train.auxiliary.teacher"


@dataclass(frozen=True, slots=True)
class TeacherFolder:
    """A folder that is checked to be a teacher of a run."""

    path: Path
    width: int
    """Channels of its states."""
    weights_sha256: str
    """Hash of the hashes of its weight files, as the export recorded them."""

    @property
    def record(self) -> Record:
        """Return the part of it that the manifest of a checkpoint has."""
        return {"weights_sha256": self.weights_sha256, "width": self.width}


def find_teacher(config: RunConfig, provenance: Provenance) -> TeacherFolder | None:
    """Return the teacher of a run, None without `train.auxiliary.kind`. Reads only small files.

    provenance: that of the run's data. Raises MismatchError if direction, tokenizer, vocabulary or sizes do not fit, UsageError or
    DataError if it is not an export.
    """
    settings = config.train.auxiliary
    if settings.kind is None or settings.teacher is None:
        return None
    from megatron_ledom.inference.model_folder import (
        check_model_type,
        read_model_config,
        recorded_reading,
    )  # transformers: seconds

    folder = Path(settings.teacher)
    stored = read_model_config(folder)
    check_model_type(folder, stored)
    reading = recorded_reading(folder, stored, Direction.REVERSE)
    if reading is None or not (folder / EXPORT_CARD).is_file():
        raise MismatchError(
            f"{KEY}={folder} records no direction or has no {EXPORT_CARD}, expected a reverse model that ledom convert-checkpoint wrote;"
            " give such a folder"
        )
    if not reading.is_plain or not provenance.is_plain:
        raise MismatchError(
            f"{KEY}={folder} is {reading.describe()}, and the run's data is {provenance.readings[0].describe()}: a teacher and its run"
            " have no markers yet; use models and shards without --marker"
        )
    try:
        own = Provenance.from_dict({**stored, "direction": str(Direction.REVERSE), "readings": []}, f"{folder}/config.json")
        sizes = {name: int(stored[name]) for name in ("hidden_size", "num_hidden_layers", "max_position_embeddings")}
        files = dict(read_object(folder / EXPORT_CARD)["files"])
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{KEY}={folder} has a damaged config.json or {EXPORT_CARD} ({error}); export the model again"
        ) from error
    own.check_same_tokenizer(provenance, f"{KEY}={folder}", "this run's data")
    _check_sizes(config, folder, sizes)
    return TeacherFolder(folder, sizes["hidden_size"], hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest())


def _check_sizes(config: RunConfig, folder: Path, sizes: Mapping[str, int]) -> None:
    """Raise MismatchError or ConfigError if the teacher is too short, too shallow or cannot be divided over the ranks."""
    settings, length = config.train.auxiliary, config.data.seq_length
    if sizes["max_position_embeddings"] < length:
        raise MismatchError(
            f"{KEY}={folder} was trained with {sizes['max_position_embeddings']} positions, fewer than data.seq_length={length}; lower it, or"
            " use a teacher with a longer context"
        )
    if settings.teacher_layer is not None and settings.teacher_layer >= sizes["num_hidden_layers"]:
        raise ConfigError(
            f"train.auxiliary.teacher_layer={settings.teacher_layer}, but the teacher has {sizes['num_hidden_layers']} layers; it can be 1 to"
            f" {sizes['num_hidden_layers'] - 1}, or null for the last state"
        )
    ranks = config.parallel.tensor_model_parallel_size
    if settings.head == "linear" and sizes["hidden_size"] % ranks:
        raise ConfigError(
            f"train.auxiliary.head=linear predicts {sizes['hidden_size']} channels of the teacher, which"
            f" parallel.tensor_model_parallel_size={ranks} does not divide; use train.auxiliary.head=mlp"
        )


def head_differences(manifest: CheckpointManifest, config: RunConfig, teacher: TeacherFolder | None, where: str) -> list[str]:
    """Return the reasons why a run cannot continue with the head of a checkpoint, or without one; none if it can.

    A changed weight of the loss is no reason, nor another folder with the same weights.
    """
    before, now = manifest.run_config(where).train.auxiliary, config.train.auxiliary
    keys = ("kind",) if None in (before.kind, now.kind) else ("kind", "head", "teacher_layer")
    changed = differences(
        {key: getattr(before, key) for key in keys}, {key: getattr(now, key) for key in keys}, "train.auxiliary."
    )
    if not changed and teacher is not None and manifest.teacher != teacher.record:
        changed.append(f"the weights of {KEY}={teacher.path} are not those of the teacher before (their sha256 differ)")
    return changed


def check_same_head(
    manifest: CheckpointManifest, config: RunConfig, teacher: TeacherFolder | None, where: str, otherwise: str
) -> None:
    """Raise MismatchError if a run that takes the optimizer state of a checkpoint has another head or teacher."""
    changed = [] if manifest.weights_only else head_differences(manifest, config, teacher, where)
    if changed:
        raise MismatchError(f"{where} has the optimizer state of another auxiliary loss: {'; '.join(changed)}; {otherwise}")


class ReverseTeacher:
    """The frozen teacher and its loss on this rank. Only ranks of the last pipeline stage load it; the others call nothing."""

    def __init__(
        self, folder: TeacherFolder, config: RunConfig, eod_id: int, groups: ParallelGroups, device: torch.device
    ) -> None:
        self.folder, self.weight, self._eod_id = folder, config.train.auxiliary.weight, eod_id
        self._context = (groups.context.rank(), groups.context.size())
        self._model: Any = None
        if groups.has_last_stage(groups.virtual_stages - 1):
            self._model = _load(folder.path, config.train.auxiliary.teacher_layer, device)

    def measure(self, batch: Batch, predicted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the sum of the distances to differentiate, and that sum with the number of positions that have one.

        predicted: [b, s, W], fp32. The distance of a position is the mean of the squared differences over the channels. A position
        that does not count in the language loss has none.
        """
        states, has_state = self.states(batch["sample"])
        part = context_part({"states": states, "has_state": has_state}, *self._context)
        counted = part["has_state"] * batch["loss_mask"]
        total = ((predicted - part["states"]).square().mean(-1) * counted).sum()
        return total, torch.stack([total.detach(), counted.sum()])

    @torch.no_grad()
    def states(self, sample: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the teacher's states [b, T, W] for the tokens of whole samples [b, T + 1], and 1 where there is one [b, T].

        Entry t is the state of the teacher that has read the document of token t from its end back to token t + 2.
        """
        documents = document_numbers(sample, self._eod_id)
        read, parts = sample[:, 2:], 2 * documents[:, 2:] + (sample[:, 2:] == self._eod_id)  # an eod is a part of its own
        order = torch.from_numpy(to_model_order(np.arange(read.shape[1]), Direction.REVERSE)).to(read.device)
        found = self._read(read[:, order], parts[:, order])[:, order]
        has_state = (documents[:, :-2] == documents[:, 2:]) & (read != self._eod_id)
        pad = torch.nn.functional.pad
        return pad(found, (0, 0, 0, 1)), pad(has_state.float(), (0, 1))

    def _read(self, tokens: torch.Tensor, parts: torch.Tensor) -> torch.Tensor:
        """Return the states [b, n, W], fp32, of tokens in the teacher's order [b, n]; each part of a row is read as if alone."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        is_first = torch.ones_like(parts, dtype=torch.bool)
        is_first[:, 1:] = parts[:, 1:] != parts[:, :-1]
        begins = torch.where(is_first, places, 0).cummax(1).values
        same_part = parts[:, :, None] == parts[:, None, :]
        is_visible = same_part & (places[:, None] >= places[None, :])
        found = self._model(input_ids=tokens, attention_mask=is_visible[:, None], position_ids=places - begins, use_cache=False)
        return torch.as_tensor(found.last_hidden_state).float()


def _load(folder: Path, layer: int | None, device: torch.device) -> Any:
    """Return the stock model of a folder without its output layer, frozen; with `layer`, only the layers up to that state."""
    from megatron_ledom.inference.model_folder import load_stock_model

    dtype = torch.float32 if device.type == "cpu" else "auto"
    model = load_stock_model(folder, dtype=dtype, attn_implementation="sdpa").base_model
    if layer is not None:
        model.layers, model.norm = model.layers[:layer], torch.nn.Identity()
    log.info("train.auxiliary: the frozen teacher %s, %s parameters", folder, f"{sum(w.numel() for w in model.parameters()):,}")
    return model.requires_grad_(False).eval().to(device)

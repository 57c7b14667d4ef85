"""Fine-tuning with transformers' Trainer: documents in model order, closed by eod, and folders that keep the direction.

The ids are those that `ledom preprocess-data` stores, so a model learns the same from a shard and from these batches.
"""

import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_ledom.direction import Direction, to_model_order
from megatron_ledom.errors import DataError, UsageError
from megatron_ledom.inference.language_model import LanguageModel
from megatron_ledom.inference.model_folder import SMALL_FILES
from megatron_ledom.provenance import readings_to
from megatron_ledom.storage.folders import new_folder
from megatron_ledom.tokenizers.reader import read_tokenizer

IGNORED = -100
"""Label of a position without a loss, as in transformers."""
MODEL_FILES = ("config.json", "model.safetensors.index.json")
COPIED = (*(name for name in SMALL_FILES if name not in MODEL_FILES), "chat_template.jinja")
"""Files of a tokenizer, which a fine-tuned folder takes over unchanged."""


def encode_documents(lm: LanguageModel, texts: Iterable[str]) -> list[dict[str, list[int]]]:
    """Return the ids of each text in text order, as items of a data set; texts without a token are omitted."""
    encoded = (lm.tokenizer.encode(text) for text in texts)
    return [{"input_ids": text_ids} for text_ids in encoded if text_ids]


@dataclass(frozen=True, slots=True, kw_only=True)
class DocumentCollator:
    """Makes a batch of a Trainer from documents: model order, eod last, padded after their end.

    max_length: the longest row, in tokens with eod. A longer document loses its end in model order and gets no eod: of a reverse
    model's document, the tokens nearest the end of the text stay, and the row does not say that the text begins there.
    """

    direction: Direction
    eod_id: int
    max_length: int | None = None
    marker_id: int | None = None
    """First id of each document, if the model has a marker."""

    def __post_init__(self) -> None:
        """Raise UsageError for a length below 2, which has nothing to predict."""
        if self.max_length is not None and self.max_length < 2:
            raise UsageError(f"max_length={self.max_length} leaves nothing to predict; it must be at least 2")

    @classmethod
    def of(cls, lm: LanguageModel, max_length: int | None = None) -> "DocumentCollator":
        """Return the collator of a model; max_length is the number of its positions if it is not given."""
        marker_id = None if lm.reading is None else lm.reading.marker_id
        length = max_length or lm.num_positions
        return cls(direction=lm.direction, eod_id=lm.stop_ids[0], max_length=length, marker_id=marker_id)

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Return input_ids, attention_mask and labels [B, S] for documents with `input_ids` in text order."""
        rows = [self._row(feature) for feature in features]
        length = max(map(len, rows))
        padding = [length - len(row) for row in rows]
        return {
            "input_ids": torch.tensor([row + [self.eod_id] * num for row, num in zip(rows, padding, strict=True)]),
            "attention_mask": torch.tensor([[1] * len(row) + [0] * num for row, num in zip(rows, padding, strict=True)]),
            "labels": torch.tensor([row + [IGNORED] * num for row, num in zip(rows, padding, strict=True)]),
        }

    def _row(self, feature: Mapping[str, Any]) -> list[int]:
        """Return the ids of a document in model order, with eod if it is whole."""
        if "input_ids" not in feature:
            known = ", ".join(feature) or "none"
            raise DataError(f"a document has no input_ids, its keys are: {known}; encode the texts with encode_documents")
        text_ids = [int(id_) for id_ in feature["input_ids"]]
        if not text_ids or self.eod_id in text_ids:
            found = f"the eod {self.eod_id}, which closes documents" if text_ids else "no tokens"
            raise DataError(f"a document contains {found}; remove it, and do not add special tokens when you encode texts")
        marker = [] if self.marker_id is None else [self.marker_id]
        row = [*marker, *to_model_order(text_ids, self.direction), self.eod_id]
        return row if self.max_length is None else row[: self.max_length]


def save_finetuned(lm: LanguageModel, model: Any, source: str | Path, output: str | Path) -> None:
    """Write the folder of a fine-tuned model, which records the direction, the eod and the tokenizer's hash.

    lm: the model as it was loaded from the folder `source`. model: the trained one; adapters of PEFT are merged into the weights,
    which changes `model`. The folder appears whole or not at all. ReverseLM (or ForwardLM) and `ledom convert-checkpoint
    hf-to-mcore` load it without further options.
    """
    merged = model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
    eod_id = lm.stop_ids[0]
    recorded = {
        "direction": str(lm.direction),
        "eod_id": eod_id,
        "eos_token_id": eod_id,
        "tokenizer_sha256": read_tokenizer(str(source)).sha256,
    }
    for name, value in recorded.items():
        setattr(merged.config, name, value)
    if getattr(merged.config, "readings", None) is not None:  # a two-way model becomes one of the direction it was trained in
        merged.config.readings = None if lm.reading is None or lm.reading.is_plain else readings_to([lm.reading])
    merged.generation_config.eos_token_id = eod_id
    with new_folder(str(output), option="--output") as part:
        merged.save_pretrained(part)
        for name in COPIED:
            if (file := Path(source, name)).is_file():
                shutil.copyfile(file, Path(part, name))

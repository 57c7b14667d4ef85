"""Comparison of converted weights with their source, bit for bit."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from megatron_ledom.checkpoint.folder import find_checkpoint
from megatron_ledom.checkpoint.stored_tensors import StoredTensors
from tests.support.legible import VOCAB_SIZE


def folder_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of a folder by name."""
    return {name: weight for file in folder.glob("*.safetensors") for name, weight in load_file(file).items()}


def core_weights(run: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of the latest checkpoint of a run by name."""
    stored = StoredTensors(find_checkpoint(str(run)))
    return {name: stored.read(name) for name in stored.entries if not name.startswith("optimizer.")}


def check_same_folders(found: Path, source: Path) -> None:
    """Check that names and bits are equal; of a padded vocabulary, only the rows of the tokenizer's ids."""
    ours, theirs = folder_weights(found), folder_weights(source)
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        expected = theirs[name][:VOCAB_SIZE] if name in ("model.embed_tokens.weight", "lm_head.weight") else theirs[name]
        assert weight.dtype == expected.dtype
        assert torch.equal(weight, expected), name


def check_same_runs(found: Path, source: Path) -> None:
    """Check that names and bits are equal."""
    ours, theirs = core_weights(found), core_weights(source)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []

"""What figures of a model depend on besides settings: a run that goes on from kept work must find the same."""

import hashlib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from megatron_ledom.errors import DataError

READ_BESIDE_WEIGHTS = (
    "config.json",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
"""Small files on which the figures depend: what the model is, which files hold it, and what its ids mean."""


def folder_facts(folder: Path) -> dict[str, Any]:
    """Which model a folder holds. The weights are told apart by their files' size and time of change."""
    weights = {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in sorted(folder.glob("*.safetensors"))}
    beside = {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
        for name in READ_BESIDE_WEIGHTS
        if (folder / name).is_file()
    }
    found = beside.pop("config.json", None)
    return {"model": str(folder.resolve()), "weights": weights, "config_sha256": found, "files": beside}


def check_unchanged(folder: Path, known: dict[str, Any]) -> None:
    """Raise DataError for a folder that is no longer what `folder_facts` has found: call it once the model is loaded.

    Weights, tokenizer and what is noted of both are read at different times; replaced in between they would not be one model.
    """
    now, before = (
        {"config.json": facts["config_sha256"], **facts["files"], **facts["weights"]} for facts in (folder_facts(folder), known)
    )
    names = sorted(name for name in now.keys() | before.keys() if now.get(name) != before.get(name))
    if names:
        raise DataError(
            f"the model folder {folder} was changed while it was read ({', '.join(names)}): something else writes to it; wait until"
            " it is complete, then run the same command again"
        )


def surroundings() -> dict[str, str]:
    """The device, on which the precision depends, and versions of the packages that compute."""
    versions = {name: version(name) for name in ("megatron-ledom", "torch", "transformers")}
    return {"device": "cuda" if torch.cuda.is_available() else "cpu", **versions}

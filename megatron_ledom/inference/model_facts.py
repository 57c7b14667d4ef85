"""What figures of a model depend on besides settings: a run that goes on from kept work must find the same."""

import hashlib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


def folder_facts(folder: Path) -> dict[str, Any]:
    """Which model a folder holds. The weights are told apart by their files' size and time of change."""
    weights = {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in sorted(folder.glob("*.safetensors"))}
    config = folder / "config.json"
    found = hashlib.sha256(config.read_bytes()).hexdigest() if config.is_file() else None
    return {"model": str(folder.resolve()), "weights": weights, "config_sha256": found}


def surroundings() -> dict[str, str]:
    """The device, on which the precision depends, and versions of the packages that compute."""
    versions = {name: version(name) for name in ("megatron-ledom", "torch", "transformers")}
    return {"device": "cuda" if torch.cuda.is_available() else "cpu", **versions}

"""The files of a checkpoint that are written once, whatever the number of ranks."""

import json
import os

BACKENDS = "metadata.json"
"""Names megatron-core's formats: its CheckpointingConfig, spelled out here because importing that takes seconds."""
COMMON_FILES = ("common.pt", BACKENDS, ".metadata")
"""Beside the ranks' shares and the manifest."""


def save_backends(folder: str) -> None:
    """Write what megatron-core looks at first when it loads a checkpoint."""
    formats = {
        "sharded_backend": "torch_dist",
        "sharded_backend_version": 1,
        "common_backend": "torch",
        "common_backend_version": 1,
    }
    with open(os.path.join(folder, BACKENDS), "w", encoding="utf-8") as file:
        json.dump(formats, file, allow_nan=False)

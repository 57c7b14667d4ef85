"""Random ids of a run, kept in its folder, under which other programs know it."""

import os
import secrets
import threading
from pathlib import Path

from megatron_ledom.storage.files import write_file

WANDB_ID = "wandb_run_id"
"""File in the run folder with the id of the run at Weights & Biases."""
TRACKING_ID = "tracking_id"
"""File in the run folder with the id of the run at MLflow and OpenTelemetry."""
_LOCK = threading.Lock()


def kept_id(run_dir: str, name: str) -> str:
    """Return the id in the file `name` of the run folder: random, because folder names repeat, and the same in every launch."""
    path = Path(run_dir, name)
    with _LOCK:
        if not path.exists() or not path.read_text().strip():
            write_file(path, secrets.token_hex(8) + "\n")
        return path.read_text().strip()


def run_name(run_dir: str) -> str:
    """Return the name of the run for people: that of its folder."""
    return os.path.basename(os.path.abspath(run_dir))

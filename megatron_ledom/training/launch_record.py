"""What a run was started with: one line a launch in `launches.jsonl` of the run folder."""

import os
import platform
import shlex
import socket
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import torch

import megatron_ledom
from megatron_ledom.config.load import to_dict
from megatron_ledom.config.schema import RunConfig
from megatron_ledom.errors import cannot_write
from megatron_ledom.platform.launch import Launch
from megatron_ledom.platform.slurm import job_id
from megatron_ledom.storage.records import LAUNCHES, Record, append_record, read_records

PACKAGES = ("megatron-core", "numpy", "transformers", "transformer-engine")


def write_launch(config: RunConfig, launch: Launch, iteration: int, checkpoint: str | None) -> None:
    """Append this launch, which goes on from `iteration`, that of the checkpoint. Call on one rank. Raises what `cannot_write` makes
    of an error."""
    path = os.path.join(config.run_dir, LAUNCHES)
    try:
        append_record(path, describe_launch(config, launch, iteration, checkpoint))
    except OSError as error:
        raise cannot_write(error, path) from error


def read_launches(run_dir: str) -> list[Record]:
    """Every launch of a run folder, oldest first. Raises DataError with file and line of a damaged one."""
    return read_records(os.path.join(run_dir, LAUNCHES), _as_launch)


def _as_launch(record: Record) -> Record:
    """Return the record; raises TypeError where what is read of it is of another type."""
    settings = record.get("config", {})
    checkpoint = settings.get("checkpoint", {}) if isinstance(settings, dict) else None
    if not isinstance(checkpoint, dict):
        raise TypeError("its config is none of a run")
    numbers = {
        "from_iteration": record.get("from_iteration", 0),
        "world_size": record.get("world_size", 1),
        "config.checkpoint.save_interval": checkpoint.get("save_interval", 0),
    }
    for name, number in numbers.items():
        if type(number) is not int:
            raise TypeError(f"its {name} is {number!r}")
    return record


def describe_launch(config: RunConfig, launch: Launch, iteration: int, checkpoint: str | None) -> Record:
    """Time, command, position, machine, versions, the state of the source, and the config, which another start may change."""
    cuda = torch.cuda.is_available()
    return {
        "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(sys.orig_argv),
        "folder": os.getcwd(),
        "world_size": launch.world_size,
        "from_iteration": iteration,
        "from_checkpoint": checkpoint and os.path.basename(checkpoint),
        "host": socket.gethostname(),
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
        "slurm_job_id": job_id(os.environ),
        "versions": {
            "megatron_ledom": megatron_ledom.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "nccl": ".".join(map(str, torch.cuda.nccl.version())) if cuda else None,  # type: ignore[no-untyped-call]
            **{name: _version(name) for name in PACKAGES},
        },
        "git": git_state(Path(megatron_ledom.__file__).parent),
        "config": to_dict(config),
    }


def git_state(folder: Path) -> Record | None:
    """Commit and whether files differ from it; None where the source lies in no git repository, or git is not installed."""
    commit = _git(folder, "rev-parse", "HEAD")
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    if commit is None or changes is None:
        return None
    return {"commit": commit, "dirty": bool(changes), "changed": [line[2:].strip() for line in changes.splitlines()]}


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.rstrip() if done.returncode == 0 else None


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None

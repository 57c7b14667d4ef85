"""Heartbeats of runs that no process trains."""

import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from megatron_ledom.monitoring.heartbeat import Heartbeat

RUNNING = Heartbeat(
    state="running",
    at=0.0,
    started_at=0.0,
    interval_seconds=10.0,
    host="elsewhere",
    pid=1,
    slurm_job_id=None,
    world_size=1,
    iteration=7,
    activity="a step",
    idle_seconds=0.0,
    limit_seconds=300.0,
    is_patient=False,
)


def write_heartbeat(path: Path, **changes: Any) -> None:
    """Write a heartbeat of now, of a process on another host."""
    path.write_text(json.dumps(asdict(replace(RUNNING, **{"at": time.time(), **changes}))))

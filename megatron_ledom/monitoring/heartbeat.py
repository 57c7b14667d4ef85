"""The heartbeat of a run: rank 0 writes `heartbeat.json` into the run folder every few seconds, and how the launch ended.

A thread writes it, so a slow disk does not delay the training, and no error of it ends the training. The file is replaced whole. If it
says `running` but has not been replaced for a while, the process is gone, or its disk hangs.
"""

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from megatron_ledom.errors import DataError, LedomError
from megatron_ledom.storage.files import write_whole

log = logging.getLogger(__name__)

HEARTBEAT = "heartbeat.json"
INTERVAL_SECONDS = 10.0
"""Seconds between two heartbeats."""
LAST_WRITE_SECONDS = 10.0
"""Longest wait for the last heartbeat of a launch."""
MOST_REASON = 2000
"""Longest reason that is written, in characters."""
MOST_BYTES = 1 << 16
"""Most characters that are read; the rest of a longer file makes it damaged."""
LARGEST = 2.0**53
"""Numbers of a whole heartbeat are smaller."""
RUNNING, COMPLETE, STOPPED, FAILED = "running", "complete", "stopped", "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Activity of a rank's main thread."""

    iteration: int
    activity: str
    idle_seconds: float
    """Seconds since the last progress."""
    limit_seconds: float
    """Seconds without progress that this activity may take: the watchdog's limit."""
    is_patient: bool
    """True if the activity may take long, as a save may."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Heartbeat:
    """Content of `heartbeat.json`."""

    state: str
    """`running`, `complete`, `stopped` (saved, to be resumed) or `failed`."""
    at: float
    """Time of writing, in seconds since 1970 by the clock of the writer."""
    started_at: float
    """Start of the launch."""
    interval_seconds: float
    host: str
    pid: int
    slurm_job_id: str | None
    world_size: int
    iteration: int
    activity: str
    idle_seconds: float
    limit_seconds: float
    is_patient: bool
    reason: str = ""
    """The error of a failed launch; the cause of a stop."""


_KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("at", "started_at", "interval_seconds", "idle_seconds", "limit_seconds"), (int, float)),
    **dict.fromkeys(("state", "host", "activity", "reason"), (str,)),
    **dict.fromkeys(("pid", "world_size", "iteration"), (int,)),
    **dict.fromkeys(("is_patient",), (bool,)),
    "slurm_job_id": (str, type(None)),
}


def read_heartbeat(run_dir: str) -> Heartbeat | None:
    """Return the heartbeat of a run folder; None without the file. Raise OSError, and DataError for a damaged file."""
    path = os.path.join(run_dir, HEARTBEAT)
    try:
        with open(path, encoding="utf-8") as file:
            values = json.loads(file.read(MOST_BYTES))
        return _checked(values)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{path} is damaged ({str(error)[:200]}); the next heartbeat replaces it") from error


def _checked(values: Mapping[str, Any]) -> Heartbeat:
    """Return the heartbeat with these values; later versions may have added some. Raises TypeError for a wrong one."""
    known = {field.name: values[field.name] for field in fields(Heartbeat) if field.name in values}
    for name, value in known.items():
        if type(value) not in _KINDS[name] or (isinstance(value, int | float) and not abs(value) < LARGEST):
            raise TypeError(f"its {name} is {str(value)[:60]!r}")
    return Heartbeat(**known)


class HeartbeatWriter:
    """The thread that writes the heartbeat of one launch. Use it on rank 0."""

    def __init__(
        self,
        run_dir: str,
        progress: Callable[[], Progress],
        world_size: int,
        job_id: str | None,
        interval_seconds: float = INTERVAL_SECONDS,
    ) -> None:
        self._path = os.path.join(run_dir, HEARTBEAT)
        self._progress = progress
        self._fixed: Mapping[str, Any] = {
            "started_at": time.time(),
            "interval_seconds": interval_seconds,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "slurm_job_id": job_id,
            "world_size": world_size,
        }
        self._interval = interval_seconds
        self._ended, self._lock = threading.Event(), threading.Lock()
        self._has_warned = False
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Write the first heartbeat soon, and then one every few seconds."""
        try:
            self._thread.start()
        except RuntimeError as error:
            log.warning("no heartbeat is written (%s): training continues", error)

    def end(self, state: str, reason: str = "", iteration: int | None = None) -> None:
        """Write the last heartbeat. Waits LAST_WRITE_SECONDS at most, and raises nothing."""
        self._ended.set()
        heartbeat = self._now(state, reason[:MOST_REASON])
        if iteration is not None:
            heartbeat = replace(heartbeat, iteration=iteration)
        writer = threading.Thread(target=lambda: self._write(heartbeat), name="last heartbeat", daemon=True)
        try:
            writer.start()
        except RuntimeError:  # no further thread can be started
            self._write(heartbeat)
        else:
            writer.join(LAST_WRITE_SECONDS)

    def _beat(self) -> None:
        while not self._ended.is_set():
            self._write(self._now(RUNNING))
            self._ended.wait(self._interval)

    def _now(self, state: str, reason: str = "") -> Heartbeat:
        return Heartbeat(state=state, at=time.time(), reason=reason, **self._fixed, **asdict(self._progress()))

    def _write(self, heartbeat: Heartbeat) -> None:
        with self._lock:
            if heartbeat.state == RUNNING and self._ended.is_set():
                return  # the last one is written, or will be
            try:
                write_whole(self._path, json.dumps(asdict(heartbeat)).encode())
            except (OSError, LedomError) as error:
                if not self._has_warned:
                    reason = getattr(error, "strerror", None) or error
                    log.warning(
                        "%s cannot be written (%s): training continues, but `ledom status` cannot see it", self._path, reason
                    )
                self._has_warned = True
            else:
                self._has_warned = False

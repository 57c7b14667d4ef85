"""The status of several runs at once. A run whose disk hangs delays no other and ends in an explanation."""

import os
import threading
import time
from collections.abc import Mapping, Sequence

from megatron_ledom.monitoring.run_status import Limits, RunStatus, read_status
from megatron_ledom.monitoring.state import State
from megatron_ledom.platform.slurm import job_states

ANSWER_SECONDS = 20.0
"""Longest time for the files of one run."""
SLURM_SECONDS = 30.0
"""Seconds for which an answer of SLURM is used again."""
MOST_RUNS = 200
MARKS = ("config.yaml", "heartbeat.json", "metrics.jsonl")


class JobStates:
    """The states of SLURM jobs; SLURM is asked at most every SLURM_SECONDS for each job."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[str, tuple[float, str | None]] = {}

    def __call__(self, jobs: list[str]) -> Mapping[str, str]:
        """Return job -> state of those that SLURM knows."""
        with self._lock:
            now = time.monotonic()
            new = [job for job in jobs if job not in self._known or now - self._known[job][0] > SLURM_SECONDS]
            found = job_states(new)
            self._known |= {job: (now, found.get(job)) for job in new}
            states = {job: self._known[job][1] for job in jobs}
            return {job: state for job, state in states.items() if state is not None}


def run_folders(given: Sequence[str]) -> list[str]:
    """Return the run folders of the arguments: each one that is a run, or the runs directly inside it."""
    found = []
    for folder in given:
        inside = [] if _is_run(folder) else _runs_inside(folder)
        found += inside or [folder]
    return list(dict.fromkeys(found))[:MOST_RUNS]


def _is_run(folder: str) -> bool:
    return any(os.path.exists(os.path.join(folder, name)) for name in MARKS)


def _runs_inside(folder: str) -> list[str]:
    try:
        paths = [os.path.join(folder, name) for name in sorted(os.listdir(folder))]
    except OSError:
        return []
    return [path for path in paths if _is_run(path)]


def read_all(folders: Sequence[str], limits: Limits, jobs: JobStates, seconds: float = ANSWER_SECONDS) -> list[RunStatus]:
    """Return the status of each run, in order. A run that does not answer within `seconds` is reported as such."""
    found: dict[str, RunStatus] = {}
    threads = [
        threading.Thread(target=lambda run=run: found.update({run: _read(run, limits, jobs)}), daemon=True) for run in folders
    ]
    for thread in threads:
        thread.start()
    end = time.monotonic() + seconds
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))
    return [found.get(run) or _silent(run, seconds) for run in folders]


def _read(run: str, limits: Limits, jobs: JobStates) -> RunStatus:
    try:
        return read_status(run, limits, jobs)
    except Exception as error:  # one run must not hide the others
        return RunStatus(run, reason=f"its status cannot be computed ({type(error).__name__}: {error}); report this as a bug")


def _silent(run: str, seconds: float) -> RunStatus:
    return RunStatus(run, state=State.UNREADABLE, reason=f"its files did not answer within {seconds:.0f} s: check its disk")

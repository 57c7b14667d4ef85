"""The status of several runs at once. A run whose disk hangs, or SLURM if it hangs, delays no other run for long."""

import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from megatron_ledom.errors import UsageError
from megatron_ledom.monitoring.fields import Limits, RunStatus
from megatron_ledom.monitoring.heartbeat import COMPLETE
from megatron_ledom.monitoring.run_files import read_files
from megatron_ledom.monitoring.run_status import conclude
from megatron_ledom.monitoring.state import MISSED_BEATS, Evidence, State
from megatron_ledom.platform.slurm import job_states

ANSWER_SECONDS = 20.0
"""Longest time for the files of all runs."""
SLURM_ANSWER_SECONDS = 5.0
"""Longest time for each of SLURM's commands."""
SLURM_SECONDS = 30.0
"""Seconds for which an answer of SLURM is used again."""
MOST_RUNS = 500
MARKS = ("config.yaml", "heartbeat.json", "metrics.jsonl")
"""Files of which a run folder has at least one."""


class JobStates:
    """The states of SLURM jobs. SLURM is asked once for all jobs, and at most every SLURM_SECONDS."""

    def __init__(self, ask: Callable[[Iterable[str], float], Mapping[str, str]] = job_states) -> None:
        self._ask = ask
        self._known: dict[str, tuple[float, str | None]] = {}

    def __call__(self, jobs: Iterable[str]) -> Mapping[str, str]:
        """Return job -> state of those that SLURM knows."""
        now, wanted = time.monotonic(), set(jobs)
        new = [job for job in wanted if job not in self._known or now - self._known[job][0] > SLURM_SECONDS]
        found = self._ask(new, SLURM_ANSWER_SECONDS) if new else {}
        self._known |= {job: (now, found.get(job)) for job in new}
        return {job: state for job in wanted if (state := self._known[job][1]) is not None}


class RunReader:
    """Reads the status of runs, once or again and again. Use it from one thread."""

    def __init__(
        self,
        given: Sequence[str],
        limits: Limits,
        *,
        stages: Mapping[str, str] | None = None,
        jobs: JobStates | None = None,
        seconds: float = ANSWER_SECONDS,
    ) -> None:
        """given: run folders, or folders with runs in them. stages: run folder -> title of each stage of a stage file."""
        self._given, self._limits = list(given), limits
        self._stages, self._jobs, self._seconds = dict(stages or {}), jobs or JobStates(), seconds
        self._pending: dict[str, threading.Thread] = {}
        self._beats: dict[str, tuple[float, float, float | None]] = {}

    def read(self) -> list[RunStatus]:
        """Return the status of each run, in the order of the arguments. Raise UsageError for more than MOST_RUNS runs."""
        inside = self._in_time(self._given, run_folders)
        folders = [folder for given in self._given for folder in inside.get(given) or [given]]
        folders = list(dict.fromkeys([*self._stages, *folders]))
        if len(folders) > MOST_RUNS:
            raise UsageError(f"{len(folders)} runs were found, and at most {MOST_RUNS} can be shown; name fewer folders")
        found = self._in_time(folders, self._read_one)
        known = [found.get(folder) or (self._silent(folder), None) for folder in folders]
        jobs = self._jobs({status.slurm_job_id for status, facts in known if status.slurm_job_id and _needs_job(facts)})
        for status, _ in known:
            status.slurm_state = jobs.get(status.slurm_job_id or "")
        return [conclude(status, facts) for status, facts in known]

    def _in_time(self, names: Sequence[str], work: Callable[[str], Any]) -> dict[str, Any]:
        """Return name -> result of each `work` that ends in time. One that hangs is not started again before it has ended."""
        found: dict[str, Any] = {}
        threads = []
        for name in names:
            key = f"{work.__name__} {name}"
            if not (key in self._pending and self._pending[key].is_alive()):
                self._pending[key] = threading.Thread(
                    target=lambda name=name: found.update({name: work(name)}), name=key, daemon=True
                )
                self._pending[key].start()
                threads.append(self._pending[key])
        end = time.monotonic() + self._seconds
        for thread in threads:
            thread.join(max(0.0, end - time.monotonic()))
        return dict(found)

    def _read_one(self, folder: str) -> tuple[RunStatus, Evidence | None]:
        try:
            if folder in self._stages and not os.path.exists(folder):
                return RunStatus(folder, self._stages[folder], State.NEW, read_at=time.time()), None
            status, facts = read_files(folder, self._limits, time.time())
        except Exception as error:  # one run must not hide the others
            reason = f"its status cannot be computed ({type(error).__name__}: {error}); report this as a bug"
            return RunStatus(folder, reason=reason, read_at=time.time()), None
        status.stage = self._stages.get(folder, "")
        self._watch_beat(status, facts)
        return status, facts

    def _watch_beat(self, status: RunStatus, facts: Evidence | None) -> None:
        """Use the time since the heartbeat was seen to change, which depends on no clock, as its age."""
        if facts is None or facts.heartbeat is None:
            return
        now, at = time.monotonic(), facts.heartbeat.at
        read, before, changed = self._beats.get(status.run, (now, at, None))
        if before != at:  # at some time since the last reading
            changed = now if now - read <= MISSED_BEATS * facts.heartbeat.interval_seconds else None
        self._beats[status.run] = now, at, changed
        if changed is not None:
            facts.heartbeat_age = status.heartbeat_age_seconds = now - changed

    def _silent(self, folder: str) -> RunStatus:
        reason = f"its files did not answer within {self._seconds:.0f} s: check its disk"
        return RunStatus(folder, self._stages.get(folder, ""), reason=reason, read_at=time.time())


def _needs_job(facts: Evidence | None) -> bool:
    """Return False for a complete run, whose job says nothing more."""
    return facts is not None and (facts.heartbeat is None or facts.heartbeat.state != COMPLETE)


def run_folders(given: str) -> list[str]:
    """Return the run folders of an argument: itself if it is a run or has no runs directly inside, else those."""
    return [given] if _is_run(given) else (_runs_inside(given) or [given])


def _is_run(folder: str) -> bool:
    return any(os.path.exists(os.path.join(folder, name)) for name in MARKS)


def _runs_inside(folder: str) -> list[str]:
    try:
        paths = [os.path.join(folder, name) for name in sorted(os.listdir(folder))]
    except OSError:
        return []
    return [path for path in paths if _is_run(path)]

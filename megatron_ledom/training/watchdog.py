"""End a run that makes no progress, and report which rank hangs, and where.

A thread of each rank checks the heartbeat of its main thread. If the heartbeat of any rank is too old, all ranks exchange
reports with activity and stack through a store of torch.distributed. A rank that waits in a collective is not the one that
hangs. A rank whose threads do not run at all (a stopped process, a lost machine) sends no report, which identifies it. If the
Python interpreter itself is blocked, faulthandler's thread, which does not need it, writes the stacks, and a system timer ends
the process.
"""

import faulthandler
import json
import logging
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from traceback import FrameSummary
from types import TracebackType
from typing import Any

import torch.distributed as dist

from megatron_ledom.config.schema import RunConfig
from megatron_ledom.monitoring.heartbeat import Progress
from megatron_ledom.platform.launch import Launch
from megatron_ledom.platform.processes import ExitTimer

LIBRARY_FOLDERS = ("/torch/", "/megatron/", "/megatron_ledom/")
WAITING_CALLS = (".wait()", ".item()", ".synchronize(", "float(total")
"""Calls in files of these libraries in which a rank waits for other ranks or, on a GPU, for its device."""
MOST_NAMED = 8
EXIT_CODE = 75
"""Exit code of a run that hung: EX_TEMPFAIL of sysexits.h, "try again"."""
STACKS = "stacks"
"""Folder in the run folder for the stacks of all ranks."""
LONGEST_TICK, LONGEST_GRACE = 5.0, 20.0
"""Most seconds between two checks, and most seconds to wait for the reports of the ranks."""
SECONDS_FOR_STACKS = 2.0
"""Seconds from faulthandler's report on a blocked interpreter to the end of the process."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class RankReport:
    """Activity and stack of one rank's main thread."""

    rank: int
    host: str
    pid: int
    iteration: int
    activity: str
    steps: int
    """Number of heartbeats since the start, to compare ranks that all wait."""
    seconds: float
    """Seconds since the last heartbeat."""
    is_waiting: bool
    """True if the rank waits for other ranks, in a collective."""
    stack: str

    def describe(self) -> str:
        """Return one line with rank, activity and seconds without progress."""
        where = f"rank {self.rank} ({self.host}, pid {self.pid})"
        return f"{where}: iteration {self.iteration}, {self.activity}, without progress for {self.seconds:.0f} s"

    def to_json(self) -> str:
        """Return the report as text for the store."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> "RankReport":
        """Return the report of another rank."""
        return cls(**json.loads(text))


def is_waiting(stack: Sequence[FrameSummary]) -> bool:
    """Return True if the innermost call of a main thread waits for other ranks."""
    if not stack:
        return False
    innermost = stack[-1]
    if "/torch/distributed/" in innermost.filename:
        return True
    in_library = any(folder in innermost.filename for folder in LIBRARY_FOLDERS)
    return in_library and any(call in (innermost.line or "") for call in WAITING_CALLS)


def verdict(reports: dict[int, RankReport], processes: dict[int, str], world_size: int, folder: str) -> str:
    """Return the message that names the ranks that hang: silent ones; else those outside collectives; else the least advanced."""
    silent = sorted(set(range(world_size)) - reports.keys())
    outside = [report for report in reports.values() if not report.is_waiting]
    longest = max(report.seconds for report in reports.values())
    lines = [f"no progress for {longest:.0f} s (train.watchdog_seconds)."]
    lines += [
        f"rank {rank} ({_describe_process(processes.get(rank))}) hangs: it does not answer" for rank in silent[:MOST_NAMED]
    ]
    if not silent and outside:
        lines += _describe_hanging(outside)
    elif not silent:
        lines.append("every rank waits for others, or for its device; the least advanced one:")
        lines += _describe_hanging([min(reports.values(), key=lambda report: (report.iteration, report.steps, report.rank))])
    waiting = [report.rank for report in reports.values() if report.is_waiting]
    if waiting and len(waiting) < world_size:
        lines.append(f"{len(waiting)} of {world_size} ranks wait for others: {_numbers(waiting)}")
    lines.append(
        f"The stacks of all ranks that answered are in {folder}. This run ends; the same command resumes it from the last"
        " checkpoint. If a step was only slow, raise train.watchdog_seconds."
    )
    return "\n".join(lines)


def _describe_hanging(reports: list[RankReport]) -> list[str]:
    return [f"{report.describe().replace(':', ' hangs:', 1)}\n{report.stack.rstrip()}" for report in reports[:MOST_NAMED]]


def _describe_process(process: str | None) -> str:
    """Return host and pid and, on this machine, the state of the process."""
    if process is None:
        return "host and pid unknown"
    host, pid = process.split()
    if host != socket.gethostname():
        return f"{host}, pid {pid}"
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:
        return f"{host}, pid {pid}"
    state = next((line.split(maxsplit=1)[1] for line in status.splitlines() if line.startswith("State:")), "")
    return f"{host}, pid {pid}, state {state}"


def _numbers(ranks: list[int]) -> str:
    shown = ", ".join(str(rank) for rank in sorted(ranks)[:MOST_NAMED])
    return shown + (", ..." if len(ranks) > MOST_NAMED else "")


class Watchdog:
    """Context that watches the main thread of this rank. Enter it when the process group exists, and leave it at the end."""

    def __init__(self, config: RunConfig, launch: Launch) -> None:
        self.seconds = config.train.watchdog_seconds
        self.patience = max(0.9 * 60 * config.parallel.distributed_timeout_minutes, self.seconds)
        self.tick = min(LONGEST_TICK, self.seconds / 10)
        self.grace = min(LONGEST_GRACE, max(2.0, self.seconds / 4))
        self.folder = Path(config.run_dir, STACKS)
        self.rank, self.world_size = launch.rank, launch.world_size
        self._iteration, self._activity, self._limit = 0, "building the run", self.patience
        self._steps, self._last = 0, time.monotonic()
        self._ended, self._alarmed, self._ending = threading.Event(), threading.Event(), threading.Event()
        self._address = ("", 0) if launch.init_method is None else launch.address()
        self._store_of_one = dist.HashStore() if launch.init_method is None else None  # type: ignore[attr-defined]
        self._main = threading.main_thread().ident
        self.before_end: Callable[[str], object] | None = None
        """Called with the reason before the watchdog ends this process; may take `grace` seconds."""

    def progress(self) -> Progress:
        """Return the activity of the main thread, for the heartbeat."""
        return Progress(
            iteration=self._iteration,
            activity=self._activity,
            idle_seconds=time.monotonic() - self._last,
            limit_seconds=self._limit,
            is_patient=self._limit == self.patience,
        )

    def set_activity(self, activity: str, iteration: int | None = None, *, patient: bool = False) -> None:
        """Note the new activity of the main thread. Set `patient` for one that may last as long as a collective's timeout."""
        self._activity, self._limit = activity, self.patience if patient else self.seconds
        self._iteration = self._iteration if iteration is None else iteration
        self.note_progress()

    def note_progress(self, *unused: Any) -> None:
        """Set the heartbeat to now: the main thread makes progress."""
        self._steps += 1
        self._last = time.monotonic()

    def watch_model(self, model: list[Any]) -> None:
        """Count every forward pass of the model chunks as progress, in training and in validation."""
        for chunk in model:
            chunk.register_forward_pre_hook(self.note_progress)

    def __enter__(self) -> "Watchdog":
        if self.seconds > 0:
            store = self._open_store()
            store.set(f"process/{self.rank}", f"{socket.gethostname()} {os.getpid()}")
            self.note_progress()
            self._exit_timer = ExitTimer(EXIT_CODE)
            self._checker = threading.Thread(target=self._check, name="watchdog", daemon=True)
            self._checker.start()
            threading.Thread(target=lambda: self._listen(store), name="watchdog", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._ending.is_set():
            time.sleep(3 * self.grace)  # an error from the broken connection of an ended rank: let the watchdog end this one
        self._ended.set()
        if self.seconds > 0:
            self._checker.join(1.0)  # it sets the timers that are cancelled here
            faulthandler.cancel_dump_traceback_later()
            self._exit_timer.set(0)

    def _check(self) -> None:
        while not self._ended.wait(self.tick):
            faulthandler.dump_traceback_later(self.patience + self.grace, file=2)
            self._exit_timer.set(self.patience + self.grace + SECONDS_FOR_STACKS)
            if self._alarmed.is_set() or time.monotonic() - self._last > self._limit:
                self._end_run()

    def _listen(self, store: Any) -> None:
        """Wait for the alarm of another rank. A store that does not answer blocks only this thread."""
        while not self._ended.wait(self.tick):
            try:
                if store.check(["alarm"]):
                    self._alarmed.set()
                    return
            except RuntimeError:  # the rank that runs the store has ended
                return

    def _end_run(self) -> None:
        """Write the stacks, agree with the other ranks on which one hangs, log it, and end this process."""
        self._ending.set()
        report = self._report()
        _within(self.grace, lambda: self._write_stacks(report))  # a hanging file system is a common cause
        found = _within(self.grace, lambda: self._exchange(report))
        if found is None:
            reports, processes = {self.rank: report}, {}
            log.error("watchdog: the store of the ranks does not answer: the process that runs it is stopped or gone")
        else:
            reports, processes = found
        reason = verdict(reports, processes, self.world_size, str(self.folder))
        if self.rank == min(reports):
            log.error("watchdog: %s", reason)
        else:
            time.sleep(1.0)  # the rank that logs ends first: a launcher ends the others as soon as one has ended
        if self.before_end is not None:
            report_end = self.before_end
            _within(self.grace, lambda: report_end(reason))
        for handler in logging.getLogger().handlers:
            handler.flush()
        os._exit(EXIT_CODE)

    def _report(self) -> RankReport:
        stack = traceback.extract_stack(sys._current_frames()[self._main or 0])
        return RankReport(
            rank=self.rank,
            host=socket.gethostname(),
            pid=os.getpid(),
            iteration=self._iteration,
            activity=self._activity,
            steps=self._steps,
            seconds=time.monotonic() - self._last,
            is_waiting=is_waiting(stack),
            stack="".join(traceback.format_list(list(stack)[-15:])),
        )

    def _write_stacks(self, report: RankReport) -> None:
        """Write the stack of every thread of this process into `stacks/rank_N.txt`."""
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        parts = [f"{time.strftime('%Y-%m-%d %H:%M:%S')} {report.describe()}\n"]
        for ident, frame in sys._current_frames().items():
            parts.append(f"\nthread {names.get(ident, ident)}\n{''.join(traceback.format_stack(frame))}")
        try:
            self.folder.mkdir(exist_ok=True)
            (self.folder / f"rank_{self.rank}.txt").write_text("".join(parts), encoding="utf-8")
        except OSError as error:
            log.error("watchdog: the stacks cannot be written to %s: %s", self.folder, error)

    def _exchange(self, report: RankReport) -> tuple[dict[int, RankReport], dict[int, str]] | None:
        """Raise the alarm, publish this rank's report, and wait for the others.

        Returns the reports that came within the grace time, and the host and pid of every rank; None if the store fails.
        """
        try:
            store = self._open_store()
            store.set(f"report/{self.rank}", report.to_json())
            store.set("alarm", str(self.rank))
            _wait_for(store, [f"report/{rank}" for rank in range(self.world_size)], 0.6 * self.grace)
            reports = {rank: RankReport.from_json(text) for rank, text in self._answers(store, "report")}
            processes = {rank: text.decode() for rank, text in self._answers(store, "process")}
        except RuntimeError:
            return None
        with suppress(RuntimeError):  # the rank that runs the store ends once the others have read, which breaks their waits
            store.set(f"read/{self.rank}", "")
            _wait_for(store, [f"read/{rank}" for rank in reports], 0.2 * self.grace)
        return reports, processes

    def _answers(self, store: Any, kind: str) -> list[tuple[int, bytes]]:
        """Return the rank and the value of each rank that has set a key of this kind."""
        keys = [(rank, f"{kind}/{rank}") for rank in range(self.world_size)]
        return [(rank, store.get(key)) for rank, key in keys if store.check([key])]

    def _open_store(self) -> Any:
        """Open a separate connection to the store of the ranks: a waiting main thread locks its own."""
        if self._store_of_one is not None:
            return self._store_of_one
        address, port = self._address
        timeout = timedelta(seconds=self.grace)
        store = dist.TCPStore(address, port, is_master=False, timeout=timeout, wait_for_workers=False)  # type: ignore[attr-defined]
        return dist.PrefixStore(f"watchdog/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)  # type: ignore[attr-defined]


def _wait_for(store: Any, keys: list[str], seconds: float) -> None:
    """Wait until all keys are set, for at most `seconds`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and not store.check(keys):
        time.sleep(0.05)


def _within(seconds: float, work: Callable[[], Any]) -> Any:
    """Return the result of `work`, or None if it takes longer than `seconds`."""
    result: list[Any] = []
    thread = threading.Thread(target=lambda: result.append(work()), name="watchdog report", daemon=True)
    thread.start()
    thread.join(seconds)
    return result[0] if result else None

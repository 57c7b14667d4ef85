"""The bounded queue of requests and its threads; requests of one kind that wait together share a batch.

A thread takes the first waiting job, waits a few milliseconds for others, and computes all jobs with the same key in one call. A job
gets its result, or its own error, as soon as it is known. After an error of the whole call each job without a result is computed alone.

Each job has a lane, of which only some calls run at once, so that jobs of one model do not take the threads of another: a thread takes
the first job whose lane has a free call. The models of this machine compute one call at a time; the next one is prepared meanwhile, to
write only if its batch is full. An upstream makes its own batches, so its lane has many calls.
"""

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from megatron_ledom.errors import TransientError
from megatron_ledom.serving.metrics import Metrics

Settle = Callable[[int, Any], None]
"""Gives a job its result or an exception, by its number in the call; a job that has one keeps it."""
Compute = Callable[[Sequence[Any], Settle], None]
"""Computes the payloads of several jobs with one key, and settles each."""


END_SECONDS = 30.0
"""Time that running batches get at the end, when nobody waits for them any more. One that hangs must not keep the server."""


class QueueFull(TransientError):
    """The queue has no place for a further request."""


class Ending(TransientError):
    """The server ends and accepts no further request."""


@dataclass(frozen=True, slots=True)
class Lane:
    """Jobs that share a limit: at most `calls` calls at once, and `full_calls` more if their batches are full."""

    name: Hashable
    calls: int = 1
    full_calls: int = 0

    @property
    def most_calls(self) -> int:
        """The most calls at once."""
        return self.calls + self.full_calls


LOCAL_LANE = Lane("models", calls=1, full_calls=1)
"""The lane of jobs that write with models of this machine."""
SCORE_LANE = Lane("scores", calls=2)
"""The lane of jobs that score with models of this machine: one is prepared while another is computed, because half a batch costs little more
a row; half a batch that writes would take as long as a whole one."""


@dataclass(slots=True, eq=False)
class Job:
    """A request for a thread.

    key: its kind and settings; jobs with equal keys may share a call of `compute`, and have one lane. num_rows: its sequences; max_rows:
    the most sequences of one call, unless a single job has more. cancelled: set if nobody waits for the result any more.
    """

    key: tuple[Hashable, ...]
    compute: Compute
    payload: Any
    num_rows: int
    max_rows: int
    lane: Lane = LOCAL_LANE
    future: "Future[Any]" = field(default_factory=Future)
    cancelled: threading.Event = field(default_factory=threading.Event)
    arrived_seconds: float = field(default_factory=time.monotonic)


class WorkQueue:
    """See the top of this file. A job is never divided."""

    def __init__(self, *, max_jobs: int, window_seconds: float, metrics: Metrics, num_threads: int = 1) -> None:
        self._max_jobs, self._window = max_jobs, window_seconds
        self._metrics = metrics
        self._waiting: deque[Job] = deque()
        self._running: Counter[Lane] = Counter()
        self._changed = threading.Condition()
        self._is_ended = False
        self._threads = [
            threading.Thread(target=self._run, name=f"models {number}", daemon=True) for number in range(num_threads)
        ]

    def start(self) -> None:
        """Start the threads."""
        for thread in self._threads:
            thread.start()

    @property
    def is_ready(self) -> bool:
        """True while jobs are accepted."""
        return all(thread.is_alive() for thread in self._threads) and not self._is_ended

    def end(self, seconds: float = END_SECONDS) -> None:
        """End each thread after its current batch, or after some seconds leave it; jobs that still wait fail."""
        deadline = time.monotonic() + seconds
        with self._changed:
            self._is_ended = True
            for job in self._waiting:
                _settle(job, Ending("the server ended before it computed this request; send it again"))
            self._waiting.clear()
            self._changed.notify_all()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(max(0.0, deadline - time.monotonic()))

    def submit(self, job: Job) -> None:
        """Put a job into the queue. Raises QueueFull or Ending."""
        with self._changed:
            if self._is_ended:
                raise Ending("the server is shutting down; send the request again, to another server or later")
            if len(self._waiting) >= self._max_jobs:
                raise QueueFull(f"{self._max_jobs} requests wait already; send this one again later")
            self._waiting.append(job)
            self._metrics.waiting.set(len(self._waiting))
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Free the place of a job that nobody waits for; a job that is computed now ends at its next step."""
        job.cancelled.set()
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)
                self._metrics.waiting.set(len(self._waiting))

    def _run(self) -> None:
        while jobs := self._take():
            try:
                self._compute(jobs)
            finally:
                with self._changed:
                    self._running[jobs[0].lane] -= 1  # this thread looks for the next job at once

    def _take(self) -> list[Job]:
        """Return the next jobs of one key; none if the queue ends."""
        with self._changed:
            while not self._is_ended and (first := self._first_due()) is None:
                self._changed.wait(self._rest_of_window())
            if self._is_ended or first is None:
                return []
            chosen = self._of_one_key(first)
            self._running[first.lane] += 1
            for job in chosen:
                self._waiting.remove(job)
            self._metrics.waiting.set(len(self._waiting))
            self._changed.notify()  # another thread looks after the rest
        return chosen

    def _first_of_each_lane(self) -> list[Job]:
        """Return the first waiting job of each lane that has a free call."""
        first: dict[Lane, Job] = {}
        for job in self._waiting:
            first.setdefault(job.lane, job)
        return [job for job in first.values() if self._has_free_call(job)]

    def _has_free_call(self, job: Job) -> bool:
        running = self._running[job.lane]
        return running < job.lane.calls or (running < job.lane.most_calls and self._is_full(job))

    def _first_due(self) -> Job | None:
        """Return the first job that may start: its batch is full or has waited long enough."""
        return next((job for job in self._first_of_each_lane() if self._is_due(job)), None)

    def _is_due(self, first: Job) -> bool:
        return self._rest(first) == 0 or self._is_full(first)

    def _is_full(self, first: Job) -> bool:
        return sum(job.num_rows for job in self._waiting if job.key == first.key) >= first.max_rows

    def _rest(self, job: Job) -> float:
        """Return the seconds for which a job still waits for others of its batch."""
        return max(0.0, job.arrived_seconds + self._window - time.monotonic())

    def _rest_of_window(self) -> float | None:
        """Return the seconds until a waiting job is due; None if none may start."""
        return min(map(self._rest, self._first_of_each_lane()), default=None)

    def _of_one_key(self, first: Job) -> list[Job]:
        chosen: list[Job] = []
        num_rows = 0
        for job in self._waiting:
            if job.key != first.key:
                continue
            if chosen and num_rows + job.num_rows > job.max_rows:
                break
            chosen.append(job)
            num_rows += job.num_rows
        return chosen

    def _compute(self, jobs: list[Job]) -> None:
        kind = str(jobs[0].key[0])
        self._metrics.batch_rows.labels(kind).observe(sum(job.num_rows for job in jobs))
        start = time.monotonic()
        try:
            _call(jobs)
        except Exception as error:
            for job in jobs:
                _call_alone(job, error if len(jobs) == 1 else None)
        self._metrics.batch_seconds.labels(kind).observe(time.monotonic() - start)


def _call(jobs: list[Job]) -> None:
    jobs[0].compute([job.payload for job in jobs], lambda number, result: _settle(jobs[number], result))
    for job in jobs:
        if not job.future.done() and not job.cancelled.is_set():
            _settle(job, RuntimeError("a computation ended without a result"))


def _call_alone(job: Job, error: Exception | None) -> None:
    """Compute a job that has no result after an error of its batch; `error`: of the job itself, with which it fails."""
    if job.future.done() or job.cancelled.is_set():
        return
    try:
        if error is not None:
            raise error
        _call([job])
    except Exception as own_error:
        _settle(job, own_error)


def _settle(job: Job, result: Any) -> None:
    if job.future.done() or not job.future.set_running_or_notify_cancel():
        return
    if isinstance(result, Exception):
        job.future.set_exception(result)
    else:
        job.future.set_result(result)

"""The bounded queue of requests and the one thread that owns the models; requests of one kind that wait together share a batch.

The thread takes the first waiting job, waits a few milliseconds for others, and computes all jobs with the same key at once. A job
gets its result, or its own error, as soon as it is known. After an error of the whole call each job without a result is computed alone.
Models of an upstream need no owner and no batches of ours: then several threads wait for the upstream's answers.
"""

import threading
import time
from collections import deque
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


class QueueFull(TransientError):
    """The queue has no place for a further request."""


class Ending(TransientError):
    """The server ends and accepts no further request."""


@dataclass(slots=True, eq=False)
class Job:
    """A request for the thread.

    key: its kind and settings; jobs with equal keys may share a call of `compute`. num_rows: its sequences; max_rows: the most
    sequences of one call, unless a single job has more. cancelled: set if nobody
    waits for the result any more.
    """

    key: tuple[Hashable, ...]
    compute: Compute
    payload: Any
    num_rows: int
    max_rows: int
    future: "Future[Any]" = field(default_factory=Future)
    cancelled: threading.Event = field(default_factory=threading.Event)
    arrived_seconds: float = field(default_factory=time.monotonic)


class WorkQueue:
    """See the top of this file. A job is never divided."""

    def __init__(self, *, max_jobs: int, window_seconds: float, metrics: Metrics, num_threads: int = 1) -> None:
        self._max_jobs, self._window = max_jobs, window_seconds
        self._metrics = metrics
        self._waiting: deque[Job] = deque()
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

    def end(self) -> None:
        """End each thread after its current batch; jobs that still wait fail."""
        with self._changed:
            self._is_ended = True
            for job in self._waiting:
                _settle(job, Ending("the server ended before it computed this request; send it again"))
            self._waiting.clear()
            self._changed.notify_all()
        for thread in self._threads:
            if thread.is_alive():
                thread.join()

    def submit(self, job: Job) -> None:
        """Put a job into the queue. Raises QueueFull or Ending."""
        with self._changed:
            if self._is_ended:
                raise Ending("the server is shutting down; send the request again, to another server or later")
            if len(self._waiting) >= self._max_jobs:
                raise QueueFull(f"{self._max_jobs} requests wait already; send this one again later")
            self._waiting.append(job)
            self._metrics.waiting.set(len(self._waiting))
            self._changed.notify_all()

    def cancel(self, job: Job) -> None:
        """Free the place of a job that nobody waits for; a job that is computed now ends at its next step."""
        job.cancelled.set()
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)
                self._metrics.waiting.set(len(self._waiting))

    def _run(self) -> None:
        while jobs := self._take():
            self._compute(jobs)

    def _take(self) -> list[Job]:
        """Return the next jobs of one key; none if the queue ends."""
        with self._changed:
            while not self._is_ended and not self._is_batch_due():
                self._changed.wait(self._rest_of_window())
            chosen = self._first_of_one_key()
            for job in chosen:
                self._waiting.remove(job)
            self._metrics.waiting.set(len(self._waiting))
        return chosen

    def _is_batch_due(self) -> bool:
        """Return True if a job waits, and its batch is full or has waited long enough."""
        return bool(self._waiting) and (self._num_rows() >= self._waiting[0].max_rows or self._rest_of_window() == 0)

    def _rest_of_window(self) -> float | None:
        """Return the seconds for which the first job still waits for others; None without a job."""
        if not self._waiting:
            return None
        return max(0.0, self._waiting[0].arrived_seconds + self._window - time.monotonic())

    def _num_rows(self) -> int:
        """Return the sequences of all waiting jobs with the key of the first."""
        return sum(job.num_rows for job in self._waiting if job.key == self._waiting[0].key)

    def _first_of_one_key(self) -> list[Job]:
        chosen: list[Job] = []
        num_rows = 0
        for job in self._waiting:
            if job.key != self._waiting[0].key:
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

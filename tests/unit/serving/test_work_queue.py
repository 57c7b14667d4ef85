"""The queue of the server: batches of one key, the limit, cancelled jobs, errors of one job, the end."""

import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from megatron_ledom.errors import DataError
from megatron_ledom.serving.metrics import Metrics
from megatron_ledom.serving.work_queue import Ending, Job, QueueFull, WorkQueue


class Recorder:
    """Computes payloads as themselves, and records its calls; "bad" raises; the latch holds the first call."""

    def __init__(self) -> None:
        self.calls: list[list[Any]] = []
        self.latch = threading.Event()

    def compute(self, payloads: Sequence[Any]) -> list[Any]:
        self.calls.append(list(payloads))
        assert self.latch.wait(30)
        if "bad" in payloads:
            raise DataError("this one is bad")
        return list(payloads)

    def job(self, payload: Any, key: str = "a", num_rows: int = 1) -> Job:
        return Job((key,), self.compute, payload, num_rows, 4)


@pytest.fixture
def queue() -> Iterator[WorkQueue]:
    made = WorkQueue(max_jobs=6, window_seconds=0.2, metrics=Metrics())
    made.start()
    yield made
    made.end()


def test_jobs_of_one_key_share_calls_up_to_their_rows(queue: WorkQueue) -> None:
    recorder = Recorder()
    recorder.latch.set()
    jobs = [recorder.job(1), recorder.job(2, "b"), recorder.job(3), recorder.job(4, num_rows=3), recorder.job(5, num_rows=9)]
    for job in jobs:
        queue.submit(job)
    assert [job.future.result(30) for job in jobs] == [1, 2, 3, 4, 5]
    assert sorted(recorder.calls) == [[1, 3], [2], [4], [5]]


def test_a_bad_job_fails_alone(queue: WorkQueue) -> None:
    recorder = Recorder()
    recorder.latch.set()
    jobs = [recorder.job(payload) for payload in (1, "bad", 3)]
    for job in jobs:
        queue.submit(job)
    assert (jobs[0].future.result(30), jobs[2].future.result(30)) == (1, 3)
    with pytest.raises(DataError, match="this one is bad"):
        jobs[1].future.result(30)
    assert recorder.calls == [[1, "bad", 3], [1], ["bad"], [3]]


def test_a_full_queue_refuses_and_a_cancelled_job_frees_its_place(queue: WorkQueue) -> None:
    recorder = Recorder()
    queue.submit(recorder.job("first", num_rows=9))
    while not recorder.calls:
        time.sleep(0.01)
    waiting = [recorder.job(number) for number in range(6)]
    for job in waiting:
        queue.submit(job)
    with pytest.raises(QueueFull, match="6 requests wait"):
        queue.submit(recorder.job("late"))
    queue.cancel(waiting[0])
    late = recorder.job("late")
    queue.submit(late)
    recorder.latch.set()
    assert late.future.result(30) == "late"
    assert waiting[0].cancelled.is_set()
    assert not any(0 in call for call in recorder.calls)


def test_at_the_end_waiting_jobs_fail_and_no_further_one_is_accepted() -> None:
    recorder = Recorder()
    queue = WorkQueue(max_jobs=6, window_seconds=0, metrics=Metrics())
    queue.start()
    running, waiting = recorder.job(1), recorder.job(2)
    queue.submit(running)
    while not recorder.calls:
        time.sleep(0.01)
    queue.submit(waiting)
    threading.Timer(0.2, recorder.latch.set).start()
    queue.end()
    assert running.future.result(0) == 1
    with pytest.raises(Ending):
        waiting.future.result(0)
    with pytest.raises(Ending):
        queue.submit(recorder.job(3))
    assert not queue.is_ready

"""The queue of the server: batches of one key, the limit, cancelled jobs, errors of one job, the end."""

import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from megatron_ledom.errors import DataError
from megatron_ledom.serving.metrics import Metrics
from megatron_ledom.serving.work_queue import LOCAL_LANE, Ending, Job, Lane, QueueFull, Settle, WorkQueue
from tests.support.served import until


class Recorder:
    """Computes payloads as themselves, and records its calls; "bad" raises; the latch holds the first call."""

    def __init__(self) -> None:
        self.calls: list[list[Any]] = []
        self.latch = threading.Event()

    def compute(self, payloads: Sequence[Any], settle: Settle) -> None:
        self.calls.append(list(payloads))
        for number, payload in enumerate(payloads):
            if payload == "short":
                settle(number, payload)
            if payload == "wrong":
                settle(number, DataError("this one is wrong"))
        assert self.latch.wait(30)
        if "bad" in payloads:
            raise DataError("this one is bad")
        for number, payload in enumerate(payloads):
            settle(number, payload)

    def job(self, payload: Any, key: str = "a", num_rows: int = 1, lane: Lane = LOCAL_LANE) -> Job:
        return Job((key,), self.compute, payload, num_rows, 4, lane)


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


def test_a_job_with_a_result_or_an_error_of_its_own_does_not_wait_for_its_batch(queue: WorkQueue) -> None:
    recorder = Recorder()
    jobs = {payload: recorder.job(payload) for payload in ("short", "wrong", "long")}
    for job in jobs.values():
        queue.submit(job)
    assert jobs["short"].future.result(30) == "short"
    with pytest.raises(DataError, match="this one is wrong"):
        jobs["wrong"].future.result(30)
    assert not jobs["long"].future.done()
    recorder.latch.set()
    assert jobs["long"].future.result(30) == "long"
    assert recorder.calls == [["short", "wrong", "long"]]


def test_a_cancelled_job_is_not_computed_again_after_an_error_of_its_batch(queue: WorkQueue) -> None:
    recorder = Recorder()
    jobs = {payload: recorder.job(payload) for payload in ("bad", "left", "kept", "short")}
    for job in jobs.values():
        queue.submit(job)
    assert jobs["short"].future.result(30) == "short"
    queue.cancel(jobs["left"])
    recorder.latch.set()
    assert jobs["kept"].future.result(30) == "kept"
    assert recorder.calls == [["bad", "left", "kept", "short"], ["bad"], ["kept"]]


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


def test_a_busy_lane_batches_what_arrives_meanwhile_and_leaves_the_threads_to_others() -> None:
    queue = WorkQueue(max_jobs=20, window_seconds=0, metrics=Metrics(), num_threads=3)
    queue.start()
    local, upstream, lane = Recorder(), Recorder(), Lane("one at a time")
    jobs = [local.job(0, lane=lane)]
    queue.submit(jobs[0])
    while not local.calls:
        time.sleep(0.01)
    for number in range(1, 5):
        jobs.append(local.job(number, lane=lane))
        queue.submit(jobs[-1])
    others = [upstream.job(number, "b", 9, Lane("upstream", 2)) for number in range(3)]
    for job in others:
        queue.submit(job)
    while len(upstream.calls) < 2:
        time.sleep(0.01)
    time.sleep(0.1)
    assert (local.calls, sorted(upstream.calls)) == ([[0]], [[0], [1]])
    upstream.latch.set()
    assert [job.future.result(30) for job in others] == [0, 1, 2]
    assert local.calls == [[0]]
    local.latch.set()
    assert [job.future.result(30) for job in jobs] == [0, 1, 2, 3, 4]
    assert local.calls == [[0], [1, 2, 3, 4]]
    queue.end()


def test_the_next_call_of_the_local_models_is_prepared_when_its_batch_is_full() -> None:
    queue = WorkQueue(max_jobs=20, window_seconds=0, metrics=Metrics(), num_threads=3)
    queue.start()
    recorder = Recorder()
    jobs = [recorder.job(number) for number in range(10)]
    queue.submit(jobs[0])
    until(lambda: recorder.calls == [[0]])
    for job in jobs[1:4]:
        queue.submit(job)
    time.sleep(0.1)
    assert recorder.calls == [[0]]  # three of the four rows of a batch: a fourth may still come
    for job in jobs[4:]:
        queue.submit(job)
    until(lambda: recorder.calls == [[0], [1, 2, 3, 4]])
    time.sleep(0.1)
    assert len(recorder.calls) == 2  # a third full batch waits
    recorder.latch.set()
    assert [job.future.result(30) for job in jobs] == list(range(10))
    assert recorder.calls == [[0], [1, 2, 3, 4], [5, 6, 7, 8], [9]]
    queue.end()


def test_a_call_that_hangs_does_not_keep_the_end() -> None:
    queue, recorder = WorkQueue(max_jobs=6, window_seconds=0, metrics=Metrics()), Recorder()
    queue.start()
    queue.submit(recorder.job(1))
    until(lambda: recorder.calls == [[1]])
    start = time.monotonic()
    queue.end(seconds=0.2)
    assert time.monotonic() - start < 10
    recorder.latch.set()


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

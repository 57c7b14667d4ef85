"""Simulated schedules: megatron-core's order, the formula of the bubble, and the micro-batches in flight."""

from collections import Counter
from itertools import pairwise

import pytest

from megatron_ledom.planning.schedule import PassTimes, last_end, most_in_flight, pipeline_seconds, simulate, stage_order


def even(stages: int, chunks: int, forward: float = 1.0, backward: float = 2.0, **changed: float) -> PassTimes:
    rows = (
        tuple((forward / chunks,) * chunks for _ in range(stages)),
        tuple((backward / chunks,) * chunks for _ in range(stages)),
    )
    return PassTimes(*rows, **changed)


@pytest.mark.parametrize(("stages", "chunks", "microbatches"), [(4, 1, 8), (4, 1, 4), (4, 2, 8), (8, 3, 16), (2, 4, 2)])
def test_bubble_is_that_of_the_formula(stages: int, chunks: int, microbatches: int) -> None:
    """The bubble takes (p - 1) / v passes of one micro-batch (arXiv 2104.04473, section 2.2)."""
    expected = 3.0 * (microbatches + (stages - 1) / chunks)
    assert last_end(simulate(even(stages, chunks), microbatches)) == pytest.approx(expected)


@pytest.mark.parametrize(("stages", "chunks"), [(1, 1), (4, 1), (4, 2), (6, 3)])
def test_extrapolated_rounds_equal_simulated_ones(stages: int, chunks: int) -> None:
    uneven = tuple(tuple(1.0 + 0.3 * (stage == stages - 1) + 0.1 * chunk for chunk in range(chunks)) for stage in range(stages))
    times = PassTimes(uneven, uneven, transfer=0.05, transfer_blocks=chunks == 1)
    for rounds in (2, 7, 9):
        assert pipeline_seconds(times, rounds * stages) == pytest.approx(last_end(simulate(times, rounds * stages)))


@pytest.mark.parametrize(("stages", "chunks", "microbatches"), [(4, 1, 8), (4, 2, 8), (3, 3, 6)])
def test_every_pass_runs_once_and_after_its_input(stages: int, chunks: int, microbatches: int) -> None:
    events = simulate(even(stages, chunks, transfer=0.25), microbatches)
    passes = Counter((event.op.is_forward, event.op.chunk * stages + event.stage, event.op.microbatch) for event in events)
    assert set(passes.values()) == {1}
    assert len(passes) == 2 * stages * chunks * microbatches
    ends = {(e.op.is_forward, e.op.chunk * stages + e.stage, e.op.microbatch): e.end for e in events}
    for event in events:
        virtual = event.op.chunk * stages + event.stage
        before = virtual - 1 if event.op.is_forward else virtual + 1
        if 0 <= before < stages * chunks:
            assert event.start >= ends[event.op.is_forward, before, event.op.microbatch] + 0.25
    for stage in range(stages):
        own = sorted((e for e in events if e.stage == stage), key=lambda e: e.start)
        assert all(one.end <= other.start for one, other in pairwise(own))


@pytest.mark.parametrize(("stages", "chunks", "microbatches"), [(4, 2, 8), (2, 3, 4), (4, 4, 4)])
def test_order_of_chunks_is_that_of_megatron_core(stages: int, chunks: int, microbatches: int) -> None:
    schedules = pytest.importorskip("megatron.core.pipeline_parallel.schedules")
    table = schedules.get_schedule_table(microbatches, chunks, stages)
    forwards = [op for op in stage_order(0, stages, chunks, microbatches) if op.is_forward]
    assert [(op.microbatch, op.chunk) for op in forwards] == [tuple(pair) for pair in table]
    backwards = [op for op in stage_order(0, stages, chunks, microbatches) if not op.is_forward]
    assert [(op.microbatch, chunks - 1 - op.chunk) for op in backwards] == [tuple(pair) for pair in table]


def test_micro_batches_in_flight_are_those_of_the_paper() -> None:
    """On the first stage: p micro-batches, times 1 + (p - 1) / (p v) if interleaved (arXiv 2205.05198, section 4.2.3)."""
    assert most_in_flight(0, 8, 1, 64) == (8,)
    assert [most_in_flight(stage, 4, 1, 64) for stage in range(4)] == [(4,), (3,), (2,), (1,)]
    assert sum(most_in_flight(0, 8, 3, 64)) == 8 * 3 + 8 - 1
    assert most_in_flight(0, 8, 1, 2) == (2,)


def test_a_blocking_send_takes_the_senders_time() -> None:
    free = last_end(simulate(even(4, 1, transfer=0.1), 16))
    blocked = last_end(simulate(even(4, 1, transfer=0.1, transfer_blocks=True), 16))
    assert blocked > free > last_end(simulate(even(4, 1), 16))


@pytest.mark.parametrize(("stages", "chunks", "microbatches"), [(4, 1, 8), (4, 1, 2), (4, 3, 8), (2, 2, 2)])
def test_most_in_flight_is_the_maximum_over_the_schedule(stages: int, chunks: int, microbatches: int) -> None:
    for stage in range(stages):
        counts, most = [0] * chunks, [0] * chunks
        for op in stage_order(stage, stages, chunks, microbatches):
            counts[op.chunk] += 1 if op.is_forward else -1
            most = list(counts) if sum(counts) > sum(most) else most
        assert most_in_flight(stage, stages, chunks, microbatches) == tuple(most)

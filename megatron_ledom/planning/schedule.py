"""Pipeline schedules of megatron-core, event by event: 1F1B and interleaved (Narayanan et al. 2021, arXiv 2104.04473, section 2.2).

A virtual stage is a model chunk, numbered along the model: chunk c of stage s is virtual stage c x stages + s.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

STEADY_ROUNDS = 4
"""Number of simulated rounds of micro-batches. The schedule then repeats, so the time of later rounds is extrapolated."""


@dataclass(frozen=True, slots=True)
class Op:
    """One forward or backward pass of one model chunk for one micro-batch."""

    is_forward: bool
    chunk: int
    microbatch: int


@dataclass(frozen=True, slots=True)
class Event:
    """One pass on its stage, with start and end in seconds from the start of the iteration."""

    stage: int
    op: Op
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class PassTimes:
    """Seconds of each pass by [stage][chunk], and of the transfer to the next virtual stage."""

    forward: tuple[tuple[float, ...], ...]
    backward: tuple[tuple[float, ...], ...]
    transfer: float = 0.0
    transfer_blocks: bool = False
    """True if the sender waits, as in megatron-core's plain schedule; the interleaved one overlaps."""
    deferred: float = 0.0
    """Seconds of work that the last stage does after its passes, while the others finish theirs."""


def num_warmup(stage: int, stages: int, chunks: int, microbatches: int) -> int:
    """Return the number of forward passes of a stage before its first pair of a forward and a backward pass."""
    later_stages = stages - stage - 1
    return min(microbatches * chunks, later_stages if chunks == 1 else 2 * later_stages + (chunks - 1) * stages)


@cache
def stage_order(stage: int, stages: int, chunks: int, microbatches: int) -> tuple[Op, ...]:
    """Return the passes of one stage in order: warm-up forwards, then pairs of forward and backward, then the last backwards."""
    total = microbatches * chunks
    warmup = num_warmup(stage, stages, chunks, microbatches)
    forwards = [Op(True, *_chunk_and_microbatch(index, stages, chunks)) for index in range(total)]
    backwards = []
    for index in range(total):
        chunk, microbatch = _chunk_and_microbatch(index, stages, chunks)
        backwards.append(Op(False, chunks - 1 - chunk, microbatch))
    order = forwards[:warmup]
    for index in range(total - warmup):
        order += [forwards[warmup + index], backwards[index]]
    return tuple(order + backwards[total - warmup :])


def _chunk_and_microbatch(index: int, stages: int, chunks: int) -> tuple[int, int]:
    """Return chunk and micro-batch of the index-th pass. Rounds of `stages` micro-batches pass through one chunk after another."""
    if chunks == 1:
        return 0, index
    rounds, rest = divmod(index, stages * chunks)
    chunk, within = divmod(rest, stages)
    return chunk, rounds * stages + within


@cache
def most_in_flight(stage: int, stages: int, chunks: int, microbatches: int) -> tuple[int, ...]:
    """Return the largest number of micro-batches in flight on a stage, by chunk: after the warm-up and one more forward."""
    forwards = min(num_warmup(stage, stages, chunks, microbatches) + 1, microbatches * chunks)
    counts = [0] * chunks
    for index in range(forwards):
        counts[_chunk_and_microbatch(index, stages, chunks)[0]] += 1
    return tuple(counts)


def simulate(times: PassTimes, microbatches: int) -> list[Event]:
    """Return all passes with start and end. A pass starts when its stage is free and its input has arrived."""
    stages, chunks = len(times.forward), len(times.forward[0])
    orders = [stage_order(stage, stages, chunks, microbatches) for stage in range(stages)]
    position, free = [0] * stages, [0.0] * stages
    done: dict[tuple[bool, int, int], float] = {}
    events: list[Event] = []
    last = stages * chunks - 1
    waiting = list(range(stages))
    while waiting:
        moved = False
        for stage in waiting:
            while position[stage] < len(orders[stage]):
                op = orders[stage][position[stage]]
                virtual = op.chunk * stages + stage
                ready = _input_time(op, virtual, last, done, times.transfer if stages > 1 else 0.0)
                if ready is None:
                    break
                start = max(free[stage], ready)
                end = start + (times.forward if op.is_forward else times.backward)[stage][op.chunk]
                done[op.is_forward, virtual, op.microbatch] = end
                sends = virtual < last if op.is_forward else virtual > 0
                free[stage] = end + (times.transfer if times.transfer_blocks and sends else 0.0)
                events.append(Event(stage, op, start, end))
                position[stage] += 1
                moved = True
        waiting = [stage for stage in waiting if position[stage] < len(orders[stage])]
        assert moved or not waiting, "the schedule has a deadlock"
    return events


def _input_time(op: Op, virtual: int, last: int, done: dict[tuple[bool, int, int], float], transfer: float) -> float | None:
    """Return the time at which the input of a pass arrives; None if it is not known yet."""
    if op.is_forward:
        if virtual == 0:
            return 0.0
        before = done.get((True, virtual - 1, op.microbatch))
    elif virtual == last:
        return done.get((True, last, op.microbatch))
    else:
        before = done.get((False, virtual + 1, op.microbatch))
    return None if before is None else before + transfer


def pipeline_seconds(times: PassTimes, microbatches: int) -> float:
    """Return the seconds of the whole schedule. Only the first rounds of many micro-batches are simulated, as they repeat."""
    stages = len(times.forward)
    if stages == 1:
        return microbatches * (sum(times.forward[0]) + sum(times.backward[0])) + times.deferred
    short, long = (STEADY_ROUNDS - 1) * stages, STEADY_ROUNDS * stages
    rest = microbatches % stages
    if microbatches <= long or (len(times.forward[0]) > 1 and rest):
        end, idle = _simulated_seconds(times, microbatches)
        return end + max(0.0, times.deferred - idle)
    (short_end, _), (long_end, idle) = _simulated_seconds(times, short), _simulated_seconds(times, long)
    steady = long_end + (microbatches - long) * (long_end - short_end) / stages
    return steady + max(0.0, times.deferred - idle)


@cache
def _simulated_seconds(times: PassTimes, microbatches: int) -> tuple[float, float]:
    """Return the end of the schedule, and the seconds that the last stage waits for it."""
    events, last = simulate(times, microbatches), len(times.forward) - 1
    end = last_end(events)
    return end, end - last_end([event for event in events if event.stage == last])


def last_end(events: Sequence[Event]) -> float:
    """Return the end of the last pass, in seconds."""
    return max(event.end for event in events)

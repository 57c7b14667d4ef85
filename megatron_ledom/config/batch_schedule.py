"""Schedule of the global batch size: a function of the samples consumed so far, so that a resumed run needs no history.

`train.rampup_batch_size` follows RampupBatchsizeNumMicroBatchesCalculator of megatron-core 0.16, which 0.19 has no more;
`train.batch_size_schedule` follows StepBatchsizeNumMicroBatchesCalculator of 0.19. Both are here, because all versions must
consume the same samples in an iteration, and because the length of a run is needed before torch is imported.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_ledom.config.schema import RunConfig


@dataclass(frozen=True, slots=True)
class BatchStep:
    """One global batch size of a schedule."""

    first_sample: int
    """Number of consumed samples from which it holds, for iterations that begin there or later."""
    global_batch_size: int
    name: str
    """Its place in the config, for error messages."""


@dataclass(frozen=True, slots=True)
class BatchPhase:
    """Consecutive iterations of a run with one global batch size."""

    first_iteration: int
    """Number of its first iteration, from 1."""
    num_iterations: int
    first_sample: int
    """Samples consumed before its first iteration."""
    global_batch_size: int

    @property
    def last_iteration(self) -> int:
        """Number of its last iteration."""
        return self.first_iteration + self.num_iterations - 1

    @property
    def num_samples(self) -> int:
        """Samples of all its iterations."""
        return self.num_iterations * self.global_batch_size


def has_batch_schedule(config: RunConfig) -> bool:
    """Return True if the global batch size changes by a schedule."""
    return config.train.rampup_batch_size is not None or config.train.batch_size_schedule is not None


def batch_steps(config: RunConfig) -> list[BatchStep]:
    """Return the global batch sizes of the run in their order; without a schedule there is one."""
    train = config.train
    if train.batch_size_schedule:
        key = "train.batch_size_schedule"
        return [
            BatchStep(tokens // config.data.seq_length, size, f"{key}[{number}]=[{tokens}, {size}]")
            for number, (tokens, size) in enumerate(train.batch_size_schedule)
        ]
    if train.rampup_batch_size is not None:
        return [*_rampup_steps(*train.rampup_batch_size, train.global_batch_size)]
    return [BatchStep(0, train.global_batch_size, f"train.global_batch_size={train.global_batch_size}")]


def _rampup_steps(start: int, increment: int, samples: int, last: int) -> Iterator[BatchStep]:
    """Yield the steps of a ramp-up, with the rounding of megatron-core: step k begins where int(consumed / (samples / n)) is k."""
    key, count = f"train.rampup_batch_size=[{start}, {increment}, {samples}]", max(0, (last - start) // increment)
    for number in range(count):
        each = samples / count
        first = max(0, -(-number * samples // count) - 2)
        while int(first / each) < number:
            first += 1
        size = start + number * increment
        yield BatchStep(first, size, f"step {number + 1} of {key}, of {size} samples,")
    end = samples + 1
    while count and end > 0 and int((end - 1) / (samples / count)) >= count:
        end -= 1
    yield BatchStep(end if count else 0, last, f"train.global_batch_size={last}")


def batch_size_at(config: RunConfig, consumed_samples: int) -> int:
    """Return the samples of the iteration that begins after `consumed_samples`."""
    steps = batch_steps(config)
    return next((step for step in reversed(steps) if step.first_sample <= consumed_samples), steps[0]).global_batch_size


def batch_phases(
    config: RunConfig, *, iteration: int = 0, consumed_samples: int = 0, train_iters: int | None = None
) -> list[BatchPhase]:
    """Return the phases from a position to the end of the run, or to `train_iters`.

    iteration, consumed_samples: iterations done and samples consumed there.
    """
    end = config.train.train_iters if train_iters is None else train_iters
    steps = batch_steps(config)
    found = []
    for step, following in zip(steps, [*steps[1:], None], strict=True):
        count, size = end - iteration, step.global_batch_size
        if following is not None:
            count = min(count, -(-(following.first_sample - consumed_samples) // size))
        if count > 0:
            found.append(BatchPhase(iteration + 1, count, consumed_samples, size))
            iteration, consumed_samples = iteration + count, consumed_samples + count * size
    return found


def samples_before(config: RunConfig, iteration: int) -> int:
    """Return the samples of the first `iteration` iterations of a run whose schedule was never changed."""
    return sum(phase.num_samples for phase in batch_phases(config, train_iters=iteration))


def iterations_for(config: RunConfig, samples: int, *, iteration: int = 0, consumed_samples: int = 0) -> int:
    """Return the largest number of iterations that together have at most `samples` samples.

    iteration, consumed_samples: iterations done and samples consumed so far; both numbers include them.
    """
    smallest = min(step.global_batch_size for step in batch_steps(config))
    done, most = iteration, iteration + max(0, samples - consumed_samples) // smallest
    for phase in batch_phases(config, iteration=iteration, consumed_samples=consumed_samples, train_iters=most):
        whole = min(phase.num_iterations, max(0, samples - phase.first_sample) // phase.global_batch_size)
        done += whole
        if whole < phase.num_iterations:
            break
    return done


def largest_batch(config: RunConfig) -> int:
    """Return the largest global batch size that the run reaches."""
    return max(phase.global_batch_size for phase in batch_phases(config))

"""Rules about the global batch size and its schedule, for every phase of a run; `checks.check_config` collects them."""

from collections.abc import Iterator
from itertools import pairwise

from megatron_ledom.config.batch_schedule import BatchStep, batch_steps, iterations_for, samples_before
from megatron_ledom.config.derived import data_parallel_size, model_parallel_size, next_multiple
from megatron_ledom.config.schema import RunConfig

Problems = Iterator[str]


def batch_schedule(config: RunConfig) -> Problems:
    """Check that there is one schedule of the batch size, in order, and that it ends with train.global_batch_size."""
    train = config.train
    if train.rampup_batch_size is not None and train.batch_size_schedule is not None:
        yield "train.rampup_batch_size and train.batch_size_schedule are both set; remove one of them"
    elif train.rampup_batch_size is not None:
        yield from _rampup(config)
    elif train.batch_size_schedule is not None:
        yield from _listed(config)


def _rampup(config: RunConfig) -> Problems:
    assert config.train.rampup_batch_size is not None
    (start, increment, samples), last = config.train.rampup_batch_size, config.train.global_batch_size
    key = f"train.rampup_batch_size=[{start}, {increment}, {samples}]"
    if start >= last:
        yield f"{key} starts with {start} samples, not below train.global_batch_size={last}; start lower, or remove it"
    elif (last - start) % increment:
        yield (
            f"{key}: the increment {increment} does not divide train.global_batch_size - {start} = {last - start}; with it,"
            f" train.global_batch_size can be {start + next_multiple(last - start, increment)}"
        )


def _listed(config: RunConfig) -> Problems:
    entries, length = config.train.batch_size_schedule, config.data.seq_length
    if not entries:
        yield "train.batch_size_schedule is empty; expected [[0, global batch size], [tokens, global batch size], ...], or null"
        return
    if entries[0][0] != 0:
        yield f"train.batch_size_schedule begins at {entries[0][0]} tokens; its first entry must begin at 0"
    for number, ((before, _), (tokens, _)) in enumerate(pairwise(entries), 1):
        if tokens // length <= before // length:
            yield (
                f"train.batch_size_schedule[{number}] begins at {tokens} tokens, not a sample of data.seq_length={length} after"
                f" the entry before it, {before}; list the entries in order, each later than the one before"
            )
    if entries[-1][1] != config.train.global_batch_size:
        yield (
            f"train.batch_size_schedule ends with a batch of {entries[-1][1]}, but train.global_batch_size="
            f"{config.train.global_batch_size}, which must be the last one and is that of validations; make them equal"
        )


def batch(config: RunConfig, world_size: int) -> Problems:
    """Check for every batch size that each rank gets as many micro-batches, and the interleaved schedule whole rounds of them."""
    train, parallel = config.train, config.parallel
    data_parallel = data_parallel_size(parallel, world_size)
    if world_size % model_parallel_size(parallel) or not data_parallel:
        return  # `world` reports this problem
    at_once, stages = train.micro_batch_size * data_parallel, parallel.pipeline_model_parallel_size
    steps = batch_steps(config)
    uneven = [step for step in steps if step.global_batch_size % at_once]
    if uneven:
        yield (
            f"{uneven[0].name} is not a multiple of train.micro_batch_size={train.micro_batch_size} x data-parallel size"
            f" {data_parallel} = {at_once}; the next multiple is {next_multiple(uneven[0].global_batch_size, at_once)}"
            f"{_others(uneven)}"
        )
        return
    partial = [step for step in steps if step.global_batch_size // at_once % stages]
    if parallel.virtual_pipeline_model_parallel_size and partial:
        size = partial[0].global_batch_size
        where = f"in {partial[0].name} " if len(steps) > 1 else ""
        key = "the batch" if len(steps) > 1 else "train.global_batch_size"
        yield (
            f"{where}{size // at_once} micro-batches are not a multiple of parallel.pipeline_model_parallel_size={stages}, which"
            f" parallel.virtual_pipeline_model_parallel_size requires; {key} can be {next_multiple(size, at_once * stages)}"
            f"{_others(partial)}"
        )


def _others(steps: list[BatchStep]) -> str:
    return f" (as {len(steps) - 1} more of the schedule)" if len(steps) > 1 else ""


def tokens_to_draw(config: RunConfig) -> Problems:
    """Check that the run draws as many tokens as a blend in tokens lists."""
    data, iterations = config.data, config.train.train_iters
    if data.blend_unit != "tokens" or not data.train_blend:
        return
    blend_tokens = sum(tokens for tokens, *_ in data.train_blend)
    least, drawn, most = (samples_before(config, count) * data.seq_length for count in range(iterations - 1, iterations + 2))
    if not least < blend_tokens < most:
        fitting = max(1, iterations_for(config, int(blend_tokens // data.seq_length)))
        yield (
            f"the numbers of data.train_blend add up to {blend_tokens:,.0f} tokens, but train.train_iters={iterations} draws"
            f" {drawn:,}; set train.train_iters={fitting}, or data.blend_unit=weight to use the numbers as relative weights"
        )

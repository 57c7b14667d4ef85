"""Relations between the keys of a RunConfig, checked before anything heavy; a range of one key is checked in its class.

Every rule yields one sentence for each problem: found, expected, what to do. `check_config` gathers them all.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator

from megatron_ledom.config.derived import (
    data_parallel_size,
    head_dim,
    lr_decay_iters,
    model_parallel_size,
    named_blends,
    next_multiple,
    num_microbatches,
    padded_vocab_size,
    query_groups,
    tokens_per_iteration,
)
from megatron_ledom.config.gpu_checks import GPU_RULES
from megatron_ledom.config.schema import RunConfig
from megatron_ledom.errors import ConfigError

Problems = Iterator[str]
SHARD_SUFFIXES = (".bin", ".idx", ".json")
ROTARY_SCALING_KEYS = {
    "rope_scaling_factor": ("linear", "llama3", "yarn"),
    "rope_scaling_original_max_position": ("llama3", "yarn"),
    "rope_scaling_low_freq_factor": ("llama3",),
    "rope_scaling_high_freq_factor": ("llama3",),
    "rope_scaling_beta_fast": ("yarn",),
    "rope_scaling_beta_slow": ("yarn",),
    "rope_scaling_attention_factor": ("yarn",),
}
"""Key of `model` -> values of model.rope_scaling with which it counts."""


def check_config(config: RunConfig, world_size: int) -> None:
    """Refuse a run that cannot work on `world_size` ranks; ConfigError lists every problem, one per line."""
    problems = [problem for rule in RULES for problem in rule(config)]
    problems += [problem for rule in WORLD_RULES for problem in rule(config, world_size)]
    if len(problems) == 1:
        raise ConfigError(problems[0])
    if problems:
        raise ConfigError("\n  ".join([f"the configuration has {len(problems)} problems:", *problems]))


def divisors(number: int) -> list[int]:
    """All whole numbers that divide `number`, ascending."""
    return [candidate for candidate in range(1, number + 1) if number % candidate == 0]


def heads(config: RunConfig) -> Problems:
    """Query heads, key-value heads and the width of a head fit each other."""
    model = config.model
    if model.kv_channels is None and model.hidden_size % model.num_attention_heads:
        yield (
            f"model.num_attention_heads={model.num_attention_heads} does not divide model.hidden_size={model.hidden_size};"
            f" change one, or set the width of a head with model.kv_channels"
        )
    elif head_dim(model) % 2:
        yield (
            f"the width of a head is {head_dim(model)}; rotary positions turn pairs and need an even one: change"
            f" {'model.kv_channels' if model.kv_channels else 'model.hidden_size or model.num_attention_heads'}"
        )
    if model.num_attention_heads % query_groups(model):
        yield _does_not_divide(
            "model.num_query_groups", query_groups(model), "model.num_attention_heads", model.num_attention_heads
        )


def rotary_scaling(config: RunConfig) -> Problems:
    """What belongs to a kind of rotary scaling is set with that kind only, and its bounds are in order."""
    model = config.model
    for key in dataclasses.fields(model):
        kinds = ROTARY_SCALING_KEYS.get(key.name)
        if kinds and model.rope_scaling not in kinds and getattr(model, key.name) != key.default:
            yield (
                f"model.{key.name}={getattr(model, key.name)} counts with model.rope_scaling={' or '.join(kinds)} only, found"
                f" {'null' if model.rope_scaling is None else model.rope_scaling}; leave it out, or set that"
            )
    for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
        low, high = f"rope_scaling_{low}", f"rope_scaling_{high}"
        if model.rope_scaling in ROTARY_SCALING_KEYS[low] and getattr(model, low) >= getattr(model, high):
            yield f"model.{low}={getattr(model, low)} is not below model.{high}={getattr(model, high)}; lower it, or raise that"


def tensor_parallel(config: RunConfig) -> Problems:
    """Every matrix can be cut into equal parts."""
    model, tensor = config.model, config.parallel.tensor_model_parallel_size
    key, groups = "parallel.tensor_model_parallel_size", query_groups(model)
    if model.num_attention_heads % tensor:
        yield _does_not_divide(key, tensor, "model.num_attention_heads", model.num_attention_heads)
    elif groups % tensor and tensor % groups:
        usable = [size for size in divisors(model.num_attention_heads) if groups % size == 0 or size % groups == 0]
        yield (
            f"{key}={tensor} neither divides model.num_query_groups={groups} nor is a multiple of it, so key-value heads"
            f" cannot be shared out; it can be one of {usable}"
        )
    if model.ffn_hidden_size % tensor:
        yield _does_not_divide(key, tensor, "model.ffn_hidden_size", model.ffn_hidden_size)
    divisible_by = model.make_vocab_size_divisible_by
    rows = padded_vocab_size(model.vocab_size, divisible_by) if model.vocab_size else divisible_by
    if rows % tensor:
        known = f"the padded vocabulary of {rows:,} rows"
        subject = known if model.vocab_size else f"every padded vocabulary, which is a multiple of {divisible_by} rows"
        yield (
            f"{key}={tensor} does not divide {subject}; set model.make_vocab_size_divisible_by"
            f" (now {divisible_by}) to a multiple of {tensor}, for example {next_multiple(divisible_by, tensor)}"
        )


def sequence_parallel(config: RunConfig) -> Problems:
    """Sequences can be cut into equal parts."""
    parallel, length = config.parallel, config.data.seq_length
    tensor, context = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    if parallel.sequence_parallel and tensor == 1:
        yield (
            "parallel.sequence_parallel=true needs parallel.tensor_model_parallel_size above 1, found 1; switch it off, or"
            " set the tensor-parallel size"
        )
    if context > 1 and length % (2 * context):
        yield (
            f"data.seq_length={length} is not a multiple of 2 x parallel.context_parallel_size = {2 * context}, the chunks"
            f" that balance causal attention; the next one is {next_multiple(length, 2 * context)}"
        )
    elif parallel.sequence_parallel and (length // context) % tensor:
        parts = tensor * context * (2 if context > 1 else 1)
        yield (
            f"data.seq_length={length} cannot be cut into parallel.context_parallel_size={context} x"
            f" parallel.tensor_model_parallel_size={tensor} equal parts, as parallel.sequence_parallel does; the next"
            f" length that can is {next_multiple(length, parts)}"
        )


def pipeline(config: RunConfig) -> Problems:
    """Every stage gets the same number of layers."""
    parallel, layers = config.parallel, config.model.num_layers
    stages, chunks = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size
    key = "parallel.virtual_pipeline_model_parallel_size"
    if chunks == 1:
        yield f"{key}=1 interleaves nothing; set 2 or more, or leave it out"
    elif chunks and stages == 1:
        yield (
            f"{key}={chunks} needs parallel.pipeline_model_parallel_size above 1, found 1; leave it out, or set the"
            " pipeline-parallel size"
        )
    if layers % stages:
        yield _does_not_divide("parallel.pipeline_model_parallel_size", stages, "model.num_layers", layers)
    elif chunks and layers % (stages * chunks):
        yield (
            f"{key}={chunks} does not divide the {layers // stages} layers of a stage (model.num_layers={layers} over"
            f" parallel.pipeline_model_parallel_size={stages}); it can be one of {divisors(layers // stages)[1:]}"
        )


def optimizer_overlap(config: RunConfig) -> Problems:
    """Parameters are gathered late only where the optimizer is spread and gradients are reduced early."""
    parallel = config.parallel
    for needed in ("use_distributed_optimizer", "overlap_grad_reduce"):
        if parallel.overlap_param_gather and not getattr(parallel, needed):
            yield (
                f"parallel.overlap_param_gather=true needs parallel.{needed}=true, found false; switch that on, or"
                " parallel.overlap_param_gather off"
            )
    if parallel.bucket_size is not None and not parallel.overlap_grad_reduce:
        yield (
            f"parallel.bucket_size={parallel.bucket_size} counts with parallel.overlap_grad_reduce=true only, found false;"
            " switch that on, or leave parallel.bucket_size out"
        )


def schedule(config: RunConfig) -> Problems:
    """The learning rate rises first and falls afterwards."""
    settings = config.optimizer
    if settings.min_lr > settings.lr:
        yield f"optimizer.min_lr={settings.min_lr} is above optimizer.lr={settings.lr}; lower it to {settings.lr} or less"
    decay = lr_decay_iters(config)
    if settings.lr_warmup_iters >= decay:
        source = "optimizer.lr_decay_iters" if settings.lr_decay_iters else "train.train_iters"
        yield (
            f"optimizer.lr_warmup_iters={settings.lr_warmup_iters} leaves nothing of {source}={decay} to decay in; set it"
            f" below {decay}"
        )


def wsd_schedule(config: RunConfig) -> Problems:
    """WSD has a decay, which begins after the warm-up; other schedules have none."""
    settings, key = config.optimizer, "optimizer.lr_wsd_decay_iters"
    if settings.lr_decay_style != "WSD":
        if settings.lr_wsd_decay_iters is not None:
            yield (
                f"{key}={settings.lr_wsd_decay_iters} belongs to optimizer.lr_decay_style=WSD, found"
                f" {settings.lr_decay_style}; leave it out, or set the style"
            )
    elif settings.lr_wsd_decay_iters is None:
        yield f"optimizer.lr_decay_style=WSD needs {key}, the iterations of its decay; a tenth of train.train_iters is usual"
    elif settings.lr_wsd_decay_iters > (left := lr_decay_iters(config) - settings.lr_warmup_iters):
        yield (
            f"{key}={settings.lr_wsd_decay_iters} is more than the {left} iterations between the end of the warm-up and the end"
            f" of the schedule; set it to {max(left, 1)} or less"
        )


def masks(config: RunConfig) -> Problems:
    """A document mask reaches the attention, and reset positions mean something."""
    data = config.data
    if data.reset_position_ids and not data.reset_attention_mask:
        yield (
            "data.reset_position_ids=true without data.reset_attention_mask=true changes nothing: rotary positions are"
            " relative; set both, or neither"
        )
    if data.reset_attention_mask and config.model.transformer_impl == "transformer_engine":
        yield (
            "data.reset_attention_mask=true cannot be used with model.transformer_impl=transformer_engine, whose causal"
            " attention ignores the mask of documents; set model.transformer_impl=torch"
        )


def watchdog(config: RunConfig) -> Problems:
    """The watchdog speaks before collectives time out, which name nobody."""
    seconds, limit = config.train.watchdog_seconds, 60 * config.parallel.distributed_timeout_minutes
    if seconds > 0.9 * limit:
        yield (
            f"train.watchdog_seconds={seconds:g} is above 0.9 x parallel.distributed_timeout_minutes="
            f"{config.parallel.distributed_timeout_minutes} (in seconds {0.9 * limit:g}): collectives would time out first and name"
            f" no rank; lower it, or set the timeout to {math.ceil(seconds / 54)} minutes"
        )


def profile(config: RunConfig) -> Problems:
    """The profiled iterations are some."""
    start, stop = config.logging.profile_start, config.logging.profile_stop
    if stop is not None and (start is None or stop < start):
        yield (
            f"logging.profile_stop={stop} needs a logging.profile_start of at most {stop}, found {start}; set it, or leave"
            " profile_stop out"
        )
    if start is not None and start > config.train.train_iters:
        yield (
            f"logging.profile_start={start} is behind the last iteration, train.train_iters={config.train.train_iters}; it can"
            f" be 1 to {config.train.train_iters}"
        )


def blends(config: RunConfig) -> Problems:
    """Each source is named once in its blend, without a suffix."""
    for key, blend in named_blends(config.data):
        prefixes = [prefix for _, prefix in blend]
        for prefix in sorted({prefix for prefix in prefixes if prefixes.count(prefix) > 1}):
            yield f"{key} lists {prefix} {prefixes.count(prefix)} times; list it once, with the sum of its weights"
        for prefix in prefixes:
            if prefix.endswith(SHARD_SUFFIXES):
                yield f"{key} lists the file {prefix}; expected the prefix of a shard, {prefix.rsplit('.', 1)[0]}"
            elif not prefix.strip():
                yield f"{key} has an entry with an empty prefix; expected [weight, prefix]"


def held_out_sets(config: RunConfig) -> Problems:
    """What is held out is said in one way, and every set has a name of its own and something in it."""
    data = config.data
    given = [key for key in ("valid_blend", "valid_sets", "test_sets") if getattr(data, key)]
    if data.split is not None and given:
        yield (
            f"data.split={list(data.split)} and data.{given[0]} are both set; hold text out by ratios or by separate shards,"
            " and leave the other out"
        )
    for key in ("valid_sets", "test_sets"):
        for name, blend in getattr(data, key).items():
            if not blend or not name.strip():
                yield f"data.{key} has the set {name!r} with {len(blend)} shards; give it a name and at least one shard"
    for name in sorted({prefix for _, prefix in data.valid_blend} & data.valid_sets.keys()):
        yield f"{name} names a shard of data.valid_blend and a set of data.valid_sets; choose another name for the set"


def tokens_to_draw(config: RunConfig) -> Problems:
    """A blend in tokens says how long the run is."""
    data, each = config.data, tokens_per_iteration(config)
    asked, iterations = sum(tokens for tokens, _ in data.train_blend), config.train.train_iters
    if data.blend_unit == "tokens" and data.train_blend and not iterations - 1 < asked / each < iterations + 1:
        yield (
            f"data.train_blend asks for {asked:,.0f} tokens, train.train_iters={iterations} draws {iterations * each:,}; set"
            f" train.train_iters={max(1, int(asked // each))}, or data.blend_unit=weight to take the numbers as shares"
        )


def retention(config: RunConfig) -> Problems:
    """Checkpoints are kept for ever only among those that are written, and where others go."""
    settings = config.checkpoint
    keep, every, save = "checkpoint.keep_interval", settings.keep_interval, settings.save_interval
    if every and settings.keep_last is None:
        yield f"{keep}={every} without checkpoint.keep_last changes nothing, all are kept; set that too, or leave this out"
    elif every and every % save:
        yield (
            f"{keep}={every} is not a multiple of checkpoint.save_interval={save}, so few or none would be written at its"
            f" multiples; the next one is {next_multiple(every, save)}"
        )


def world(config: RunConfig, world_size: int) -> Problems:
    """As many ranks as planned, and whole copies of the model on them."""
    parallel, copy = config.parallel, model_parallel_size(config.parallel)
    if parallel.world_size and parallel.world_size != world_size:
        yield (
            f"parallel.world_size={parallel.world_size}, but {world_size} ranks are launched; launch"
            f" {parallel.world_size}, or set parallel.world_size={world_size} to change the layout of the run"
        )
    elif world_size % copy:
        yield (
            f"{world_size} ranks are not a multiple of the {copy} that one copy of the model needs"
            f" (parallel.tensor_model_parallel_size={parallel.tensor_model_parallel_size} x pipeline_model_parallel_size="
            f"{parallel.pipeline_model_parallel_size} x context_parallel_size={parallel.context_parallel_size}); launch"
            f" {next_multiple(world_size, copy)}, or change the layout"
        )


def batch(config: RunConfig, world_size: int) -> Problems:
    """Every rank gets the same number of micro-batches, and the interleaved schedule gets whole rounds of them."""
    train, parallel = config.train, config.parallel
    data_parallel = data_parallel_size(parallel, world_size)
    if world_size % model_parallel_size(parallel) or not data_parallel:
        return  # `world` has said so
    at_once = train.micro_batch_size * data_parallel
    if train.global_batch_size % at_once:
        yield (
            f"train.global_batch_size={train.global_batch_size} is not a multiple of train.micro_batch_size="
            f"{train.micro_batch_size} x data-parallel size {data_parallel} = {at_once}; the next one is"
            f" {next_multiple(train.global_batch_size, at_once)}"
        )
        return
    stages, count = parallel.pipeline_model_parallel_size, num_microbatches(config, world_size)
    if parallel.virtual_pipeline_model_parallel_size and count % stages:
        yield (
            f"{count} micro-batches are not a multiple of parallel.pipeline_model_parallel_size={stages}, which"
            " parallel.virtual_pipeline_model_parallel_size requires; train.global_batch_size can be"
            f" {next_multiple(train.global_batch_size, at_once * stages)}"
        )


def profiled_ranks(config: RunConfig, world_size: int) -> Problems:
    """The ranks that profile are there."""
    missing = [rank for rank in config.logging.profile_ranks if rank >= world_size]
    if config.logging.profile_start is not None and missing:
        yield f"logging.profile_ranks has {missing}, but {world_size} ranks are launched; it can hold 0 to {world_size - 1}"


RULES: tuple[Callable[[RunConfig], Problems], ...] = (
    heads,
    rotary_scaling,
    tensor_parallel,
    sequence_parallel,
    pipeline,
    optimizer_overlap,
    schedule,
    wsd_schedule,
    masks,
    watchdog,
    profile,
    blends,
    retention,
    held_out_sets,
    tokens_to_draw,
    *GPU_RULES,
)
WORLD_RULES: tuple[Callable[[RunConfig, int], Problems], ...] = (world, batch, profiled_ranks)


def _does_not_divide(key: str, value: int, whole_key: str, whole: int) -> str:
    return f"{key}={value} does not divide {whole_key}={whole}; it can be one of {divisors(whole)}"

"""Check the relations between the keys of a RunConfig before a run starts; ranges of single keys are checked in schema.py.

Every rule yields one sentence per problem: found, expected, what to do. `check_config` collects them all.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator

from megatron_ledom.config.batch_checks import batch, batch_schedule, tokens_to_draw
from megatron_ledom.config.derived import (
    head_dim,
    lr_decay_iters,
    model_parallel_size,
    named_blends,
    next_multiple,
    padded_vocab_size,
    query_groups,
    stated_directions,
)
from megatron_ledom.config.gpu_checks import GPU_RULES
from megatron_ledom.config.multi_token_checks import multi_token
from megatron_ledom.config.schema import RunConfig
from megatron_ledom.config.tracker_checks import trackers
from megatron_ledom.direction import BOTH, Direction
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
"""Key of `model` -> values of model.rope_scaling that use it."""


def check_config(config: RunConfig, world_size: int) -> None:
    """Refuse a run that cannot work on `world_size` ranks; ConfigError lists every problem, one per line."""
    problems = [problem for rule in RULES for problem in rule(config)]
    problems += [problem for rule in WORLD_RULES for problem in rule(config, world_size)]
    if len(problems) == 1:
        raise ConfigError(problems[0])
    if problems:
        raise ConfigError("\n  ".join([f"the configuration has {len(problems)} problems:", *problems]))


def divisors(number: int) -> list[int]:
    """Return all whole numbers that divide `number`, ascending."""
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def heads(config: RunConfig) -> Problems:
    """Check that query heads, key-value heads and the width of a head fit each other."""
    model = config.model
    if model.kv_channels is None and model.hidden_size % model.num_attention_heads:
        yield (
            f"model.num_attention_heads={model.num_attention_heads} does not divide model.hidden_size={model.hidden_size};"
            f" change one, or set the width of a head with model.kv_channels"
        )
    elif head_dim(model) % 2:
        yield (
            f"the width of a head is {head_dim(model)}; rotary positions rotate pairs of channels and need an even width: change"
            f" {'model.kv_channels' if model.kv_channels else 'model.hidden_size or model.num_attention_heads'}"
        )
    if model.num_attention_heads % query_groups(model):
        yield _does_not_divide(
            "model.num_query_groups", query_groups(model), "model.num_attention_heads", model.num_attention_heads
        )


def rotary_scaling(config: RunConfig) -> Problems:
    """Check that keys of one kind of rotary scaling are set only with that kind, and that bounds are in order."""
    model = config.model
    for key in dataclasses.fields(model):
        kinds = ROTARY_SCALING_KEYS.get(key.name)
        if kinds and model.rope_scaling not in kinds and getattr(model, key.name) != key.default:
            yield (
                f"model.{key.name}={getattr(model, key.name)} needs model.rope_scaling={' or '.join(kinds)}, found"
                f" {'null' if model.rope_scaling is None else model.rope_scaling}; remove it, or set model.rope_scaling"
            )
    for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
        low, high = f"rope_scaling_{low}", f"rope_scaling_{high}"
        if model.rope_scaling in ROTARY_SCALING_KEYS[low] and getattr(model, low) >= getattr(model, high):
            yield (
                f"model.{low}={getattr(model, low)} is not below model.{high}={getattr(model, high)}; lower the first, or raise"
                " the second"
            )


def tensor_parallel(config: RunConfig) -> Problems:
    """Check that every matrix can be cut into equal parts."""
    model, tensor = config.model, config.parallel.tensor_model_parallel_size
    key, groups = "parallel.tensor_model_parallel_size", query_groups(model)
    if model.num_attention_heads % tensor:
        yield _does_not_divide(key, tensor, "model.num_attention_heads", model.num_attention_heads)
    elif groups % tensor and tensor % groups:
        usable = [size for size in divisors(model.num_attention_heads) if groups % size == 0 or size % groups == 0]
        yield (
            f"{key}={tensor} neither divides model.num_query_groups={groups} nor is a multiple of it, so the key-value heads"
            f" cannot be distributed evenly; it can be one of {usable}"
        )
    if model.ffn_hidden_size % tensor:
        yield _does_not_divide(key, tensor, "model.ffn_hidden_size", model.ffn_hidden_size)
    divisible_by = model.make_vocab_size_divisible_by
    rows = padded_vocab_size(model.vocab_size, divisible_by) if model.vocab_size else divisible_by
    if rows % tensor:
        padded = f"the padded vocabulary of {rows:,} rows"
        subject = padded if model.vocab_size else f"every padded vocabulary, which is a multiple of {divisible_by} rows"
        yield (
            f"{key}={tensor} does not divide {subject}; set model.make_vocab_size_divisible_by"
            f" (now {divisible_by}) to a multiple of {tensor}, for example {next_multiple(divisible_by, tensor)}"
        )


def sequence_parallel(config: RunConfig) -> Problems:
    """Check that sequences can be cut into equal parts."""
    parallel, length = config.parallel, config.data.seq_length
    tensor, context = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    if parallel.sequence_parallel and tensor == 1:
        yield (
            "parallel.sequence_parallel=true needs parallel.tensor_model_parallel_size above 1, found 1; set"
            " parallel.sequence_parallel=false, or raise the tensor-parallel size"
        )
    if context > 1 and length % (2 * context):
        yield (
            f"data.seq_length={length} is not a multiple of 2 x parallel.context_parallel_size = {2 * context}, the number of"
            f" chunks that balance causal attention; the next multiple is {next_multiple(length, 2 * context)}"
        )
    elif parallel.sequence_parallel and (length // context) % tensor:
        parts = tensor * context * (2 if context > 1 else 1)
        yield (
            f"data.seq_length={length} cannot be cut into parallel.context_parallel_size={context} x"
            f" parallel.tensor_model_parallel_size={tensor} equal parts, as parallel.sequence_parallel needs; the next"
            f" possible length is {next_multiple(length, parts)}"
        )


def pipeline(config: RunConfig) -> Problems:
    """Check that every stage gets the same number of layers."""
    parallel, layers = config.parallel, config.model.num_layers
    stages, chunks = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size
    key = "parallel.virtual_pipeline_model_parallel_size"
    if chunks == 1:
        yield f"{key}=1 has no effect; set 2 or more, or remove it"
    elif chunks and stages == 1:
        yield (
            f"{key}={chunks} needs parallel.pipeline_model_parallel_size above 1, found 1; remove it, or raise the"
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
    """Check that overlapped gathering has the distributed optimizer and overlapped reduction that it needs."""
    parallel = config.parallel
    for needed in ("use_distributed_optimizer", "overlap_grad_reduce"):
        if parallel.overlap_param_gather and not getattr(parallel, needed):
            yield (
                f"parallel.overlap_param_gather=true needs parallel.{needed}=true, found false; set that to true, or"
                " parallel.overlap_param_gather=false"
            )
    if parallel.bucket_size is not None and not parallel.overlap_grad_reduce:
        yield (
            f"parallel.bucket_size={parallel.bucket_size} needs parallel.overlap_grad_reduce=true, found false; set that to"
            " true, or remove parallel.bucket_size"
        )


def muon(config: RunConfig) -> Problems:
    """Check that keys of Muon are set only with it, and that its momentum is that of whole matrices."""
    settings, parallel = config.optimizer, config.parallel
    if settings.optimizer != "muon":
        for key in dataclasses.fields(settings):
            if key.name.startswith("muon_") and getattr(settings, key.name) != key.default:
                yield (
                    f"optimizer.{key.name}={getattr(settings, key.name)} needs optimizer.optimizer=muon, found"
                    f" {settings.optimizer}; remove it, or set optimizer.optimizer=muon"
                )
        return
    tensor, groups = parallel.tensor_model_parallel_size, query_groups(config.model)
    if settings.muon_split_qkv and tensor > groups:
        yield (
            f"optimizer.muon_split_qkv=true needs at least one key-value head per tensor-parallel rank, found"
            f" model.num_query_groups={groups} for parallel.tensor_model_parallel_size={tensor}: megatron-core would"
            f" orthogonalize the joint matrix there; set optimizer.muon_split_qkv=false, or lower the tensor-parallel size to {groups}"
        )
    if parallel.use_distributed_optimizer and config.model.params_dtype != "bf16":
        yield (
            "parallel.use_distributed_optimizer=true with optimizer.optimizer=muon needs model.params_dtype=bf16, found"
            f" {config.model.params_dtype}: megatron-core's layer-wise optimizer, which gives each matrix to one rank, keeps main weights only for"
            " bf16; set that, or parallel.use_distributed_optimizer=false: every data-parallel rank then has all of the optimizer state"
        )


def schedule(config: RunConfig) -> Problems:
    """Check that the learning rate rises first and falls afterwards."""
    settings = config.optimizer
    if settings.min_lr > settings.lr:
        yield f"optimizer.min_lr={settings.min_lr} is above optimizer.lr={settings.lr}; lower it to {settings.lr} or less"
    decay = lr_decay_iters(config)
    if settings.lr_warmup_iters >= decay:
        source = "optimizer.lr_decay_iters" if settings.lr_decay_iters else "train.train_iters"
        yield (
            f"optimizer.lr_warmup_iters={settings.lr_warmup_iters} leaves no iterations of {source}={decay} for the decay; set it"
            f" below {decay}"
        )


def wsd_schedule(config: RunConfig) -> Problems:
    """Check that WSD has a final decay that begins after the warm-up, and that other schedules have none."""
    settings, key = config.optimizer, "optimizer.lr_wsd_decay_iters"
    if settings.lr_decay_style != "WSD":
        if settings.lr_wsd_decay_iters is not None:
            yield (
                f"{key}={settings.lr_wsd_decay_iters} needs optimizer.lr_decay_style=WSD, found"
                f" {settings.lr_decay_style}; remove it, or set optimizer.lr_decay_style=WSD"
            )
    elif settings.lr_wsd_decay_iters is None:
        yield f"optimizer.lr_decay_style=WSD needs {key}, the iterations of its final decay; a tenth of train.train_iters is usual"
    elif settings.lr_wsd_decay_iters > (left := lr_decay_iters(config) - settings.lr_warmup_iters):
        yield (
            f"{key}={settings.lr_wsd_decay_iters} is more than the {left} iterations from the end of the warm-up to the end"
            f" of the schedule; set it to {max(left, 1)} or less"
        )


def masks(config: RunConfig) -> Problems:
    """Check that the document mask is used by the attention, and that reset positions have an effect."""
    data = config.data
    if data.reset_position_ids and not data.reset_attention_mask:
        yield (
            "data.reset_position_ids=true without data.reset_attention_mask=true has no effect, since rotary positions are"
            " relative; set both, or neither"
        )
    if data.reset_attention_mask and config.model.transformer_impl == "transformer_engine":
        yield (
            "data.reset_attention_mask=true cannot be used with model.transformer_impl=transformer_engine, whose causal"
            " attention ignores the document mask; set model.transformer_impl=torch"
        )


def watchdog(config: RunConfig) -> Problems:
    """Check that the watchdog acts before collectives time out: their errors do not name the rank that hangs."""
    seconds, limit = config.train.watchdog_seconds, 60 * config.parallel.distributed_timeout_minutes
    if seconds > 0.9 * limit:
        yield (
            f"train.watchdog_seconds={seconds:g} is above 0.9 x parallel.distributed_timeout_minutes="
            f"{config.parallel.distributed_timeout_minutes} ({0.9 * limit:g} s): collectives would time out first, without naming"
            f" the rank that hangs; lower it, or set the timeout to {math.ceil(seconds / 54)} minutes"
        )


def profile(config: RunConfig) -> Problems:
    """Check that there are iterations to profile."""
    start, stop = config.logging.profile_start, config.logging.profile_stop
    if stop is not None and (start is None or stop < start):
        yield (
            f"logging.profile_stop={stop} needs a logging.profile_start of at most {stop}, found"
            f" {'null' if start is None else start}; set it, or remove logging.profile_stop"
        )
    if start is not None and start > config.train.train_iters:
        yield (
            f"logging.profile_start={start} is after the last iteration, train.train_iters={config.train.train_iters}; it can"
            f" be 1 to {config.train.train_iters}"
        )


def blends(config: RunConfig) -> Problems:
    """Check that each blend lists a shard once, by its prefix without a suffix."""
    for key, blend in named_blends(config.data):
        prefixes = [prefix for _, prefix, *_ in blend]
        for prefix in sorted({prefix for prefix in prefixes if prefixes.count(prefix) > 1}):
            yield f"{key} lists {prefix} {prefixes.count(prefix)} times; list it once, with the sum of its weights"
        for prefix in prefixes:
            if prefix.endswith(SHARD_SUFFIXES):
                yield f"{key} lists the file {prefix}; expected the prefix of a shard, {prefix.rsplit('.', 1)[0]}"
            elif not prefix.strip():
                yield f"{key} has an entry with an empty prefix; expected [weight, prefix]"


def blend_directions(config: RunConfig) -> Problems:
    """Check that no blend states a direction that data.direction excludes, and that those of a two-way run are not all the same."""
    direction, train = config.data.direction, config.data.train_blend
    for key, blend in named_blends(config.data):
        for prefix, stated in stated_directions(blend).items():
            if direction not in (BOTH, stated):
                yield (
                    f"{key} says that {prefix} is {stated}, but data.direction={direction}; correct one of them, or set"
                    " data.direction=both for a two-way model"
                )
    found = list(stated_directions(train).values())
    if direction == BOTH and found and found == [found[0]] * len(train):
        yield (
            f"data.direction=both, but data.train_blend says that all its shards are {found[0]}; add {found[0].other} ones, or set"
            f" data.direction={found[0]}"
        )


def held_out_sets(config: RunConfig) -> Problems:
    """Check that held-out data is given in only one way, and that every set has a shard and a unique name."""
    data = config.data
    given = [key for key in ("valid_blend", "valid_sets", "test_sets") if getattr(data, key)]
    if data.split is not None and given:
        yield (
            f"data.split={list(data.split)} and data.{given[0]} are both set; hold text out by ratios or by separate shards,"
            " and remove the other key"
        )
    for key in ("valid_sets", "test_sets"):
        for name, blend in getattr(data, key).items():
            if not blend or not name.strip():
                yield f"data.{key} has the set {name!r} with {len(blend)} shards; give it a name and at least one shard"
    for name in sorted({prefix for _, prefix, *_ in data.valid_blend} & data.valid_sets.keys()):
        yield f"{name} names a shard of data.valid_blend and a set of data.valid_sets; choose another name for the set"


def retention(config: RunConfig) -> Problems:
    """Check that checkpoint.keep_interval has an effect and that checkpoints are written at its multiples."""
    yield from _kept_multiples(config, "keep_interval", "keep_last", "checkpoints")


def mirror(config: RunConfig) -> Problems:
    """Check the address, that checkpoint.mirror_keep_interval has an effect, and that checkpoints are written at its multiples."""
    if config.checkpoint.mirror == "":
        yield "checkpoint.mirror is empty; give an address, such as s3://bucket/run, or remove it"
    yield from _kept_multiples(config, "mirror_keep_interval", "mirror_keep_last", "copies")


def _kept_multiples(config: RunConfig, interval: str, last: str, what: str) -> Problems:
    """Check one of the keys that keep the checkpoints at multiples of an interval. last: the key without which it has no effect."""
    settings = config.checkpoint
    every, save = getattr(settings, interval), settings.save_interval
    keep = f"checkpoint.{interval}={every}"
    if every and getattr(settings, last) is None:
        yield (
            f"{keep} without checkpoint.{last} has no effect, since all {what} are kept; set checkpoint.{last} too, or remove"
            f" checkpoint.{interval}"
        )
    elif every and every % save:
        yield (
            f"{keep} is not a multiple of checkpoint.save_interval={save}, so few or no checkpoints would be written at"
            f" its multiples; the next possible value is {next_multiple(every, save)}"
        )


def world(config: RunConfig, world_size: int) -> Problems:
    """Check that the launch has the expected number of ranks, and that whole copies of the model fit on them."""
    parallel, copy = config.parallel, model_parallel_size(config.parallel)
    if parallel.world_size and parallel.world_size != world_size:
        yield (
            f"parallel.world_size={parallel.world_size}, but {world_size} ranks are launched; launch"
            f" {parallel.world_size}, or set parallel.world_size={world_size} to change the layout of the run"
        )
    elif world_size % copy:
        yield (
            f"{world_size} ranks are not a multiple of the {copy} ranks that one copy of the model needs"
            f" (parallel.tensor_model_parallel_size={parallel.tensor_model_parallel_size} x pipeline_model_parallel_size="
            f"{parallel.pipeline_model_parallel_size} x context_parallel_size={parallel.context_parallel_size}); launch"
            f" {next_multiple(world_size, copy)}, or change the layout"
        )


def profiled_ranks(config: RunConfig, world_size: int) -> Problems:
    """Check that the ranks that profile exist."""
    missing = [rank for rank in config.logging.profile_ranks if rank >= world_size]
    if config.logging.profile_start is not None and missing:
        yield f"logging.profile_ranks has {missing}, but {world_size} ranks are launched; it can contain 0 to {world_size - 1}"


def two_way_tasks(config: RunConfig) -> Problems:
    """Check that tasks during training have one direction in which to evaluate them."""
    if config.data.direction == BOTH and config.train.tasks:
        yield (
            "train.tasks are evaluated in the direction of the model, but data.direction=both; remove train.tasks, and evaluate the exported"
            " model with ledom evaluate --direction"
        )


def auxiliary(config: RunConfig) -> Problems:
    """Check that a further loss has a forward model and a teacher, and that its keys are set only with it."""
    settings, direction = config.train.auxiliary, config.data.direction
    if settings.kind is None:
        for key in dataclasses.fields(settings):
            if getattr(settings, key.name) != key.default:
                yield (
                    f"train.auxiliary.{key.name}={getattr(settings, key.name)} needs train.auxiliary.kind=reverse_state, found null; remove"
                    " it, or set train.auxiliary.kind"
                )
        return
    if settings.teacher is None:
        yield (
            f"train.auxiliary.kind={settings.kind} needs train.auxiliary.teacher, found null; set it to the folder of a reverse model that"
            " ledom convert-checkpoint wrote"
        )
    if config.model.mtp_num_layers is not None:
        yield (
            f"train.auxiliary.kind={settings.kind} cannot be used with model.mtp_num_layers={config.model.mtp_num_layers}: the two were not"
            " tried together; remove one of them"
        )
    if direction is not Direction.FORWARD:
        yield (
            f"train.auxiliary.kind={settings.kind} needs data.direction=forward, found {direction}: the teacher reads from the end what a"
            " forward model has not read yet; train a forward model, or remove train.auxiliary"
        )


RULES: tuple[Callable[[RunConfig], Problems], ...] = (
    heads,
    rotary_scaling,
    tensor_parallel,
    sequence_parallel,
    pipeline,
    optimizer_overlap,
    muon,
    schedule,
    wsd_schedule,
    masks,
    watchdog,
    profile,
    blends,
    blend_directions,
    retention,
    mirror,
    trackers,
    held_out_sets,
    batch_schedule,
    tokens_to_draw,
    two_way_tasks,
    multi_token,
    auxiliary,
    *GPU_RULES,
)
WORLD_RULES: tuple[Callable[[RunConfig, int], Problems], ...] = (world, batch, profiled_ranks)


def _does_not_divide(key: str, value: int, whole_key: str, whole: int) -> str:
    return f"{key}={value} does not divide {whole_key}={whole}; it can be one of {divisors(whole)}"

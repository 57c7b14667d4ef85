"""Numbers, and one path, that follow from a RunConfig; each is computed only here."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace

from megatron_ledom.config.batch_schedule import samples_before
from megatron_ledom.config.schema import BlendEntry, DataConfig, ModelConfig, ParallelConfig, RunConfig
from megatron_ledom.direction import Direction


def checkpoint_folder(config: RunConfig) -> str:
    """Return the folder of a run's checkpoints."""
    return os.path.join(config.run_dir, "checkpoints")


def next_multiple(number: int, of: int) -> int:
    """Return the smallest multiple of `of` that is not below `number`."""
    return -(-number // of) * of


def padded_vocab_size(vocab_size: int, divisible_by: int) -> int:
    """Return the number of embedding rows: `vocab_size` rounded up. It does not depend on the layout, so checkpoints fit any."""
    return next_multiple(vocab_size, divisible_by)


def head_dim(model: ModelConfig) -> int:
    """Return the width of one attention head."""
    return model.kv_channels or model.hidden_size // model.num_attention_heads


def query_groups(model: ModelConfig) -> int:
    """Return the number of key-value heads."""
    return model.num_query_groups or model.num_attention_heads


def model_parallel_size(parallel: ParallelConfig) -> int:
    """Return the number of ranks that share one copy of the model: tensor x pipeline x context."""
    tensor, pipeline = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    return tensor * pipeline * parallel.context_parallel_size


def expected_world_size(config: RunConfig) -> int:
    """Return the number of ranks to plan for when none are launched: `parallel.world_size`, or one copy of the model."""
    return config.parallel.world_size or model_parallel_size(config.parallel)


def data_parallel_size(parallel: ParallelConfig, world_size: int) -> int:
    """Return the number of copies of the model on `world_size` ranks."""
    return world_size // model_parallel_size(parallel)


def bucket_elements(bucket_size: int | None, data_parallel_size: int) -> int:
    """Return the elements of a bucket of gradients if buckets are reduced one by one; None for megatron-core's default."""
    return bucket_size or max(40_000_000, 1_000_000 * data_parallel_size)


def num_microbatches(config: RunConfig, world_size: int, global_batch_size: int | None = None) -> int:
    """Return the micro-batches of one rank in an iteration of `global_batch_size`; None for `train.global_batch_size`."""
    samples_at_once = config.train.micro_batch_size * data_parallel_size(config.parallel, world_size)
    return (config.train.global_batch_size if global_batch_size is None else global_batch_size) // samples_at_once


def tokens_per_iteration(config: RunConfig) -> int:
    """Return the number of positions of one iteration with `train.global_batch_size` samples, over all ranks."""
    return config.train.global_batch_size * config.data.seq_length


def train_samples(config: RunConfig) -> int:
    """Return the number of samples of the whole run."""
    return samples_before(config, config.train.train_iters)


def total_tokens(config: RunConfig) -> int:
    """Return the number of positions of the whole run."""
    return train_samples(config) * config.data.seq_length


def lr_decay_iters(config: RunConfig) -> int:
    """Return the iteration at which the learning rate reaches its minimum."""
    return config.optimizer.lr_decay_iters or config.train.train_iters


def validation_iterations(config: RunConfig) -> int:
    """Return the number of validations of the run: one every `train.eval_interval` iterations and one at the end."""
    return -(-config.train.train_iters // config.train.eval_interval)


def blend_shares(blend: Sequence[BlendEntry]) -> list[float]:
    """Return the fraction of the samples that each source contributes; the fractions add up to 1."""
    total = sum(weight for weight, *_ in blend)
    return [weight / total for weight, *_ in blend]


def stated_directions(blend: Sequence[BlendEntry]) -> dict[str, Direction]:
    """Return the directions that the entries of a blend state, by prefix."""
    return {entry[1]: entry[2] for entry in blend if len(entry) == 3}


def without_stated_directions(config: RunConfig) -> RunConfig:
    """Return a config whose blends state no direction: the statement is checked, and changes no sample."""

    def _plain(blend: Sequence[BlendEntry]) -> list[BlendEntry]:
        return [(weight, prefix) for weight, prefix, *_ in blend]

    def _plain_sets(sets: Mapping[str, Sequence[BlendEntry]]) -> dict[str, list[BlendEntry]]:
        return {name: _plain(blend) for name, blend in sets.items()}

    data = config.data
    plain = replace(
        data,
        train_blend=_plain(data.train_blend),
        valid_blend=_plain(data.valid_blend),
        valid_sets=_plain_sets(data.valid_sets),
        test_sets=_plain_sets(data.test_sets),
    )
    return replace(config, data=plain)


def named_blends(data: DataConfig) -> list[tuple[str, list[BlendEntry]]]:
    """Return every blend of the run with its dotted key."""
    sets = [(f"data.{key}.{name}", blend) for key in ("valid_sets", "test_sets") for name, blend in getattr(data, key).items()]
    return [("data.train_blend", data.train_blend), ("data.valid_blend", data.valid_blend), *sets]


def has_validation(data: DataConfig) -> bool:
    """Return True if the run validates."""
    return bool(data.valid_blend or data.valid_sets or (data.split and data.split[1]))

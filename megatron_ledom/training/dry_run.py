"""What a run would do, without a GPU, data or torch: the resolved configuration and every number that follows from it."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from megatron_ledom.config.checks import check_config
from megatron_ledom.config.derived import (
    data_parallel_size,
    has_validation,
    head_dim,
    lr_decay_iters,
    named_blends,
    num_microbatches,
    padded_vocab_size,
    query_groups,
    tokens_per_iteration,
    total_tokens,
    train_samples,
    validation_iterations,
)
from megatron_ledom.config.gpu_checks import FP8_NEEDS
from megatron_ledom.config.load import to_yaml
from megatron_ledom.config.schema import ModelConfig, RunConfig
from megatron_ledom.data.blend_plan import describe_sources, planned_sources
from megatron_ledom.data.shard import ShardManifest, load_manifest
from megatron_ledom.data.splits import split_shard
from megatron_ledom.model.arithmetic import count_parameters, flops_per_token

Row = tuple[str, str]


def describe_run(config: RunConfig, world_size: int) -> str:
    """The resolved run as YAML, then its derived numbers and its blend as tables; the manifests of shards are read if there.

    Raises ConfigError when the run cannot work on `world_size` ranks.
    """
    check_config(config, world_size)
    manifests = _stored_manifests(config)
    model = config.model
    if model.vocab_size is None and manifests:
        model = replace(model, vocab_size=next(iter(manifests.values())).provenance.vocab_size)
    groups = {
        "model": list(_model_rows(config, model)),
        "layout": list(_layout_rows(config, world_size, model)),
        "engine": list(_engine_rows(config)),
        "batch": list(_batch_rows(config, world_size)),
        "run": list(_run_rows(config, model)),
        "compute": list(_compute_rows(config, model)),
    }
    width = max(len(name) for rows in groups.values() for name, _ in rows)
    tables = [_titled(title, [f"{name:<{width}}  {value}" for name, value in rows]) for title, rows in groups.items()]
    tables.append(_titled("training data", _blend_lines(config, manifests)))
    return "\n\n".join([to_yaml(config).rstrip(), *tables]) + "\n"


def _titled(title: str, lines: list[str]) -> str:
    return "\n".join([title, *[f"  {line}".rstrip() for line in lines]])


def _model_rows(config: RunConfig, model: ModelConfig) -> Iterator[Row]:
    yield "layers", f"{model.num_layers:,}"
    yield "heads x width", f"{model.num_attention_heads} x {head_dim(model)}, {query_groups(model)} key-value heads"
    if model.vocab_size is None:
        yield "vocabulary", "read from the shards, which are not there yet; set model.vocab_size to plan without them"
        return
    padded = _padded_vocab(model)
    parameters = count_parameters(model, padded)
    yield "padded vocabulary", f"{padded:,} rows for {model.vocab_size:,} ids"
    yield "parameters", f"{_scaled(parameters)} ({parameters:,})"
    yield "context", f"{config.data.seq_length:,} tokens, {config.data.direction}"


def _layout_rows(config: RunConfig, world_size: int, model: ModelConfig) -> Iterator[Row]:
    parallel = config.parallel
    tensor, pipeline = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    yield "ranks", f"{world_size:,}"
    yield "tensor parallel", f"{tensor}{', with sequence parallel' if parallel.sequence_parallel else ''}"
    chunks = parallel.virtual_pipeline_model_parallel_size
    yield "pipeline parallel", f"{pipeline}{f', {chunks} chunks a stage' if chunks else ''}"
    yield "context parallel", f"{parallel.context_parallel_size}"
    yield "data parallel", f"{data_parallel_size(parallel, world_size)}"
    if model.vocab_size is not None:
        yield "model state a rank", f"about {_state_gibibytes(config, model, world_size):,.2f} GiB, activations not counted"


def _engine_rows(config: RunConfig) -> Iterator[Row]:
    """What the layers are made of and how ranks talk; what only the machine knows is said as a condition."""
    model, parallel = config.model, config.parallel
    yield "implementation", _layers_in_words(config)
    if model.fp8 is not None:
        needs = FP8_NEEDS[model.fp8_recipe]
        capability, te_version = (".".join(map(str, pair)) for pair in (needs.capability, needs.te_version))
        history = f", largest of {model.fp8_amax_history_len:,} steps" if model.fp8_recipe == "delayed" else ""
        yield "fp8", f"{model.fp8}, {model.fp8_recipe}{history}; not yet run on hardware"
        yield "fp8 needs", f"compute capability {capability} ({needs.gpu}), Transformer Engine {te_version}"
    yield "recompute", _recompute_in_words(config)
    overlaps = ("overlap_grad_reduce", "overlap_param_gather", "tp_comm_overlap")
    yield "overlapped", ", ".join(name for name in overlaps if getattr(parallel, name)) or "nothing"
    nccl = [f"settings of {parallel.nccl_communicator_config_path}"] if parallel.nccl_communicator_config_path else []
    nccl += (
        [f"high priority for {', '.join(parallel.high_priority_stream_groups)}"] if parallel.high_priority_stream_groups else []
    )
    nccl += ["SHARP for the data-parallel group"] if parallel.use_sharp else []
    yield "NCCL", f"{'; '.join(nccl)} (nothing of it on a CPU)" if nccl else "as it comes"


def _layers_in_words(config: RunConfig) -> str:
    model = config.model
    if model.fp8 is not None or config.parallel.tp_comm_overlap or model.transformer_impl == "transformer_engine":
        return "Transformer Engine; refused where it or CUDA is missing"
    if model.transformer_impl == "torch" or config.data.reset_attention_mask:
        return "torch, with SDPA" + (" and a mask of documents" if config.data.reset_attention_mask else "")
    return "Transformer Engine where it is installed and CUDA is there, else torch with SDPA"


def _recompute_in_words(config: RunConfig) -> str:
    parallel = config.parallel
    if parallel.recompute_granularity == "selective":
        return f"selective: {', '.join(parallel.recompute_modules)} of every layer"
    if parallel.recompute_granularity == "full":
        count = parallel.recompute_num_layers
        how = "in groups of {} layers" if parallel.recompute_method == "uniform" else "the first {} layers of a model chunk"
        return f"full, {parallel.recompute_method}: {how.format(count)}"
    return "none"


def _batch_rows(config: RunConfig, world_size: int) -> Iterator[Row]:
    train, length = config.train, config.data.seq_length
    count = num_microbatches(config, world_size)
    yield (
        "micro-batch",
        f"{train.micro_batch_size:,} {'sample' if train.micro_batch_size == 1 else 'samples'}, {train.micro_batch_size * length:,} tokens",
    )
    yield "micro-batches", f"{count:,} an iteration"
    yield "samples a rank", f"{count * train.micro_batch_size:,} an iteration"
    yield "global batch", f"{train.global_batch_size:,} samples, {tokens_per_iteration(config):,} tokens"


def _run_rows(config: RunConfig, model: ModelConfig) -> Iterator[Row]:
    settings, tokens = config.optimizer, tokens_per_iteration(config)
    yield "iterations", f"{config.train.train_iters:,}"
    yield "samples", f"{train_samples(config):,}"
    yield "tokens", f"{_scaled(total_tokens(config))} ({total_tokens(config):,})"
    yield "warm-up", f"{settings.lr_warmup_iters:,} iterations, {_scaled(settings.lr_warmup_iters * tokens)} tokens"
    if settings.lr_decay_style == "constant":
        yield "learning rate", f"{settings.lr:g}, constant"
    else:
        decay = lr_decay_iters(config)
        yield "learning rate", f"{settings.lr:g} -> {settings.min_lr:g} {settings.lr_decay_style} until iteration {decay:,}"
    yield "checkpoints", _checkpoints(config, model)
    if has_validation(config.data):
        samples = config.train.eval_iters * config.train.global_batch_size
        yield "validations", f"{validation_iterations(config):,}, {samples:,} samples of each set at most"
    else:
        yield "validations", "none: data.valid_blend, data.valid_sets and data.split are empty"


def _checkpoints(config: RunConfig, model: ModelConfig) -> str:
    """How many are written, how large, and which are kept."""
    settings = config.checkpoint
    words = [f"{-(-config.train.train_iters // settings.save_interval):,}"]
    if model.vocab_size is not None:
        words.append(f"about {count_parameters(model, _padded_vocab(model)) * _state_bytes(model) / 2**30:,.2f} GiB each")
    words.append("written while training goes on" if settings.async_save else "training waits for them")
    if settings.keep_last is not None:
        multiples = f" and those at multiples of {settings.keep_interval:,}" if settings.keep_interval else ""
        words.append(f"the newest {settings.keep_last:,}{multiples} kept")
    return ", ".join(words)


def _state_bytes(model: ModelConfig) -> int:
    """Bytes a parameter in a checkpoint: weight and Adam's moments; bf16 has fp32 weights besides."""
    return 2 + 12 if model.params_dtype == "bf16" else 4 + 8


def _compute_rows(config: RunConfig, model: ModelConfig) -> Iterator[Row]:
    if model.vocab_size is None:
        yield "FLOPs", "not known without the vocabulary"
        return
    each = flops_per_token(model, config.data.seq_length, _padded_vocab(model))
    yield "FLOPs a token", f"{each / 1e9:,.4g} GFLOP (forward and backward, full attention)"
    yield "FLOPs an iteration", f"{each * tokens_per_iteration(config):.4g}"
    yield "FLOPs of the run", f"{each * total_tokens(config):.4g}"


def _state_gibibytes(config: RunConfig, model: ModelConfig, world_size: int) -> float:
    """Weights, fp32 gradients and Adam's state of one rank, as if all stages were equal."""
    parallel = config.parallel
    copies = data_parallel_size(parallel, world_size) * parallel.context_parallel_size
    weights, optimizer = (2, 12) if model.params_dtype == "bf16" else (4, 8)  # bf16 keeps fp32 weights in the optimizer
    bytes_each = weights + 4 + optimizer / (copies if parallel.use_distributed_optimizer else 1)
    held = count_parameters(model, _padded_vocab(model))
    return held * bytes_each / parallel.tensor_model_parallel_size / parallel.pipeline_model_parallel_size / 2**30


def _blend_lines(config: RunConfig, manifests: dict[str, ShardManifest]) -> list[str]:
    """The table of the blend, as it is logged before training; tokens and epochs where the shards are there."""
    blend = config.data.train_blend
    if not blend:
        return ["none: data.train_blend is empty"]
    sizes = {prefix: _train_tokens(config, prefix, manifests.get(prefix)) for _, prefix in blend}
    tokens = total_tokens(config)
    sources = planned_sources(sizes, [weight for weight, _ in blend], tokens, config.data.seq_length)
    lines = describe_sources(sources, tokens).splitlines()
    repeated = [source for source in sources if source.repeats]
    if repeated and not config.data.allow_repeats:
        worst = max(repeated, key=lambda source: source.epochs or 0.0)
        lines.append(f"{len(repeated)} would repeat, {worst.name} most: such a run is refused without data.allow_repeats=true")
    return lines


def _train_tokens(config: RunConfig, prefix: str, manifest: ShardManifest | None) -> int | None:
    """Tokens that the blend may draw from a shard."""
    if manifest is None:
        return None
    if config.data.split is None:
        return manifest.num_tokens
    if Path(f"{prefix}.idx").exists():
        return split_shard(prefix, manifest, config.data.split)[0].num_tokens
    return round(manifest.num_tokens * config.data.split[0] / sum(config.data.split))


def _stored_manifests(config: RunConfig) -> dict[str, ShardManifest]:
    prefixes = [prefix for _, blend in named_blends(config.data) for _, prefix in blend]
    return {prefix: load_manifest(prefix) for prefix in prefixes if Path(f"{prefix}.json").exists()}


def _padded_vocab(model: ModelConfig) -> int:
    assert model.vocab_size is not None
    return padded_vocab_size(model.vocab_size, model.make_vocab_size_divisible_by)


def _scaled(number: float) -> str:
    """A large number to four or five digits: `7.794 B`, `435.37 B`."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            scaled = number / size
            return f"{scaled:.{2 if scaled >= 100 else 3}f} {unit}"
    return f"{number:,.0f}"

"""Rows of the dry run: numbers derived from a config, on model, layout, execution, batch, run, compute and operation."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_ledom.config.batch_schedule import BatchPhase, batch_phases, has_batch_schedule, largest_batch, samples_before
from megatron_ledom.config.derived import (
    data_parallel_size,
    expected_world_size,
    has_validation,
    head_dim,
    lr_decay_iters,
    num_microbatches,
    padded_vocab_size,
    query_groups,
    total_tokens,
    train_samples,
    validation_iterations,
)
from megatron_ledom.config.gpu_checks import FP8_NEEDS
from megatron_ledom.config.schema import ModelConfig, OptimizerSettings, ParallelConfig, RunConfig
from megatron_ledom.model.arithmetic import count_parameters, flops_per_token
from megatron_ledom.planning.memory import GIB, stage_parameters, stage_state_bytes
from megatron_ledom.planning.plan import bytes_of_checkpoint
from megatron_ledom.planning.plan_text import Row, shortened
from megatron_ledom.planning.shapes import architecture_of, layout_of
from megatron_ledom.planning.step_time import muon_flops
from megatron_ledom.tables import aligned_lines

MOST_LINES = 12
"""Largest number of listed ranks or stages; of more, the first and the last are listed."""
PARTS = ("embedding", "attention", "mlp", "norms", "output")


def model_rows(config: RunConfig, model: ModelConfig) -> Iterator[Row]:
    """Yield shape, vocabulary and parameters."""
    yield "layers", f"{model.num_layers:,}"
    yield "heads x width", f"{model.num_attention_heads} x {head_dim(model)}, {query_groups(model)} key-value heads"
    if model.vocab_size is None:
        yield "vocabulary", "not known yet: no shard exists; set model.vocab_size to plan without shards"
        return
    padded = padded_rows(model)
    parameters = count_parameters(model, padded)
    yield "padded vocabulary", f"{padded:,} rows for {model.vocab_size:,} ids"
    yield "parameters", f"{scaled(parameters)} ({parameters:,})"
    yield "context", f"{config.data.seq_length:,} tokens, {config.data.direction}"
    if model.mtp_num_layers is not None:
        yield (
            "multi-token prediction",
            f"{_modules(model)}: not counted in parameters, memory, compute and time, here and in the MFU",
        )


def _modules(model: ModelConfig) -> str:
    return "1 module" if model.mtp_num_layers == 1 else f"{model.mtp_num_layers} modules"


def layout_rows(config: RunConfig, world_size: int, model: ModelConfig) -> Iterator[Row]:
    """Yield the sizes of the groups, and the memory of the model state on a rank."""
    parallel = config.parallel
    tensor, pipeline = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    yield "ranks", f"{world_size:,}"
    yield "tensor parallel", f"{tensor}{', with sequence parallel' if parallel.sequence_parallel else ''}"
    chunks = parallel.virtual_pipeline_model_parallel_size
    yield "pipeline parallel", f"{pipeline}{f', {chunks} chunks a stage' if chunks else ''}"
    yield "context parallel", f"{parallel.context_parallel_size}"
    yield "data parallel", f"{data_parallel_size(parallel, world_size)}"
    if model.vocab_size is not None:
        yield "model state a rank", f"about {state_gibibytes(config, model, world_size):,.2f} GiB, without activations"


def state_gibibytes(config: RunConfig, model: ModelConfig, world_size: int) -> float:
    """Return GiB of weights, fp32 gradients and the optimizer's state of one rank, on the largest pipeline stage."""
    shape, layout = architecture_of(model), layout_of(config, world_size)
    return max(sum(stage_state_bytes(shape, layout, stage)) for stage in range(layout.pipeline)) / GIB


def execution_rows(config: RunConfig) -> Iterator[Row]:
    """Yield the implementation of the layers and of communication; choices that depend on the machine are given as conditions."""
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
    yield "NCCL", f"{'; '.join(nccl)} (ignored on a CPU)" if nccl else "defaults"


def _layers_in_words(config: RunConfig) -> str:
    model = config.model
    if model.fp8 is not None or config.parallel.tp_comm_overlap or model.transformer_impl == "transformer_engine":
        return "Transformer Engine; the run stops if it or CUDA is missing"
    attention = "unfused attention" if model.attention_backend == "unfused" else "SDPA"
    attention += " and a document mask" if config.data.reset_attention_mask else ""
    if model.transformer_impl == "torch":
        return f"torch, with {attention}"
    if model.transformer_impl == "fused":
        return f"fused operators of this package, with {attention}; the run stops if they cannot run"
    ours = f"fused operators of this package if they can run, else torch; with {attention}"
    own = config.data.reset_attention_mask or model.attention_backend == "unfused"
    return ours if own else f"Transformer Engine if it is installed and CUDA is available, else {ours}"


def _recompute_in_words(config: RunConfig) -> str:
    parallel = config.parallel
    if parallel.recompute_granularity == "selective":
        return f"selective: {', '.join(parallel.recompute_modules)} of every layer"
    if parallel.recompute_granularity == "full":
        count = parallel.recompute_num_layers
        how = "in groups of {} layers" if parallel.recompute_method == "uniform" else "the first {} layers of a model chunk"
        return f"full, {parallel.recompute_method}: {how.format(count)}"
    return "none"


def batch_rows(config: RunConfig, world_size: int) -> Iterator[Row]:
    """Yield the sizes of micro-batch and global batch."""
    train, length = config.train, config.data.seq_length
    phases = batch_phases(config)
    sizes = [phase.global_batch_size for phase in phases]
    counts = [num_microbatches(config, world_size, size) for size in sizes]
    yield (
        "micro-batch",
        f"{train.micro_batch_size:,} {'sample' if train.micro_batch_size == 1 else 'samples'}, {train.micro_batch_size * length:,} tokens",
    )
    yield "micro-batches", f"{_span(counts)} an iteration"
    yield "samples a rank", f"{_span([count * train.micro_batch_size for count in counts])} an iteration"
    yield "global batch", f"{_span(sizes)} samples, {_span([size * length for size in sizes])} tokens"
    if has_batch_schedule(config):
        yield "batch schedule", "; ".join(shortened([*map(_phase_in_words, phases)], MOST_LINES))


def _span(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _phase_in_words(phase: BatchPhase) -> str:
    return f"{phase.global_batch_size:,} from iteration {phase.first_iteration:,} (sample {phase.first_sample:,})"


def run_rows(config: RunConfig, model: ModelConfig) -> Iterator[Row]:
    """Yield length, schedule, checkpoints and validations."""
    settings = config.optimizer
    warm_up = samples_before(config, settings.lr_warmup_iters) * config.data.seq_length
    yield "iterations", f"{config.train.train_iters:,}"
    yield "samples", f"{train_samples(config):,}"
    yield "tokens", f"{scaled(total_tokens(config))} ({total_tokens(config):,})"
    yield "optimizer", _optimizer_in_words(settings)
    yield "warm-up", f"{settings.lr_warmup_iters:,} iterations, {scaled(warm_up)} tokens"
    if settings.lr_decay_style == "constant":
        yield "learning rate", f"{settings.lr:g}, constant"
    else:
        yield "learning rate", f"{settings.lr:g} -> {settings.min_lr:g} {_decay_in_words(config)}"
    if config.train.z_loss_coeff:
        yield "z-loss", f"{config.train.z_loss_coeff:g} (log Z)^2"
    if config.train.auxiliary.kind is not None:
        yield (
            "auxiliary loss",
            f"{config.train.auxiliary.weight:g} x {config.train.auxiliary.kind}; its head and teacher are not counted below or in the plan",
        )
    yield "checkpoints", _checkpoints(config, model)
    if config.checkpoint.mirror is not None:
        yield "mirror", _mirror(config, model)
    if has_validation(config.data):
        samples = config.train.eval_iters * config.train.global_batch_size
        yield "validations", f"{validation_iterations(config):,}, {samples:,} samples of each set at most"
    else:
        yield "validations", "none: data.valid_blend, data.valid_sets and data.split are empty"


def _optimizer_in_words(settings: OptimizerSettings) -> str:
    """Return the optimizer of the matrices and of the other weights, and the state that they keep."""
    if settings.optimizer == "adam":
        return "AdamW, two moments of every weight"
    products = {"medium": "bf16", "high": "TF32 on a GPU", "highest": "fp32"}[settings.muon_fp32_matmul_prec]
    alone = "; depends on the tensor-parallel size (blockwise)" if settings.muon_tp_mode == "blockwise" else ""
    return (
        f"Muon for the matrices of the layers, one momentum, {settings.muon_num_ns_steps} iterations in {products}; AdamW for the other"
        f" weights{alone}"
    )


def _decay_in_words(config: RunConfig) -> str:
    settings, end = config.optimizer, lr_decay_iters(config)
    if settings.lr_decay_style == "WSD":
        assert settings.lr_wsd_decay_iters is not None
        return f"{settings.lr_wsd_decay_style} from iteration {end - settings.lr_wsd_decay_iters:,} to {end:,}, stable before"
    return f"{settings.lr_decay_style} until iteration {end:,}"


def _checkpoints(config: RunConfig, model: ModelConfig) -> str:
    """Return the number and size of checkpoints, and which of them are kept."""
    settings = config.checkpoint
    count = -(-config.train.train_iters // settings.save_interval)
    words = [f"{count:,}"]
    if model.vocab_size is not None:
        each = bytes_of_checkpoint(model, config.optimizer) / GIB
        words += [f"about {each:,.2f} GiB each", f"{count * each:,.1f} GiB written over the run"]
    words.append("written while training continues" if settings.async_save else "training waits for them")
    if settings.keep_last is not None:
        multiples = f" and those at multiples of {settings.keep_interval:,}" if settings.keep_interval else ""
        words.append(f"the newest {settings.keep_last:,}{multiples} kept")
    else:
        words.append("all kept")
    return ", ".join(words)


def _mirror(config: RunConfig, model: ModelConfig) -> str:
    """Return the address of the mirror, and the copies that it keeps."""
    settings = config.checkpoint
    kept = "all kept" if settings.mirror_keep_last is None else f"the newest {settings.mirror_keep_last:,}"
    kept += f" and those at multiples of {settings.mirror_keep_interval:,}" if settings.mirror_keep_interval else ""
    if model.vocab_size is not None and settings.mirror_keep_last is not None and not settings.mirror_keep_interval:
        each = bytes_of_checkpoint(model, config.optimizer) / GIB
        kept += f", about {(settings.mirror_keep_last + 1) * each:,.1f} GiB at most"
    return f"{settings.mirror}, {kept}"


def compute_rows(config: RunConfig, model: ModelConfig) -> Iterator[Row]:
    """Yield the numbers of floating-point operations."""
    if model.vocab_size is None:
        yield "FLOPs", "not known without the vocabulary"
        return
    each = flops_per_token(model, config.data.seq_length, padded_rows(model))
    yield "FLOPs a token", f"{each / 1e9:,.4g} GFLOP (forward and backward, full attention)"
    largest = " of the largest batch" if has_batch_schedule(config) else ""
    yield "FLOPs an iteration", f"{each * largest_batch(config) * config.data.seq_length:.4g}{largest}"
    yield "FLOPs of the run", f"{each * total_tokens(config):.4g}"
    if config.optimizer.optimizer == "muon":
        shared = ", shared by the data-parallel ranks" if config.parallel.use_distributed_optimizer else " on each rank"
        layout = layout_of(config, expected_world_size(config))
        yield (
            "FLOPs of Muon",
            f"{muon_flops(architecture_of(model), layout):.4g} a step for the layers of a pipeline stage{shared}",
        )


def operation_rows(config: RunConfig) -> Iterator[Row]:
    """Yield the reactions to bad iterations and hangs, and the records of the run."""
    train, logs = config.train, config.logging
    yield "loss not finite", train.on_nonfinite.replace("_", " ")
    yield (
        "spike",
        f"{train.on_spike.replace('_', ' ')}, from {train.spike_score:g} deviations above {train.spike_window} iterations",
    )
    yield "limits", f"{train.max_skips} skips in a row, {train.max_roll_backs} roll-backs to a checkpoint"
    if train.skip_iterations:
        yield "skipped", f"iterations {', '.join(map(str, train.skip_iterations))}"
    if train.watchdog_seconds:
        yield "watchdog", f"{train.watchdog_seconds:g} s without progress end the run"
    else:
        yield "watchdog", "off"
    boards = ["metrics.jsonl", *(["TensorBoard"] if logs.tensorboard else [])]
    boards += [f"Weights & Biases ({logs.wandb_project})"] if logs.wandb_project else []
    boards += [f"MLflow ({logs.mlflow_experiment})"] if logs.mlflow_experiment else []
    boards += [f"OpenTelemetry ({logs.otlp_endpoint})"] if logs.otlp_endpoint else []
    rhythm = "every iteration" if logs.log_interval == 1 else f"every {logs.log_interval:,} iterations"
    yield "metrics", f"{', '.join(boards)}, {rhythm}"
    if logs.profile_start is not None:
        ranks = ", ".join(map(str, logs.profile_ranks))
        yield "profile", f"iterations {logs.profile_start:,} to {logs.profile_stop or logs.profile_start:,} on ranks {ranks}"


@dataclass(frozen=True, slots=True)
class RankPosition:
    """The coordinates of a rank in the layout."""

    tensor: int
    context: int
    data: int
    pipeline: int


def rank_position(rank: int, parallel: ParallelConfig, world_size: int) -> RankPosition:
    """Return the position of a rank. The tensor-parallel index varies fastest, then context, data, pipeline, as in megatron-core."""
    rest, tensor = divmod(rank, parallel.tensor_model_parallel_size)
    rest, context = divmod(rest, parallel.context_parallel_size)
    pipeline, data = divmod(rest, data_parallel_size(parallel, world_size))
    return RankPosition(tensor, context, data, pipeline)


def rank_lines(config: RunConfig, world_size: int) -> list[str]:
    """Return a line for each tensor-parallel group: its ranks, and their position in the other dimensions."""
    tensor = config.parallel.tensor_model_parallel_size
    lines = []
    for first in range(0, world_size, tensor):
        position = rank_position(first, config.parallel, world_size)
        ranks = f"{first}" if tensor == 1 else f"{first}-{first + tensor - 1}"
        parts = [
            f"TP 0-{tensor - 1}" if tensor > 1 else "TP 0",
            f"CP {position.context}",
            f"DP {position.data}",
            f"PP {position.pipeline}",
        ]
        lines.append(f"{ranks:<13}  {'  '.join(f'{part:<7}' for part in parts)}".rstrip())
    return shortened(lines, MOST_LINES)


def parameter_lines(config: RunConfig, model: ModelConfig) -> list[str]:
    """Return a line for each pipeline stage: its layers and the weights of one of its ranks by part."""
    if model.vocab_size is None:
        return ["not known without the vocabulary"]
    rows: list[tuple[str, ...]] = [("stage", "layers", *PARTS, "sum")]
    for stage in range(config.parallel.pipeline_model_parallel_size):
        layers = ", ".join(f"{layers[0] + 1}-{layers[-1] + 1}" for layers in stage_layers(config, stage))
        counts = parameters_of_rank(config, model, stage)
        rows.append((str(stage), layers, *[f"{counts[part]:,}" for part in PARTS], f"{sum(counts.values()):,}"))
    lines = aligned_lines(rows)
    return [lines[0], *shortened(lines[1:], MOST_LINES)]


def stage_layers(config: RunConfig, stage: int) -> list[range]:
    """Return the layers of a pipeline stage, counted from 0, as one range for each model chunk."""
    stages, chunks = config.parallel.pipeline_model_parallel_size, config.parallel.virtual_pipeline_model_parallel_size or 1
    each = config.model.num_layers // (stages * chunks)
    starts = [(chunk * stages + stage) * each for chunk in range(chunks)]
    return [range(start, start + each) for start in starts]


def parameters_of_rank(config: RunConfig, model: ModelConfig, stage: int) -> dict[str, int]:
    """Return the number of weights on each rank of a pipeline stage, by part of the model."""
    return stage_parameters(architecture_of(model), layout_of(config, expected_world_size(config)), stage)


def padded_rows(model: ModelConfig) -> int:
    """Return the number of rows of the embedding. The vocabulary size must be known."""
    assert model.vocab_size is not None
    return padded_vocab_size(model.vocab_size, model.make_vocab_size_divisible_by)


def scaled(number: float) -> str:
    """Return a large number with four or five digits, such as `7.794 B` or `435.37 B`."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            count = number / size
            return f"{count:.{2 if count >= 100 else 3}f} {unit}"
    return f"{number:,.0f}"

"""What a run would do, without a GPU, data or torch: verdicts, the resolved configuration and every number that follows from it.

Rows of the dry run about what the layers are made of and how ranks talk.

Rows of the dry run about the layout: which rank holds which place, and how many parameters of each part of the model.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_ledom.config.checks import check_config
from megatron_ledom.config.derived import data_parallel_size, named_blends, planned_world_size, total_tokens
from megatron_ledom.config.gpu_checks import FP8_NEEDS
from megatron_ledom.config.load import to_yaml
from megatron_ledom.config.schema import ModelConfig, ParallelConfig, RunConfig
from megatron_ledom.data.blends.plan import PlannedSource, describe_sources, planned_sources
from megatron_ledom.data.blends.sources import check_manifests, split_shard
from megatron_ledom.data.shards.shard import ShardManifest, load_manifest
from megatron_ledom.planning.hardware import load_hardware
from megatron_ledom.planning.memory import stage_parameters, state_bytes
from megatron_ledom.planning.plan import Plan
from megatron_ledom.planning.run_plan import (
    Row,
    Verdict,
    batch_rows,
    compute_rows,
    disk_verdict,
    memory_verdict,
    model_rows,
    operation_rows,
    planned,
    run_rows,
)
from megatron_ledom.planning.shapes import architecture_of, layout_of
from megatron_ledom.planning.text import summary_rows


def engine_rows(config: RunConfig) -> Iterator[Row]:
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
    attention = "unfused attention" if model.attention_backend == "unfused" else "SDPA"
    attention += " and a mask of documents" if config.data.reset_attention_mask else ""
    if model.transformer_impl == "torch":
        return f"torch, with {attention}"
    if model.transformer_impl == "fused":
        return f"our fused operators, with {attention}; refused where they cannot run"
    ours = f"our fused operators where they can run, else torch; with {attention}"
    own = config.data.reset_attention_mask or model.attention_backend == "unfused"
    return ours if own else f"Transformer Engine where it is installed and CUDA is there, else {ours}"


def _recompute_in_words(config: RunConfig) -> str:
    parallel = config.parallel
    if parallel.recompute_granularity == "selective":
        return f"selective: {', '.join(parallel.recompute_modules)} of every layer"
    if parallel.recompute_granularity == "full":
        count = parallel.recompute_num_layers
        how = "in groups of {} layers" if parallel.recompute_method == "uniform" else "the first {} layers of a model chunk"
        return f"full, {parallel.recompute_method}: {how.format(count)}"
    return "none"


MOST_LINES = 12
"""Ranks or stages listed one by one; of more, the first and the last."""
PARTS = ("embedding", "attention", "mlp", "norms", "output")


@dataclass(frozen=True, slots=True)
class Place:
    """What one rank holds."""

    tensor: int
    context: int
    data: int
    pipeline: int


def layout_rows(config: RunConfig, world_size: int, model: ModelConfig) -> Iterator[Row]:
    """Sizes of the groups, and the memory that the model takes on a rank."""
    parallel = config.parallel
    tensor, pipeline = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    yield "ranks", f"{world_size:,}"
    yield "tensor parallel", f"{tensor}{', with sequence parallel' if parallel.sequence_parallel else ''}"
    chunks = parallel.virtual_pipeline_model_parallel_size
    yield "pipeline parallel", f"{pipeline}{f', {chunks} chunks a stage' if chunks else ''}"
    yield "context parallel", f"{parallel.context_parallel_size}"
    yield "data parallel", f"{data_parallel_size(parallel, world_size)}"
    if model.vocab_size is not None:
        yield "model state a rank", f"about {state_gibibytes(config, model, world_size):,.2f} GiB, activations not counted"


def rank_place(rank: int, parallel: ParallelConfig, world_size: int) -> Place:
    """Tensor-parallel neighbours come first, then context, data and pipeline, as megatron-core counts."""
    rest, tensor = divmod(rank, parallel.tensor_model_parallel_size)
    rest, context = divmod(rest, parallel.context_parallel_size)
    pipeline, data = divmod(rest, data_parallel_size(parallel, world_size))
    return Place(tensor, context, data, pipeline)


def rank_lines(config: RunConfig, world_size: int) -> list[str]:
    """A line for each group of tensor-parallel neighbours: their ranks and their places in the other dimensions."""
    tensor = config.parallel.tensor_model_parallel_size
    lines = []
    for first in range(0, world_size, tensor):
        place = rank_place(first, config.parallel, world_size)
        ranks = f"{first}" if tensor == 1 else f"{first}-{first + tensor - 1}"
        parts = [
            f"TP 0-{tensor - 1}" if tensor > 1 else "TP 0",
            f"CP {place.context}",
            f"DP {place.data}",
            f"PP {place.pipeline}",
        ]
        lines.append(f"{ranks:<13}  {'  '.join(f'{part:<7}' for part in parts)}".rstrip())
    return _shortened(lines)


def stage_layers(config: RunConfig, stage: int) -> list[range]:
    """The layers of a pipeline stage, from 0, one stretch for each model chunk."""
    stages, chunks = config.parallel.pipeline_model_parallel_size, config.parallel.virtual_pipeline_model_parallel_size or 1
    each = config.model.num_layers // (stages * chunks)
    starts = [(chunk * stages + stage) * each for chunk in range(chunks)]
    return [range(start, start + each) for start in starts]


def parameters_of_rank(config: RunConfig, model: ModelConfig, stage: int) -> dict[str, int]:
    """Weights on each rank of a pipeline stage, by part of the model; matrices are divided by the tensor-parallel ranks."""
    return stage_parameters(architecture_of(model), layout_of(config, planned_world_size(config)), stage)


def parameter_lines(config: RunConfig, model: ModelConfig) -> list[str]:
    """A line for each pipeline stage: its layers and the weights of one of its ranks by part."""
    if model.vocab_size is None:
        return ["not known without the vocabulary"]
    rows: list[tuple[str, ...]] = [("stage", "layers", *PARTS, "sum")]
    for stage in range(config.parallel.pipeline_model_parallel_size):
        layers = ", ".join(f"{stretch[0] + 1}-{stretch[-1] + 1}" for stretch in stage_layers(config, stage))
        counts = parameters_of_rank(config, model, stage)
        rows.append((str(stage), layers, *[f"{counts[part]:,}" for part in PARTS], f"{sum(counts.values()):,}"))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return [lines[0], *_shortened(lines[1:])]


def _shortened(lines: list[str]) -> list[str]:
    half = MOST_LINES // 2
    if len(lines) <= MOST_LINES:
        return lines
    return [*lines[:half], f"... {len(lines) - MOST_LINES:,} more", *lines[-half:]]


def state_gibibytes(config: RunConfig, model: ModelConfig, world_size: int) -> float:
    """Weights, fp32 gradients and Adam's state of one rank, on the largest pipeline stage."""
    shape, layout = architecture_of(model), layout_of(config, world_size)
    stages = [sum(stage_parameters(shape, layout, stage).values()) for stage in range(layout.pipeline)]
    return sum(state_bytes(shape, layout, max(stages))) / 2**30


@dataclass(frozen=True, slots=True)
class DryRun:
    """A run as it would be."""

    text: str
    verdicts: list[Verdict]
    """They stand at the top of the text too."""


def dry_run(config: RunConfig, world_size: int) -> DryRun:
    """Verdicts as comments, the resolved run as YAML, then its derived numbers and its blend as tables.

    The manifests of shards are read if they are there. Raises ConfigError when the run cannot work on `world_size` ranks, and
    what a start would raise on these manifests.
    """
    check_config(config, world_size)
    manifests = stored_manifests(config)
    if manifests:
        check_manifests(config, manifests)
    model = known_model(config, manifests)
    plan, sources = planned(config, world_size, model), _planned_sources(config, manifests)
    verdicts = [memory_verdict(config, plan), _disk_of_another_machine(disk_verdict(config, model)), *_repeats(config, sources)]
    top = "".join(f"# {verdict.line()}\n" for verdict in verdicts)
    tables = _tables(config, world_size, model, plan)
    tables.append(_titled("training data", _blend_lines(config, sources)))
    return DryRun(top + "\n\n".join([to_yaml(config).rstrip(), *tables]) + "\n", verdicts)


def _tables(config: RunConfig, world_size: int, model: ModelConfig, plan: Plan | None) -> list[str]:
    groups = {
        "model": list(model_rows(config, model)),
        "layout": list(layout_rows(config, world_size, model)),
        "engine": list(engine_rows(config)),
        "batch": list(batch_rows(config, world_size)),
        "run": list(run_rows(config, model)),
        "compute": list(compute_rows(config, model)),
        "plan": list(_plan_rows(config, plan)),
        "operation": list(operation_rows(config)),
    }
    width = max(len(name) for rows in groups.values() for name, _ in rows)
    tables = [_titled(title, [f"{name:<{width}}  {value}" for name, value in rows]) for title, rows in groups.items()]
    return [
        *tables,
        _titled("ranks", rank_lines(config, world_size)),
        _titled("parameters of a rank", parameter_lines(config, model)),
    ]


def describe_run(config: RunConfig, world_size: int) -> str:
    """The text of `dry_run`."""
    return dry_run(config, world_size).text


def _disk_of_another_machine(verdict: Verdict) -> Verdict:
    """A dry run may be far from the run's disk: it tells, and leaves the refusal to --check."""
    return (
        verdict
        if verdict.holds
        else replace(verdict, text=f"{verdict.text}: too little, if that is the run's disk", holds=True)
    )


def known_model(config: RunConfig, manifests: dict[str, ShardManifest]) -> ModelConfig:
    """The model with the vocabulary of the shards, where the config leaves it to them and they are there."""
    if config.model.vocab_size is not None or not manifests:
        return config.model
    return replace(config.model, vocab_size=next(iter(manifests.values())).provenance.vocab_size)


def _plan_rows(config: RunConfig, plan: Plan | None) -> Iterator[Row]:
    """What the planner says for the configured hardware."""
    if config.parallel.hardware is None:
        yield "hardware", "not named: parallel.hardware, or tools/plan_run.py --hardware, plans memory and time"
    elif plan is None:
        yield "hardware", f"{load_hardware(config.parallel.hardware).name}; no plan without the vocabulary"
    else:
        yield from summary_rows(plan)


def _titled(title: str, lines: list[str]) -> str:
    return "\n".join([title, *[f"  {line}".rstrip() for line in lines]])


def _planned_sources(config: RunConfig, manifests: dict[str, ShardManifest]) -> list[PlannedSource]:
    """What the run draws from each shard of its blend."""
    blend = config.data.train_blend
    if not blend:
        return []
    sizes = {prefix: _train_tokens(config, prefix, manifests.get(prefix)) for _, prefix in blend}
    return list(planned_sources(sizes, [weight for weight, _ in blend], total_tokens(config), config.data.seq_length))


def _repeats(config: RunConfig, sources: list[PlannedSource]) -> list[Verdict]:
    """The verdict on shards that would be read more than once without leave."""
    repeated = [source for source in sources if source.repeats]
    if not repeated or config.data.allow_repeats:
        return []
    worst = max(repeated, key=lambda source: source.epochs or 0.0)
    text = f"{len(repeated)} would repeat, {worst.name} most: such a run is refused without data.allow_repeats=true"
    remedy = "add shards, or lower train.train_iters or the weight in data.train_blend"
    return [Verdict("data", text, False, remedy, is_estimate=False)]


def _blend_lines(config: RunConfig, sources: list[PlannedSource]) -> list[str]:
    """The table of the blend, as it is logged before training; tokens and epochs where the shards are there."""
    if not sources:
        return ["none: data.train_blend is empty"]
    lines = describe_sources(sources, total_tokens(config)).splitlines()
    return [*lines, *(verdict.text for verdict in _repeats(config, sources))]


def _train_tokens(config: RunConfig, prefix: str, manifest: ShardManifest | None) -> int | None:
    """Tokens that the blend may draw from a shard."""
    if manifest is None:
        return None
    if config.data.split is None:
        return manifest.num_tokens
    if Path(f"{prefix}.idx").exists():
        return split_shard(prefix, manifest, config.data.split)[0].num_tokens
    return round(manifest.num_tokens * config.data.split[0] / sum(config.data.split))


def stored_manifests(config: RunConfig) -> dict[str, ShardManifest]:
    """The manifests of the run's shards that are there, by prefix."""
    prefixes = [prefix for _, blend in named_blends(config.data) for _, prefix in blend]
    return {prefix: load_manifest(prefix) for prefix in prefixes if Path(f"{prefix}.json").exists()}

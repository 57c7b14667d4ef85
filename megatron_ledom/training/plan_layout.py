"""Rows of the dry run about the layout: which rank holds which place, and how many parameters of each part of the model."""

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_ledom.config.derived import data_parallel_size, planned_world_size
from megatron_ledom.config.schema import ModelConfig, ParallelConfig, RunConfig
from megatron_ledom.planner.memory import stage_parameters, state_bytes
from megatron_ledom.planner.shapes import architecture_of, layout_of
from megatron_ledom.training.plan_run import Row

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

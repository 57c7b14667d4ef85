"""A plan as text for a terminal."""

from collections.abc import Iterable, Sequence

from megatron_ledom.planning.memory import GIB, StageMemory
from megatron_ledom.planning.plan import Plan, name_layout
from megatron_ledom.tables import aligned_lines

MEMORY = ("weights", "gradients", "optimizer", "activations", "logits", "working", "buffers")
"""Parts of a stage's memory, in the order of tables and plots."""
MOST_STAGES = 6
MOST_PHASES = 12
Row = tuple[str, str]


def describe_plan(plan: Plan) -> str:
    """Return the plan as text: layout, memory of the stages, parts of an iteration, and the whole run."""
    title = f"{name_layout(plan.layout)} on {plan.layout.num_ranks:,} x {plan.hardware.name}"
    fits = f"{plan.needed_gib:.1f} of {plan.hardware.memory_gib:g} GiB a device: {'fits' if plan.fits else 'DOES NOT FIT'}"
    parts = [
        f"{title}\n{fits}",
        titled("memory of a device, GiB", memory_lines(plan)),
        titled("an iteration", aligned_lines(time_rows(plan), "ll")),
        *([titled("batch schedule", phase_lines(plan))] if len(plan.phases) > 1 else []),
        titled("the run", aligned_lines(run_rows(plan), "ll")),
    ]
    return "\n\n".join(parts) + "\n"


def memory_lines(plan: Plan) -> list[str]:
    """Return a line for each stage; of more than `MOST_STAGES`, the first and the last."""
    rows: list[Sequence[str]] = [("stage", *MEMORY, "allowance", "sum", f"of {plan.hardware.memory_gib:g}")]
    rows += [_memory_row(plan, stage) for stage in plan.stages]
    lines = aligned_lines(rows)
    lines = [lines[0], *shortened(lines[1:], MOST_STAGES)]
    fullest = max(plan.stages, key=plan.stage_gib).stage
    verdict = "fits" if plan.fits else "does not fit: recompute more, or use more devices (--search finds a layout)"
    return [*lines, f"stage {fullest} is the fullest; it {verdict}"]


def _memory_row(plan: Plan, stage: StageMemory) -> list[str]:
    whole = plan.stage_gib(stage)
    parts = [getattr(stage, name) / GIB for name in MEMORY]
    allowance = whole - stage.allocated / GIB
    return [
        str(stage.stage),
        *(f"{part:.2f}" for part in (*parts, allowance, whole)),
        f"{whole / plan.hardware.memory_gib:.0%}",
    ]


def time_rows(plan: Plan) -> Iterable[Row]:
    """Yield the seconds of each part of an iteration and their fraction. Overlapped time counts once."""
    time, (low, high) = plan.time, plan.interval
    yield "seconds", f"{time.total:.2f} (between {low:.2f} and {high:.2f})"
    parts = {
        "matrix products": time.passes.matmul,
        "attention": time.passes.attention,
        "element-wise": time.passes.memory,
        "tensor-parallel traffic": time.passes.tensor_comm,
        "context-parallel traffic": time.passes.context_comm,
        "pipeline bubble and sends": time.pipeline - time.passes.total,
        "data-parallel traffic": time.data_comm,
        "optimizer": time.optimizer,
        "other": time.other,
    }
    for name, seconds in parts.items():
        if seconds > 5e-5 * time.total:
            yield name, f"{seconds:8.3f} s  {seconds / time.total:6.1%}"


def phase_lines(plan: Plan) -> list[str]:
    """Return a line for each global batch size of the run; of more than `MOST_PHASES`, the first and the last."""
    rows: list[Sequence[str]] = [("iterations", "samples each", "micro-batches", "s/iteration", "tokens/s a device")]
    for phase in plan.phases:
        rate = phase.batch.global_batch_size * plan.layout.seq_length / phase.seconds / plan.layout.num_ranks
        rows.append(
            (
                f"{phase.batch.first_iteration:,} to {phase.batch.last_iteration:,}",
                f"{phase.batch.global_batch_size:,}",
                f"{phase.num_microbatches:,}",
                f"{phase.seconds:.2f}",
                f"{rate:,.0f}",
            )
        )
    lines = aligned_lines(rows)
    return [lines[0], *shortened(lines[1:], MOST_PHASES), "the parts of an iteration above are those of the largest batch"]


def run_rows(plan: Plan) -> Iterable[Row]:
    """Yield throughput, duration, cost and checkpoints."""
    yield "tokens/s a device", f"{plan.tokens_per_second_per_device:,.0f}"
    yield (
        "MFU",
        f"{plan.mfu:.1%} ({plan.tokens_per_second_per_device * plan.flops_per_token / 1e12:,.3g} TFLOP/s, full attention)",
    )
    unit, name = (86400, "days") if plan.seconds >= 86400 else (3600, "hours")
    low, high = (plan.seconds * (1 + sign * plan.hardware.uncertainty) / unit for sign in (-1, 1))
    if len(plan.phases) > 1:
        yield "on average", f"{plan.mean_seconds:.2f} s an iteration, MFU {plan.mean_mfu:.1%}"
    yield name, f"{plan.seconds / unit:.2f} (between {low:.2f} and {high:.2f}) for {plan.tokens:,} tokens"
    yield "device-hours", f"{plan.device_hours:,.4g}" if plan.device_hours < 100 else f"{plan.device_hours:,.0f}"
    if plan.hardware.price_per_device_hour:
        price = plan.hardware.price_per_device_hour
        yield "cost", f"{plan.device_hours * price:,.0f} at {price:g} a device-hour"
    size = plan.checkpoint_bytes / GIB
    yield (
        "a checkpoint",
        f"{size:,.1f} GiB, {plan.checkpoint_seconds:.1f} s to write at {plan.hardware.storage_gb_per_second:g} GB/s a node",
    )


def summary_rows(plan: Plan) -> Iterable[Row]:
    """Yield the rows of the plan in a dry run."""
    stage = max(plan.stages, key=plan.stage_gib)
    low, high = plan.interval
    yield "hardware", plan.hardware.name
    yield (
        "memory a device",
        f"{plan.needed_gib:.1f} of {plan.hardware.memory_gib:g} GiB on stage {stage.stage}: state {stage.state / GIB:.1f},"
        f" activations {(stage.activations + stage.logits) / GIB:.1f}{'' if plan.fits else ' (does not fit)'}",
    )
    yield "seconds an iteration", f"{plan.time.total:.2f} (between {low:.2f} and {high:.2f})"
    yield "tokens/s a device", f"{plan.tokens_per_second_per_device:,.0f}, MFU {plan.mfu:.1%}"
    if len(plan.phases) > 1:
        yield "on average", f"{plan.mean_seconds:.2f} s an iteration, MFU {plan.mean_mfu:.1%}"
    yield "days", f"{plan.seconds / 86400:.1f}, {plan.device_hours:,.0f} device-hours"


def shortened(lines: list[str], most: int) -> list[str]:
    """Return at most `most` of the lines, the first and the last, with the number of others between them."""
    half = most // 2
    return lines if len(lines) <= most else [*lines[:half], f"... {len(lines) - most:,} more", *lines[-half:]]


def titled(title: str, lines: list[str]) -> str:
    """Return a title with indented lines below it."""
    return "\n".join([title, *[f"  {line}".rstrip() for line in lines]])

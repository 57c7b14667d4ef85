"""A plan as text for a terminal."""

from collections.abc import Iterable, Sequence

from megatron_ledom.planning.memory import GIB, StageMemory
from megatron_ledom.planning.plan import Plan, name_layout
from megatron_ledom.tables import aligned_lines

MEMORY = ("weights", "gradients", "optimizer", "activations", "logits", "working", "buffers")
"""Parts of a stage's memory, in the order of tables and plots."""
MOST_STAGES = 6
Row = tuple[str, str]


def describe_plan(plan: Plan) -> str:
    """Return the plan as text: layout, memory of the stages, parts of an iteration, and the whole run."""
    title = f"{name_layout(plan.layout)} on {plan.layout.num_ranks:,} x {plan.hardware.name}"
    fits = f"{plan.needed_gib:.1f} of {plan.hardware.memory_gib:g} GiB a device: {'fits' if plan.fits else 'DOES NOT FIT'}"
    parts = [
        f"{title}\n{fits}",
        titled("memory of a device, GiB", memory_lines(plan)),
        titled("an iteration", aligned_lines(time_rows(plan), "ll")),
        titled("the run", aligned_lines(run_rows(plan), "ll")),
    ]
    return "\n\n".join(parts) + "\n"


def memory_lines(plan: Plan) -> list[str]:
    """Return a line for each stage; of more than `MOST_STAGES`, the first and the last."""
    rows: list[Sequence[str]] = [("stage", *MEMORY, "allowance", "sum", f"of {plan.hardware.memory_gib:g}")]
    rows += [_memory_row(plan, stage) for stage in plan.stages]
    lines = aligned_lines(rows)
    half = MOST_STAGES // 2
    if len(plan.stages) > MOST_STAGES:
        lines = [*lines[: half + 1], f"... {len(plan.stages) - MOST_STAGES:,} more", *lines[-half:]]
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


def run_rows(plan: Plan) -> Iterable[Row]:
    """Yield throughput, duration, cost and checkpoints."""
    yield "tokens/s a device", f"{plan.tokens_per_second_per_device:,.0f}"
    yield (
        "MFU",
        f"{plan.mfu:.1%} ({plan.tokens_per_second_per_device * plan.flops_per_token / 1e12:,.3g} TFLOP/s, full attention)",
    )
    unit, name = (86400, "days") if plan.seconds >= 86400 else (3600, "hours")
    low, high = (plan.train_iters * seconds / unit for seconds in plan.interval)
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
    yield "days", f"{plan.seconds / 86400:.1f}, {plan.device_hours:,.0f} device-hours"


def titled(title: str, lines: list[str]) -> str:
    """Return a title with indented lines below it."""
    return "\n".join([title, *[f"  {line}".rstrip() for line in lines]])

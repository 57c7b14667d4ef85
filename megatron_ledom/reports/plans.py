"""What tools/plan_run.py does: read, plan or search, write.

A plan in pictures, drawn with matplotlib (the `plots` extra): memory of the stages, and who computes what when.
"""

import html
import io
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_ledom.config.derived import planned_world_size
from megatron_ledom.config.load import load_config, save_config
from megatron_ledom.config.schema import RunConfig
from megatron_ledom.errors import UsageError
from megatron_ledom.planning.hardware import load_hardware
from megatron_ledom.planning.memory import GIB
from megatron_ledom.planning.plan import Plan, make_plan, name_layout
from megatron_ledom.planning.schedule import simulate
from megatron_ledom.planning.search import Found, describe_found, search, table_of
from megatron_ledom.planning.text import MEMORY, describe_plan
from megatron_ledom.reports.pages import THEMES, figure, page
from megatron_ledom.storage.files import write_file
from megatron_ledom.storage.locks import output_folder_lock

COLOURS = ("#1f5fa8", "#7db8ff", "#1b7f5c", "#c1440e", "#8a2be2", "#b8860b", "#5b6470", "#b7b7b7")
"""Of the parts of memory, the allowance last; legible on both pages."""
PASSES = {True: ("#1f5fa8", "#7db8ff"), False: ("#c1440e", "#ff8a5b")}
"""Forward and backward passes; chunks alternate."""
MOST_ROUNDS = 3
"""Rounds of micro-batches that the timeline shows: warm-up, some of what repeats, and the end."""
NUMBERED = 200
"""Passes up to which the timeline writes the micro-batch's number into each."""


def write_pictures(plan: Plan, folder: str, text: str) -> str:
    """Write memory.png, timeline.png and plan.html with `text`; the path of the page. Raises UsageError without matplotlib."""
    os.makedirs(folder, exist_ok=True)
    figures = []
    for name, draw in (("memory", _draw_memory), ("timeline", _draw_timeline)):
        themes = {theme: _rendered(draw, plan, theme) for theme in THEMES}
        Path(folder, f"{name}.png").write_bytes(themes["light"])
        figures.append(figure(name, themes))
    title = f"{name_layout(plan.layout)} on {plan.layout.num_ranks:,} x {plan.hardware.name}"
    path = os.path.join(folder, "plan.html")
    Path(path).write_text(page(title, [*figures, f"<pre>{html.escape(text)}</pre>"]), encoding="utf-8")
    return path


def _rendered(draw: Any, plan: Plan, theme: str) -> bytes:
    """A picture as PNG for a light or a dark page."""
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError("pictures need matplotlib: pip install 'megatron-ledom[plots]'") from error
    colours = THEMES[theme]
    inked = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    settings = {
        "figure.facecolor": colours["paper"],
        "axes.facecolor": colours["paper"],
        **dict.fromkeys(inked, colours["ink"]),
    }
    with mpl.rc_context(settings):
        height = min(12.0, 1.6 + 0.45 * plan.layout.pipeline)
        picture = Figure(figsize=(10.0, max(2.6, height)), layout="constrained")
        draw(picture.subplots(), plan, colours["ink"])
        buffer = io.BytesIO()
        picture.savefig(buffer, dpi=130, format="png")
    return buffer.getvalue()


def _draw_memory(axes: Any, plan: Plan, ink: str) -> None:
    """A bar for each stage, in GiB, with the device's limit."""
    stages = [stage.stage for stage in plan.stages]
    start = [0.0] * len(stages)
    for name, colour in zip((*MEMORY, "allowance"), COLOURS, strict=True):
        if name == "allowance":
            width = [plan.stage_gib(stage) - stage.allocated / GIB for stage in plan.stages]
        else:
            width = [getattr(stage, name) / GIB for stage in plan.stages]
        axes.barh(stages, width, left=start, color=colour, label=name, height=0.75)
        start = [one + other for one, other in zip(start, width, strict=True)]
    axes.axvline(plan.hardware.memory_gib, color=ink, ls="--", lw=1.2, label=f"{plan.hardware.memory_gib:g} GiB")
    axes.set(xlabel="GiB a device", ylabel="pipeline stage", yticks=range(0, len(stages), 1 if len(stages) <= 16 else 8))
    axes.invert_yaxis()
    axes.legend(frameon=False, ncols=5, fontsize="small", labelcolor=ink, loc="lower center", bbox_to_anchor=(0.5, 1.0))


def _draw_timeline(axes: Any, plan: Plan, ink: str) -> None:
    """Every pass of every stage over time; what is empty is the bubble."""
    layout = plan.layout
    count = min(layout.num_microbatches, MOST_ROUNDS * layout.pipeline)
    events = simulate(plan.time.times, count)
    for event in events:
        colour = PASSES[event.op.is_forward][event.op.chunk % 2]
        axes.barh(event.stage, event.end - event.start, left=event.start, color=colour, height=0.85, edgecolor="white", lw=0.3)
        if len(events) <= NUMBERED:
            middle = (event.start + event.end) / 2
            axes.text(middle, event.stage, str(event.op.microbatch + 1), ha="center", va="center", fontsize=6, color="white")
    shown = f"the first {count}" if count < layout.num_microbatches else "all"
    axes.set(
        xlabel=f"seconds; forward passes blue, backward passes red, {shown} of {layout.num_microbatches} micro-batches",
        ylabel="pipeline stage",
        yticks=range(layout.pipeline) if layout.pipeline <= 16 else range(0, layout.pipeline, 8),
    )
    axes.tick_params(colors=ink)
    axes.invert_yaxis()


def plan_and_text(
    config: str,
    hardware: str,
    num_gpus: int | None,
    search: bool,
    save_config: str | None,
    output: str | None,
    overrides: Sequence[str],
) -> tuple[str, Plan]:
    """The plan, as text too; files as asked. Raises ConfigError, which says what would do, when nothing works."""
    machine = load_hardware(hardware)
    run = load_config(config, overrides)
    count = _devices(run, num_gpus)
    run = replace(run, parallel=replace(run.parallel, world_size=count, hardware=hardware))
    found, text = None, ""
    if search:
        found = _search(run, count, hardware)
        run, text = found.ranked[0][0], describe_found(found) + "\n\n"
    plan = make_plan(run, count, machine)
    text += describe_plan(plan)
    if save_config is not None:
        text += f"\n{_save(run, save_config)}\n"
    if output is not None:
        with output_folder_lock(output):
            text += f"\n{write_pictures(plan, output, text)}\n"
            if found is not None:
                write_file(Path(output, "layouts.tsv"), table_of(found))
    return text, plan


def plan_command(*arguments: Any) -> str:
    """The text of `plan_and_text`."""
    return plan_and_text(*arguments)[0]


def _devices(run: RunConfig, num_gpus: int | None) -> int:
    count = planned_world_size(run) if num_gpus is None else num_gpus
    if count < 1:
        raise UsageError(f"--num-gpus {count}: give the number of devices, 1 or more")
    return count


def _search(run: RunConfig, count: int, hardware: str) -> Found:
    return search(run, count, load_hardware(hardware))


def _save(run: RunConfig, path: str) -> str:
    save_config(run, path)
    return f"{path}: python -m megatron_ledom.pretrain --config {path}"

"""A plan in pictures, drawn with matplotlib (the `plots` extra): memory of the stages, and who computes what when."""

import html
import io
import os
from pathlib import Path
from typing import Any

from megatron_ledom.errors import UsageError
from megatron_ledom.pages import THEMES, figure, page
from megatron_ledom.planner.memory import GIB
from megatron_ledom.planner.plan import Plan, name_layout
from megatron_ledom.planner.schedule import simulate
from megatron_ledom.planner.text import MEMORY

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

"""The report of `ledom plan-run`: text, and plots of the memory of each stage and of the pipeline schedule."""

import html
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from megatron_ledom.config import load
from megatron_ledom.config.derived import expected_world_size
from megatron_ledom.errors import UsageError
from megatron_ledom.planning import search as layouts
from megatron_ledom.planning.hardware import load_hardware
from megatron_ledom.planning.memory import GIB
from megatron_ledom.planning.plan import Plan, make_plan, name_layout
from megatron_ledom.planning.plan_text import MEMORY, describe_plan
from megatron_ledom.planning.schedule import simulate
from megatron_ledom.planning.verdicts import not_counted
from megatron_ledom.reports.pages import THEMES, draw_png, figure, page
from megatron_ledom.storage.files import write_file
from megatron_ledom.storage.locks import output_folder_lock

COLOURS = ("#1f5fa8", "#7db8ff", "#1b7f5c", "#c1440e", "#8a2be2", "#b8860b", "#5b6470", "#b7b7b7")
"""Of the parts of memory, the allowance last; legible on light and dark pages."""
PASSES = {True: ("#1f5fa8", "#7db8ff"), False: ("#c1440e", "#ff8a5b")}
"""Colours of forward (True) and backward passes; the chunks of a stage alternate."""
MOST_ROUNDS = 3
"""Rounds of micro-batches that the timeline shows: warm-up, part of the steady state, and the end."""
NUMBERED = 200
"""Largest number of passes with which the timeline shows the number of each micro-batch."""


def plan_run(
    config: str,
    hardware: str,
    num_gpus: int | None = None,
    search: bool = False,
    save_config: str | None = None,
    output: str | None = None,
    overrides: Sequence[str] = (),
) -> tuple[str, Plan]:
    """Return the plan of a run as text and as a `Plan`; write the requested files.

    search: plan the best layout of `num_gpus` devices. output: folder for the plots, the page and the layouts. Raises
    ConfigError, with suggestions, if no layout works.
    """
    machine, run = load_hardware(hardware), load.load_config(config, overrides)
    count = expected_world_size(run) if num_gpus is None else num_gpus
    if count < 1:
        raise UsageError(f"--num-gpus {count}: it must be at least 1")
    run = replace(run, parallel=replace(run.parallel, world_size=count, hardware=hardware))
    found, text = None, ""
    if search:
        found = layouts.search(run, count, machine)
        run, text = found.ranked[0][0], layouts.describe_search(found) + "\n\n"
    plan = make_plan(run, count, machine)
    text += describe_plan(plan) + "".join(f"\nnot counted, in memory and time: {part}\n" for part in not_counted(run))
    if save_config is not None:
        load.save_config(run, save_config)
        text += f"\n{save_config}: python -m megatron_ledom.pretrain --config {save_config}\n"
    if output is not None:
        with output_folder_lock(output):
            text += f"\n{write_page(plan, Path(output), text)}\n"
            if found is not None:
                write_file(Path(output, "layouts.tsv"), layouts.table_of(found))
    return text, plan


def write_page(plan: Plan, folder: Path, text: str) -> Path:
    """Write memory.png, timeline.png and plan.html with `text`; return the path of the page. Raises UsageError without matplotlib."""
    plots = [
        figure(name, partial(_draw, draw, plan), folder / f"{name}.png")
        for name, draw in (("memory", _draw_memory), ("timeline", _draw_timeline))
    ]
    title = f"{name_layout(plan.layout)} on {plan.layout.num_ranks:,} x {plan.hardware.name}"
    write_file(folder / "plan.html", page(title, [*plots, f"<pre>{html.escape(text)}</pre>"]))
    return folder / "plan.html"


def _draw(draw: Callable[[Any, Plan, str], None], plan: Plan, theme: str) -> bytes:
    height = max(2.6, min(12.0, 1.6 + 0.45 * plan.layout.pipeline))
    return draw_png(theme, (10.0, height), lambda axes: draw(axes, plan, THEMES[theme]["ink"]), is_bare=True)


def _draw_memory(axes: Any, plan: Plan, ink: str) -> None:
    """Draw a bar for each stage, in GiB, with the device's limit."""
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
    """Draw every pass of every stage over time; the gaps are the pipeline bubble."""
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

"""Curves of runs over training tokens, drawn with matplotlib (the `plots` extra), for a light and a dark page."""

import io
from collections.abc import Sequence
from typing import Any

from megatron_ledom.errors import UsageError
from megatron_ledom.html_page import PAGES
from megatron_ledom.training.run_report import RunData

FIGURES = {
    "loss": ("lm_loss", "loss (nats a token)"),
    "grad_norm": ("grad_norm", "gradient norm before clipping"),
    "tokens_per_second": ("tokens_per_second", "tokens a second"),
    "lr": ("lr", "learning rate"),
}
"""Name of the picture: key of the records, label of the axis."""
COLOURS = {
    "light": {"reverse": ["#c1440e", "#8a2be2", "#b8860b"], "forward": ["#1f5fa8", "#1b7f5c", "#5b6470"]},
    "dark": {"reverse": ["#ff8a5b", "#c9a2ff", "#ffd166"], "forward": ["#7db8ff", "#6fe0b4", "#b7c0cc"]},
}
"""By page and direction; the second run of a direction takes the second colour."""
CUT = 0.03
"""Share of the longest run whose loss does not set the scale: the first steps fall from the loss of guessing."""
ENOUGH = 50
"""Records from which on that share is left out of the scale."""
MARKERS = "osD^v"


def draw(name: str, runs: Sequence[RunData], theme: str = "light", smooth: int = 0, title: str | None = None) -> bytes:
    """One of FIGURES as PNG: a line for each run; in `loss`, validation as points. `smooth`: records of the moving average.

    Raises UsageError where matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError("curves need matplotlib: pip install 'megatron-ledom[plots]'") from error
    page = PAGES[theme]
    inked = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    with mpl.rc_context(
        {"figure.facecolor": page["paper"], "axes.facecolor": page["paper"], **dict.fromkeys(inked, page["ink"])}
    ):
        figure = Figure(figsize=(8.5, 4.8 if name == "loss" else 3.4), layout="constrained")
        axes = figure.subplots()
        unit, word = _token_unit(runs)
        key, label = FIGURES[name]
        for run, colour in zip(runs, _colours(runs, theme), strict=True):
            _line(axes, run, key, colour, unit, smooth)
            if name == "loss":
                _validation(axes, run, colour, unit)
        axes.set(xlabel=f"training tokens{word}", ylabel=label)
        if title is not None:
            axes.set_title(title)
        if name == "loss":
            _scale(axes, runs, unit)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, labelcolor=page["ink"], fontsize="small")
        buffer = io.BytesIO()
        figure.savefig(buffer, dpi=130, format="png")
    return buffer.getvalue()


def _line(axes: Any, run: RunData, key: str, colour: str, unit: float, smooth: int) -> None:
    tokens, values = run.points(key)
    x, label = [token / unit for token in tokens], _label(run)
    if smooth > 1:
        axes.plot(x, values, color=colour, alpha=0.25, lw=0.8)
        axes.plot(x, moving_average(values, smooth), color=colour, lw=1.6, label=f"{label}, mean of {smooth} records")
    else:
        axes.plot(x, values, color=colour, alpha=0.9, lw=1.1, label=label)


def _validation(axes: Any, run: RunData, colour: str, unit: float) -> None:
    series = run.validations()
    for index, (name, (tokens, losses)) in enumerate(series.items()):
        which = f" {name}" if len(series) > 1 else ""
        axes.plot(
            [token / unit for token in tokens],
            losses,
            color=colour,
            marker=MARKERS[index % len(MARKERS)],
            ms=4.5,
            lw=1.2,
            ls="--",
            label=f"{_label(run)}, validation{which}",
        )


def _scale(axes: Any, runs: Sequence[RunData], unit: float) -> None:
    """Leave the steep fall of the first steps out of the scale of a long run, and say so."""
    longest = max(run.records[-1]["consumed_train_tokens"] for run in runs)
    shown = [y for run in runs for x, y in zip(*run.points("lm_loss"), strict=True) if x > CUT * longest]
    shown += [y for run in runs for _, losses in run.validations().values() for y in losses]
    if max(len(run.records) for run in runs) < ENOUGH or not shown:
        return
    margin = 0.05 * (max(shown) - min(shown))
    axes.set_ylim(min(shown) - margin, max(shown) + margin)
    axes.set_xlim(0, longest / unit * 1.01)
    top = max(y for run in runs for y in run.points("lm_loss")[1])
    if top > max(shown) + margin:
        axes.annotate(f"begins at {top:.2f}", (0.12, 0.97), xycoords="axes fraction", va="top", fontsize="small")


def moving_average(values: Sequence[float], width: int) -> list[float]:
    """The mean of each value and the up to `width` - 1 before it."""
    result, total = [], 0.0
    for index, value in enumerate(values):
        total += value - (values[index - width] if index >= width else 0.0)
        result.append(total / min(index + 1, width))
    return result


def _label(run: RunData) -> str:
    return run.name if run.direction in run.name else f"{run.name} ({run.direction})"


def _colours(runs: Sequence[RunData], theme: str) -> list[str]:
    seen = {"reverse": 0, "forward": 0}
    colours = []
    for run in runs:
        palette = COLOURS[theme][run.direction]
        colours.append(palette[seen[run.direction] % len(palette)])
        seen[run.direction] += 1
    return colours


def _token_unit(runs: Sequence[RunData]) -> tuple[float, str]:
    most = max(run.records[-1]["consumed_train_tokens"] for run in runs)
    for unit, word in ((1e9, " (billions)"), (1e6, " (millions)"), (1e3, " (thousands)")):
        if most >= unit:
            return unit, word
    return 1.0, ""

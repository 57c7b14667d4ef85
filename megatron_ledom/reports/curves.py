"""Curves of runs over training tokens, for a light and a dark page."""

import itertools
from collections.abc import Sequence
from typing import Any

from megatron_ledom.reports.pages import THEMES, draw_png
from megatron_ledom.reports.run_data import RunData, training_pairs, twins_of, validation_pairs

PLOTS = {
    "loss": ("lm_loss", "loss (nats a token)"),
    "grad_norm": ("grad_norm", "gradient norm before clipping"),
    "tokens_per_second": ("tokens_per_second", "tokens a second"),
    "lr": ("lr", "learning rate"),
}
"""For each plot: the key of the records and the label of the axis."""
DIFFERENCE = "loss_difference"
EXACT = ("lr",)
"""Keys without noise, which are not smoothed."""
COLOURS = {
    "light": {
        "reverse": ["#c1440e", "#8a2be2", "#b8860b"],
        "forward": ["#1f5fa8", "#1b7f5c", "#5b6470"],
        "both": ["#8a2be2", "#5b6470", "#c1440e"],
    },
    "dark": {
        "reverse": ["#ff8a5b", "#c9a2ff", "#ffd166"],
        "forward": ["#7db8ff", "#6fe0b4", "#b7c0cc"],
        "both": ["#c9a2ff", "#b7c0cc", "#ff8a5b"],
    },
}
"""For each page and direction; the second run of a direction has the second colour."""
STYLES = {"reverse": "-", "forward": (0, (5, 2)), "both": (0, (1, 1))}
"""Line styles for each direction, so that both of two overlapping curves are visible."""
CUT = 0.03
"""First part of the longest run, as a fraction, that does not set the scale, because its losses fall steeply."""
ENOUGH = 50
"""Smallest number of records with which CUT applies."""
MARKERS = "osD^v"


def plot_names(runs: Sequence[RunData]) -> list[str]:
    """Return the names of the plots of these runs: PLOTS and, for twins, their loss difference."""
    names = list(PLOTS)
    return [names[0], DIFFERENCE, *names[1:]] if twins_of(runs) else names


def draw(name: str, runs: Sequence[RunData], theme: str = "light", smooth: int = 0, title: str | None = None) -> bytes:
    """Draw one of `plot_names` as PNG: a line for each run; in `loss`, validation losses as points.

    smooth: number of records of the moving average. Raises UsageError if matplotlib is not installed.
    """
    unit, word = _token_unit(runs)
    if name == DIFFERENCE:
        return _draw_difference(runs, theme, smooth)
    key, label = PLOTS[name]

    def _fill(axes: Any) -> None:
        for run, colour in zip(runs, _colours(runs, theme), strict=True):
            _line(axes, run, key, colour, unit, 0 if key in EXACT else smooth)
            if name == "loss":
                _validation(axes, run, colour, unit)
        axes.set(xlabel=f"training tokens{word}", ylabel=label)
        if title is not None:
            axes.set_title(title)
        if name == "loss":
            _scale(axes, runs, unit)

    return draw_png(theme, (8.5, 4.8 if name == "loss" else 3.4), _fill)


def _line(axes: Any, run: RunData, key: str, colour: str, unit: float, smooth: int) -> None:
    tokens, values = run.points(key)
    _smoothed(axes, [token / unit for token in tokens], values, colour, smooth, _label(run), STYLES[run.direction])


def _smoothed(axes: Any, x: list[float], values: list[float], colour: str, smooth: int, label: str, style: Any = "-") -> None:
    """Draw a curve or, with `smooth`, a faint curve and over it the moving average of `smooth` records."""
    if smooth > 1:
        reach = smooth // 2 if len(values) > 2 * (smooth // 2) else 0
        inner = slice(reach, len(values) - reach)
        axes.plot(x, values, color=colour, alpha=0.25, lw=0.8, ls=style)
        label = f"{label}, mean of {smooth // 2 * 2 + 1} records"
        axes.plot(x[inner], moving_average(values, smooth)[inner], color=colour, lw=1.6, ls=style, label=label)
    else:
        axes.plot(x, values, color=colour, alpha=0.9, lw=1.1, ls=style, label=label)


def _draw_difference(runs: Sequence[RunData], theme: str, smooth: int) -> bytes:
    """Draw the reverse minus the forward loss of the first twins at the same tokens, for training and each validation set."""
    twins = twins_of(runs)
    assert twins is not None
    unit, word = _token_unit(runs)
    trained, validated = training_pairs(*twins), validation_pairs(*twins)

    def _fill(axes: Any) -> None:
        values = [one - other for one, other in trained.values()]
        _smoothed(axes, [tokens / unit for tokens in trained], values, COLOURS[theme]["forward"][2], smooth, "training")
        for index, (name, pairs) in enumerate(validated.items()):
            axes.plot(
                [tokens / unit for tokens in pairs],
                [one - other for one, other in pairs.values()],
                color=COLOURS[theme]["reverse"][0],
                marker=MARKERS[index % len(MARKERS)],
                ms=4.5,
                lw=1.2,
                ls=":",
                label=f"validation {name}",
            )
        axes.axhline(0, color=THEMES[theme]["ink"], lw=0.8)
        end = max([*trained, *(tokens for pairs in validated.values() for tokens in pairs)], default=0)
        late = [one - other for tokens, (one, other) in trained.items() if tokens > CUT * end]
        late += [one - other for pairs in validated.values() for one, other in pairs.values()]
        if len(trained) >= ENOUGH and late:
            low, high = min(0.0, *late), max(0.0, *late)
            axes.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
        axes.set(xlabel=f"training tokens{word}", ylabel="reverse minus forward\n(nats a token)")

    return draw_png(theme, (8.5, 3.4), _fill)


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
            ls=":",
            label=f"{_label(run)}, validation{which}",
        )


def _scale(axes: Any, runs: Sequence[RunData], unit: float) -> None:
    """Exclude the steep fall of the first steps from the scale of a long run, and note the first loss in the plot."""
    longest = max(run.last_tokens() for run in runs)
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
    """Return for each value the mean over it, up to width // 2 values before it, and equally many after it.

    The symmetric window does not shift a curve, and a straight line stays straight.
    """
    sums, reach = [0.0, *itertools.accumulate(values)], width // 2
    result = []
    for index in range(len(values)):
        near = min(reach, index, len(values) - 1 - index)
        result.append((sums[index + near + 1] - sums[index - near]) / (2 * near + 1))
    return result


def _label(run: RunData) -> str:
    return run.name if run.direction in run.name else f"{run.name} ({run.direction})"


def _colours(runs: Sequence[RunData], theme: str) -> list[str]:
    seen = dict.fromkeys(COLOURS[theme], 0)
    colours = []
    for run in runs:
        palette = COLOURS[theme][run.direction]
        colours.append(palette[seen[run.direction] % len(palette)])
        seen[run.direction] += 1
    return colours


def _token_unit(runs: Sequence[RunData]) -> tuple[float, str]:
    most = max(run.last_tokens() for run in runs)
    for unit, word in ((1e9, " (billions)"), (1e6, " (millions)"), (1e3, " (thousands)")):
        if most >= unit:
            return unit, word
    return 1.0, ""

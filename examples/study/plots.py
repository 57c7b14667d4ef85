"""The plots of the losses, each for light and dark pages."""

from functools import partial
from itertools import product
from typing import Any

from losses import Twins
from twins import DIRECTIONS

from megatron_ledom.reports import pages
from megatron_ledom.reports.curves import draw
from megatron_ledom.reports.run_data import load_runs

SMOOTH = 5
"""Records of the moving average of a loss curve."""


def loss_plots(twins: Twins, places: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Return the loss curves of the first seed's twins for each corpus and model, and the difference by position."""
    plots, seed = [], twins.settings.seeds[0]
    for corpus, model in product(twins.corpora.domains, twins.settings.models):
        runs = load_runs([str(twins.run_of(corpus, model, seed, direction)) for direction in DIRECTIONS])
        title = f"{corpus}, {model} model, seed {seed}"
        plots.append(pages.figure(f"loss: {title}", partial(draw, "loss", runs, smooth=SMOOTH, title=title)))
    for corpus, rows in places.items():
        plots.append(pages.figure(f"difference by position: {corpus}", partial(_draw_places, corpus, rows)))
    return plots


def _draw_places(corpus: str, rows: list[dict[str, Any]], theme: str) -> bytes:
    """Draw the difference in each tenth, with its interval if there is one."""
    colour = pages.COLOURS[theme][1]

    def _fill(axes: Any) -> None:
        middles = [10 * row["tenth"] + 5 for row in rows]
        axes.plot(middles, [row["difference"] for row in rows], color=colour, marker="o", ms=3, lw=1.4, label=corpus)
        known = [(x, *row["interval"]) for x, row in zip(middles, rows, strict=True) if row["interval"] is not None]
        axes.fill_between([x for x, _, _ in known], *([p[i] for p in known] for i in (1, 2)), color=colour, alpha=0.2)
        axes.axhline(0, color=pages.THEMES[theme]["ink"], lw=0.8)
        labels = {"xlabel": "position in the document, % of its tokens", "ylabel": "reverse minus forward (nats per token)"}
        axes.set(xlim=(0, 100), title=f"Loss difference by position: {corpus}, largest models", **labels)

    return pages.draw_png(theme, (8.5, 3.2), _fill)

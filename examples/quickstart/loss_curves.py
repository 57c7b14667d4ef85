"""One plot with the losses of both twins."""

from pathlib import Path

import matplotlib as mpl
from twins import DIRECTIONS, read_metrics

COLOURS = {"reverse": "#c1440e", "forward": "#1f5fa8"}


def plot_losses(runs: Path, output: Path, title: str) -> None:
    """Training loss as a line and validation loss as points, of `runs`/reverse and `runs`/forward, over training tokens."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for direction in DIRECTIONS:
        records = read_metrics(runs / direction / "metrics.jsonl")
        colour = COLOURS[direction]
        tokens = [record["consumed_train_tokens"] / 1e6 for record in records]
        axes.plot(
            tokens, [record["lm_loss"] for record in records], color=colour, alpha=0.6, lw=1, label=f"{direction}, training"
        )
        validated = [record for record in records if "validation" in record]
        axes.plot(
            [record["consumed_train_tokens"] / 1e6 for record in validated],
            [next(iter(record["validation"].values()))["lm_loss"] for record in validated],
            color=colour,
            marker="o" if direction == "reverse" else "s",
            lw=1.8,
            ls="--",
            label=f"{direction}, held-out files",
        )
    axes.set(xlabel="training tokens (millions)", ylabel="loss (nats a token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(output, dpi=130)
    plt.close(figure)

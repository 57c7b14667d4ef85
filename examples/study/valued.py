"""Ranked answers as candidates for another scorer, with the values of the forward model."""

from pathlib import Path
from typing import Any

from lines import read_lines
from problems import GOLD


def with_values(ranked: Path) -> list[dict[str, Any]]:
    """Return the lines of a ranked file with candidates that have their forward values, for another reverse model."""
    lines, names = [], ("forward_logprob", "forward_tokens")
    for record in read_lines(ranked):
        rows = zip(record["candidates"], record["scores"], strict=True)
        valued = [{"text": text, **{name: score[name] for name in names}} for text, score in rows]
        lines.append({**{name: record[name] for name in ("prompt", GOLD, "greedy")}, "candidates": valued})
    return lines

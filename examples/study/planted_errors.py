"""The causal part of the controls: right chains against the same chains with one planted error, by kind of error."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from control_choice import FIRST, SCORERS, differences, summary, values_of
from control_problems import GOLD_CHAIN, KINDS
from lines import read_lines

from megatron_ledom.evaluation.intervals import Values

BELOW = ("F2", "S")
"""Scorers from which the reverse model is compared by kind."""


def planted_results(paths: Sequence[Path]) -> dict[str, Any]:
    """Return by kind and scorer how often the right chain has the higher value, and the reverse model minus others.

    paths: files of scores, one for each seed. This is the area under the curve within questions: of pairs for the same question.
    pooled: the area over all pairs of a right and a planted chain, also of different questions, the mean over seeds.
    """
    seeds = [list(read_lines(path)) for path in paths]
    kinds = [
        kind for kind in KINDS if any(kind in record["kinds"] for record in seeds[0])
    ]  # few problems may have none of a kind
    wins = {(kind, name): _wins(seeds, kind, name) for kind in kinds for name in (FIRST, *SCORERS)}
    tested = differences({f"{kind}|{name}": values for (kind, name), values in wins.items()}, center=0.5)
    against = {f"{kind}|R - {other}": wins[kind, "R"] - wins[kind, other] for kind in kinds for other in BELOW}
    rows = {}
    for (kind, name), values in wins.items():
        own = tested[f"{kind}|{name}"]
        pooled = float(np.mean([_pooled(records, kind, name) for records in seeds]))
        kept = {key: own[key] for key in ("p", "holm_p", "is_significant")}
        rows[f"{kind}|{name}"] = {**summary(values), **kept, "pooled": pooled, "num": values.shape[1]}
    return {"kinds": kinds, "rows": rows, "against": differences(against)}


def _wins(seeds: Sequence[list[dict[str, Any]]], kind: str, scorer: str) -> Values:
    """Return for each seed and question that has this kind 1 if the right chain has the higher value, 0.5 for equal ones."""
    return np.array([[_win(*pair) for pair in _pairs(records, kind, scorer)] for records in seeds])


def _win(right: float, wrong: float) -> float:
    return 0.5 if right == wrong else float(right > wrong)


def _pairs(records: list[dict[str, Any]], kind: str, scorer: str) -> list[tuple[float, float]]:
    """Return the values of the right and of the planted chain of each question that has this kind."""
    found = []
    for record in records:
        if kind in record["kinds"]:
            values = values_of(record, scorer)
            found.append((float(values[record["kinds"].index(GOLD_CHAIN)]), float(values[record["kinds"].index(kind)])))
    return found


def _pooled(records: list[dict[str, Any]], kind: str, scorer: str) -> float:
    from scipy.stats import mannwhitneyu

    right, wrong = zip(*_pairs(records, kind, scorer), strict=True)
    return float(mannwhitneyu(right, wrong).statistic) / (len(right) * len(wrong))

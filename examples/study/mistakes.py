"""The kinds of mistakes in wrong answers of part 2, among all candidates and among the choices of each method."""

from collections import Counter
from collections.abc import Callable
from typing import Any

from indicators import KINDS, kind_of
from lines import read_lines
from rewards import Rewards

Record = dict[str, Any]
Score = dict[str, float | None]


def mistakes(rewards: Rewards, weights: list[float]) -> dict[str, dict[str, list[float]]]:
    """Return the fractions of KINDS by seed among all candidates, greedy answers and choices.

    weights: lambda of each seed.
    """
    found: dict[str, dict[str, list[float]]] = {}
    for seed, weight in zip(rewards.settings.seeds, weights, strict=True):
        records = list(read_lines(rewards.ranked("test", seed)))
        chosen: dict[str, list[str]] = {
            "all candidates": [kind_of(text, r) for r in records for text in r["candidates"]],
            "greedy": [kind_of(r["greedy"], r) for r in records],
            "forward likelihood, sum": [kind_of(_best(r, _forward), r) for r in records],
            "reverse only": [kind_of(_best(r, _reverse), r) for r in records],
            "Reverse Reward": [kind_of(_best(r, _reward(weight)), r) for r in records],
        }
        for name, kinds in chosen.items():
            counts = Counter(kinds)
            for kind in KINDS:
                found.setdefault(name, {}).setdefault(kind, []).append(counts[kind] / len(kinds))
    return found


def _best(record: Record, value: Callable[[Score], float]) -> str:
    text, _ = max(zip(record["candidates"], record["scores"], strict=True), key=lambda pair: value(pair[1]))
    return str(text)


def _forward(score: Score) -> float:
    return _known(score["forward_logprob"])


def _reverse(score: Score) -> float:
    return _known(score["reverse_logprob"])


def _reward(weight: float) -> Callable[[Score], float]:
    return lambda score: (1 - weight) * _forward(score) + weight * _reverse(score)


def _known(value: float | None) -> float:
    """Return the value, or one below all others for a candidate without a score, such as an empty one."""
    return -1e300 if value is None else value

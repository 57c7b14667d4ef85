"""Results of tools/evaluate.py for part 3, written by hand: each model knows exactly the facts that it read in its order."""

import json
from collections.abc import Mapping
from pathlib import Path

VALUES = {
    "forward": {
        "question_from_answer": {"": 0.0, "2_steps": 0.0, "solvable": 0.0, "has_answer": 0.0, "copied": 0.0},
        "reversal": {"": 0.6, "in_text_order": 1.0, "against_text_order": 0.25, "both_orders": 1.0, "unseen": 0.25},
        "reversal_written": {"": 0.5, "in_text_order": 0.9, "against_text_order": 0.0, "both_orders": 1.0, "unseen": 0.0},
        "abduction": {"": 0.7, "known_world": 0.9, "unseen_world": 0.25},
        "label_backfill": {"": 0.8, "all": 0.8},
    },
    "reverse": {
        "question_from_answer": {"": 0.5, "2_steps": 0.4, "solvable": 0.9, "has_answer": 0.6, "copied": 0.1},
        "reversal": {"": 0.6, "in_text_order": 0.25, "against_text_order": 1.0, "both_orders": 1.0, "unseen": 0.25},
        "reversal_written": {"": 0.5, "in_text_order": 0.0, "against_text_order": 0.8, "both_orders": 1.0, "unseen": 0.0},
        "abduction": {"": 0.7, "known_world": 0.9, "unseen_world": 0.25},
        "label_backfill": {"": 0.9, "all": 0.9},
    },
}
"""Accuracy by direction, task and group; "" means all questions."""
MAIN = {"forward": "choice_given_context/raw", "reverse": "joint/raw"}
"""Main metric of the choice tasks by direction."""
NUM_ITEMS = 40


def write_found(folder: Path, direction: str, values: Mapping[str, Mapping[str, float]]) -> None:
    """Write the summary.json of a model."""
    tasks = {}
    for task, groups in values.items():
        main = MAIN[direction] if task in ("reversal", "abduction", "label_backfill") else "accuracy"
        others = ("solvable", "has_answer", "copied")
        names = {name: name if name in others else f"{main}/{name}".rstrip("/") for name in groups}
        tasks[task] = {"main": main, "metrics": {names[name]: _metric(value) for name, value in groups.items()}}
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps({"tasks": tasks}))


def _metric(value: float) -> dict[str, float]:
    """Return a metric with an interval of 0.1 to each side."""
    return {"value": value, "stderr": 0.05, "low": max(0.0, value - 0.1), "high": min(1.0, value + 0.1), "num_items": NUM_ITEMS}


def write_abilities(folder: Path, seed: int) -> None:
    """Write the results of both directions for a seed."""
    for direction, values in VALUES.items():
        write_found(folder / "abilities/found" / f"{direction}_{seed}", direction, values)

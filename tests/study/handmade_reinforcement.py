"""Results of part 5 written by hand: Reverse Reward raises its reward and copies, and gives no more right answers."""

import json
from pathlib import Path
from typing import Any

METRICS = {"greedy": 0.5, "right": 0.4, "majority": 0.5, "reward": -9.0, "tokens": 10.0, "copied": 0.0, "known_words": 0.5}
METRICS |= {"has_end": 1.0, "false_calculation": 0.2, "unfit": 0.4, "is_cut": 0.0, "kl": 0.0}
CHANGES: dict[str, dict[str, float]] = {
    "none": {},
    "reverse": {"reward": -5.0, "copied": 0.6, "tokens": 25.0, "false_calculation": 0.1, "kl": 3.0},
    "shuffled": {"right": 0.3},
    "right": {"greedy": 0.9, "right": 0.8, "majority": 0.9},
}
"""By arm: what differs from METRICS."""


def write_reinforcement(folder: Path) -> None:
    """Write results of every arm for two seeds, in which all questions are alike."""
    folder.mkdir(parents=True)
    for arm, changes in CHANGES.items():
        for seed in (1, 2):
            questions = {name: [value] * 4 for name, value in (METRICS | changes).items()}
            step = {name: questions[name][0] for name in ("reward", "right", "tokens", "copied", "false_calculation")}
            right = {
                name: [value]
                for name, value in (METRICS | {"right": 1.0, "reward": -6.0}).items()
                if name not in ("kl", "is_cut")
            }
            found: dict[str, Any] = {
                "lambda": 0.5,
                "curve": [step] * 3,
                "log": [],
                "questions": questions,
                "right_answers": right,
            }
            (folder / f"{arm}_{seed}.json").write_text(json.dumps(found))

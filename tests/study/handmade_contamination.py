"""Results of part 6 written by hand: each read of a planted problem lowers the losses by 0.1, and its scorer finds the right answers.

Problems that are not planted have higher losses by 0.05.
"""

import json
from pathlib import Path
from typing import Any

from tests.study.handmade_ranked import write_ranked

READS = (0, 1, 4, 16)
NUM_QUESTIONS = 20


def write_contamination(folder: Path) -> None:
    """Write the results of two seeds of small twins: question k belongs to the group k % 4. Question 3 has no wrong candidate."""
    own, rewards = folder / "contamination", folder / "rewards_small"
    for path in (own, rewards):
        path.mkdir(parents=True)
    groups = [
        {"reads": reads, "copies": 5 * reads, "problems": list(range(group, NUM_QUESTIONS, 4))}
        for group, reads in enumerate(READS)
    ]
    plan = {"groups": groups, "replaced": list(range(5 * 5 * sum(READS)))}
    (own / "plan.json").write_text(json.dumps(plan))
    (rewards / "level.json").write_text(json.dumps({"level": 2, "greedy": {"1": 0.9, "2": 0.5}, "is_inside": True}))
    (own / "searches.json").write_text(json.dumps({"default": _search(300, False), "ngram 64": _search(0, True)}))
    for seed in (1, 2):
        write_ranked(rewards / f"development_{seed}.jsonl", is_helpful=True)
        write_ranked(rewards / f"test_{seed}.jsonl", is_helpful=None)
        for kind in ("scored", "both"):
            write_ranked(own / f"{kind}_contaminated_{seed}.jsonl", is_helpful=True)
            _forget_never_planted(own / f"{kind}_contaminated_{seed}.jsonl", rewards / f"test_{seed}.jsonl")
        for of, factor in (("clean", 0.0), ("contaminated", 1.0)):
            (own / f"scores_{of}_{seed}.json").write_text(json.dumps({"questions": _scores(factor)}))


def _forget_never_planted(contaminated: Path, clean: Path) -> None:
    """Replace the lines of problems that were not planted by those of the clean twins."""
    rows = zip(contaminated.read_text().splitlines(), clean.read_text().splitlines(), strict=True)
    lines = [after if READS[number % 4] else before for number, (after, before) in enumerate(rows)]
    contaminated.write_text("".join(f"{line}\n" for line in lines))


def _scores(factor: float) -> dict[str, list[Any]]:
    reads = [READS[number % 4] for number in range(NUM_QUESTIONS)]
    loss = [2 - factor * (0.1 * times if times else -0.05) for times in reads]
    wrong = [None if number == 3 else -9.0 + factor * times / 2 for number, times in enumerate(reads)]
    values = {"right_forward": [-4.0] * NUM_QUESTIONS, "wrong_forward": [None if one is None else -6.0 for one in wrong]}
    values |= {"right_reverse": [-8.0 + factor * times for times in reads], "wrong_reverse": wrong}
    return {"loss_forward": loss, "loss_reverse": loss, **values}


def _search(wrongly_dropped: int, is_rest: bool) -> dict[str, Any]:
    counts = {"planted_problems": 15, "missed_problems": 0, "planted_documents": 525, "missed_documents": 0}
    counts |= {"ordinary_documents": 3000, "wrongly_dropped": wrongly_dropped, "touched_never_planted": 2}
    return {**counts, "is_rest": is_rest}

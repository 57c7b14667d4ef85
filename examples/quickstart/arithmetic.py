"""Train twins on word problems; the forward one answers, and Reverse Reward chooses an answer, compared with the majority vote."""

import json
from pathlib import Path
from typing import Any

from commands import ROOT, ledom, run
from problems import GOLD, Level, parts
from twins import DIRECTIONS, Training, export_twins, train_all

FOLDER = Path("quickstart/problems")
ANSWERS = FOLDER / "answers/answers.jsonl"
REPORT = FOLDER / "answers/report"
CONFIG = ROOT / "examples/quickstart/problems.yaml"
LEVELS = [
    Level(steps=1, largest=5),
    Level(steps=1, largest=9),
    Level(steps=2, largest=9),
    Level(steps=3, largest=9, distractors=1),
]
"""Those of the small study, which the models learn together; the questions have the first."""
VOCAB_SIZE = 400
SEED = 1


def write_problems(num_train: int, num_test: int) -> None:
    """Write the problems as JSON lines, train a tokenizer on them, and make a shard of each direction."""
    FOLDER.mkdir(parents=True)
    for part, problems in parts(LEVELS, {"test": num_test, "train": num_train}, SEED).items():
        lines = [json.dumps(problem.as_fields()) for problem in problems if part == "train" or problem.level == 1]
        (FOLDER / f"{part}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    names = ["--input", FOLDER / "train.jsonl"]
    run(ledom("train-tokenizer", *names, "--output", FOLDER / "tokenizer", "--vocab-size", VOCAB_SIZE))
    names += ["--tokenizer", FOLDER / "tokenizer"]
    for direction in DIRECTIONS:
        run(ledom("preprocess-data", *names, "--output-prefix", FOLDER / f"{direction}_train", "--direction", direction))


def train_on_problems(overrides: list[str]) -> None:
    """Train both twins on the problems at the same time."""
    train_all([Training(f"{direction} problems", CONFIG, [*_settings(direction), *overrides]) for direction in DIRECTIONS])


def _settings(direction: str) -> list[str]:
    blend = f"data.train_blend=[[1.0,{FOLDER / f'{direction}_train'}]]"
    return [f"run_dir={FOLDER / 'runs' / direction}", f"data.direction={direction}", blend]


def choose_answers(num_answers: int) -> dict[str, Any]:
    """Export the twins, sample answers to the test problems, and compare the methods of choice. Returns the report of `report-rerank`."""
    export_twins(FOLDER)
    names = ["--forward", FOLDER / "models/forward", "--reverse", FOLDER / "models/reverse"]
    ANSWERS.parent.mkdir()
    names += ["--input", FOLDER / "test.jsonl", "--output", ANSWERS]
    options = ["--temperature", 0.8, "--max-new-tokens", 32, "--batch-size", 64, "--seed", SEED]
    run(ledom("rerank", *names, "--sample", num_answers, "--greedy", *options))
    run(ledom("report-rerank", ANSWERS, "--gold-key", GOLD, "--output", REPORT))
    report: dict[str, Any] = json.loads((REPORT / "report.json").read_text(encoding="utf-8"))
    return report

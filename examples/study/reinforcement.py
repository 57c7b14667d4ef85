"""Part 5: TRL's GRPO trains the forward twins with Reverse Reward as the reward, beside three controls.

Each arm of a seed begins with the same model and sees the same new questions of the chosen level in the same order.
"""

import importlib.util
import json
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from commands import tool
from families import mark_adjusted
from grpo_rewards import ARMS, BASE, REVERSE, SHUFFLED
from lines import read_lines, write_lines
from rewards import Rewards
from steps import Step

from megatron_ledom.errors import UsageError
from megatron_ledom.evaluation.intervals import LEVEL, Values, crossed_interval, crossed_p_value

METRICS = (
    "greedy",
    "right",
    "majority",
    "reward",
    "tokens",
    "copied",
    "known_words",
    "has_end",
    "false_calculation",
    "unfit",
    "is_cut",
    "kl",
)
"""Measured for each test question: the first and the third for one answer, the others as means over the sampled answers."""
CURVES = ("reward", "right", "tokens", "copied", "false_calculation")
"""Measured in each step of the training."""
NUM_RESAMPLES = 10_000
INSTALL = "pip install 'megatron-ledom[trl]'"


def is_installed() -> bool:
    """Return True if TRL, an extra, is installed. Without it this part is omitted."""
    return importlib.util.find_spec("trl") is not None


def check_installed() -> None:
    """Raise UsageError if TRL is not installed."""
    if not is_installed():
        raise UsageError(f"the part reinforcement needs TRL, which is not installed; run {INSTALL}")


class Reinforcement:
    """The files of part 5, and the steps that write them."""

    def __init__(self, rewards: Rewards) -> None:
        self.rewards, self.twins, self.settings = rewards, rewards.twins, rewards.settings.reinforcement
        self.folder = self.twins.folder / "reinforcement"
        self.questions = self.folder / "questions.jsonl"

    def found(self, arm: str, seed: int) -> Path:
        """Return the file of the results of an arm."""
        return self.folder / f"{arm}_{seed}.json"

    def stages(self) -> Iterator[list[Step]]:
        """Yield the steps: models of seeds that the other parts do not have, questions, training. None without TRL."""
        if not is_installed():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        new = [seed for seed in self.settings.seeds if seed not in self.rewards.seeds]
        yield from self.twins.more_seeds(self.rewards.model, self.settings.seeds)
        yield [self.rewards.ranked_step("development", seed) for seed in new] + [self._questions()]
        yield [self._reinforce(arm, seed) for arm, seed in product(ARMS.values(), self.settings.seeds)]

    def _questions(self) -> Step:
        level, problems = self.rewards.folder / "level.json", self.twins.folder / "maths/reinforcement.jsonl"

        def _write() -> None:
            chosen = json.loads(level.read_text(encoding="utf-8"))["level"]
            write_lines(self.questions, [record for record in read_lines(problems) if int(record["level"]) == chosen])

        return Step(name="reinforcement_questions", inputs=[level, problems], outputs=[self.questions], work=_write)

    def _reinforce(self, arm: str, seed: int) -> Step:
        forward, reverse = (self.rewards.model_of(seed, direction) for direction in ("forward", "reverse"))
        files = {
            "--forward": forward,
            "--reverse": reverse,
            "--questions": self.questions,
            "--development": self.rewards.ranked("development", seed),
            "--test": self.rewards.folder / "test.jsonl",
        }
        settings, output = self.settings, self.found(arm, seed)
        sizes = ["--steps", settings.steps, "--num-questions", settings.num_questions]
        sizes += ["--num-generations", settings.num_generations, "--learning-rate", settings.learning_rate]
        sizes += ["--num-samples", settings.num_samples, "--max-new-tokens", self.rewards.max_new_tokens, "--seed", seed]
        named = [part for pair in files.items() for part in pair]
        command = tool("examples/study/reinforce.py", "--arm", arm, *named, "--output", output, *sizes)
        return Step(name=f"reinforce_{output.stem}", inputs=list(files.values()), outputs=[output], commands=[command])

    def results(self) -> dict[str, Any] | None:
        """Return the measures of each arm and their paired differences from no training, and the curves. None without TRL.

        right_answers: the same measures of the right answers themselves.
        """
        if not is_installed():
            return None
        seeds = self.settings.seeds
        found = {name: [self._read(arm, seed) for seed in seeds] for name, arm in ARMS.items()}
        values = {name: {m: _values(runs, m) for m in METRICS} for name, runs in found.items()}
        arms = {name: {m: _summary(rows[m], rows[m] - values[BASE][m]) for m in METRICS} for name, rows in values.items()}
        against = {m: values[REVERSE][m] - values[SHUFFLED][m] for m in METRICS}
        one, differences = self.settings, {m: _summary(rows, rows) for m, rows in against.items()}
        mark_adjusted([arms[name][m] for name in arms if name != BASE for m in METRICS] + list(differences.values()))
        return {
            "seeds": seeds,
            "lambdas": [run["lambda"] for run in found[BASE]],
            "settings": {
                n: getattr(one, n) for n in ("steps", "num_questions", "num_generations", "learning_rate", "num_samples")
            },
            "num_test": values[BASE]["right"].shape[1],
            "arms": arms,
            "against_shuffled": differences,
            "right_answers": _means_of_right(found[BASE]),
            "curves": {name: _curves(runs) for name, runs in found.items() if name != BASE},
        }

    def _read(self, arm: str, seed: int) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.found(arm, seed).read_text(encoding="utf-8"))
        return found


def _values(runs: list[dict[str, Any]], metric: str) -> Values:
    """Return a measure [seeds, questions]."""
    return np.array([run["questions"][metric] for run in runs], dtype=np.float64)


def _summary(values: Values, differences: Values) -> dict[str, Any]:
    options = {"level": LEVEL, "num_resamples": NUM_RESAMPLES, "seed": 0}
    return {
        "mean": float(values.mean()),
        "interval": crossed_interval(values, **options),
        "by_seed": values.mean(axis=1).tolist(),
        "difference": float(differences.mean()),
        "difference_interval": crossed_interval(differences, **options),
        "p": crossed_p_value(differences, num_resamples=NUM_RESAMPLES, seed=0),
    }


def _means_of_right(runs: list[dict[str, Any]]) -> dict[str, float]:
    names = runs[0]["right_answers"]
    return {name: float(np.mean([run["right_answers"][name] for run in runs])) for name in names}


def _curves(runs: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Return by measure the means over the seeds in each step."""
    return {name: np.mean([[step[name] for step in run["curve"]] for run in runs], axis=0).tolist() for name in CURVES}

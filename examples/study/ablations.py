"""Part 4: other scorers and rewards on the same candidates, and models that read in the wrong direction."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from commands import tool
from families import mark_adjusted
from lines import write_lines
from losses import ISOLATED, export_step, train_step
from rewards import GOLD, PARTS, Rewards, ranking_step
from steps import Step
from valued import with_values

from megatron_ledom.evaluation.grading.answers import answers_by
from megatron_ledom.evaluation.intervals import LEVEL, Values, crossed_p_value
from megatron_ledom.evaluation.selection_methods import Question, load_questions
from megatron_ledom.inference.reverse_reward.reward import RewardSettings
from megatron_ledom.reports.method_comparison import MAIN, ReportSettings, interval_of, outcomes_of

PAIRED = {"scorer of pairs, all tokens": "all", "scorer of pairs, question only": "scored"}
"""Scorers trained on pairs, and the data.loss_tokens of each."""
WRONG = "wrong direction"


class Ablations:
    """The files of part 4, and the steps that write them."""

    def __init__(self, rewards: Rewards) -> None:
        self.rewards, self.twins, self.settings = rewards, rewards.twins, rewards.settings
        self.folder = self.twins.folder / "ablations"

    def scorers(self, seed: int) -> dict[str, Path]:
        """Return by name the folder of each reverse model that scores instead of the twin."""
        pairs = {name: self._paired_model(tokens, seed) for name, tokens in PAIRED.items()}
        smaller = list(self.settings.models)[:-1]
        return pairs | {f"scorer of size {m}": self.twins.model_of("maths", m, seed, "reverse") for m in smaller}

    def _paired_model(self, loss_tokens: str, seed: int) -> Path:
        return self.folder / "models" / f"pairs_{loss_tokens}_{seed}"

    def scored(self, part: str, seed: int, scorer: str) -> Path:
        """Return the file of the candidates of part 2 with another scorer's values."""
        return self.folder / f"{part}_{seed}_{scorer.replace(' ', '_').replace(',', '')}.jsonl"

    def stages(self) -> Iterator[list[Step]]:
        """Yield the steps: pairs, scorers, candidates, scores."""
        train, tokenizer = (self.twins.folder / "maths" / name for name in ("train.jsonl", "tokenizer"))
        names = ["--input", train, "--tokenizer", tokenizer, "--output-prefix", self.folder / "pairs/train"]
        command = tool("tools/prepare_pairs.py", *names, "--seq-length", 256, "--overwrite")
        yield [Step(name="pairs", inputs=[train, tokenizer], outputs=[self.folder / "pairs"], commands=[command])]
        paired = [(tokens, seed) for tokens in PAIRED.values() for seed in self.settings.seeds]
        yield [self._train(*one) for one in paired]
        yield [export_step(self._run(*one), self._paired_model(*one)) for one in paired]
        yield [self._candidates(part, seed) for seed in self.settings.seeds for part in PARTS]
        yield [self._mislabel(seed) for seed in self.settings.seeds]
        steps = [
            self._score(part, seed, scorer, self.rewards.model_of(seed, "forward"), folder, "candidates")
            for seed in self.settings.seeds
            for part in PARTS
            for scorer, folder in self.scorers(seed).items()
        ]
        wrong = [(seed, *(self._mislabelled(seed, d) for d in ("forward", "reverse"))) for seed in self.settings.seeds]
        yield steps + [self._score("test", seed, WRONG, forward, reverse, "texts") for seed, forward, reverse in wrong]

    def _run(self, loss_tokens: str, seed: int) -> Path:
        return self.folder / "runs" / f"pairs_{loss_tokens}_{seed}"

    def _train(self, loss_tokens: str, seed: int) -> Step:
        pairs = self.folder / "pairs"
        data = [f"data.train_blend=[[1, {pairs / 'train'}]]", f"data.loss_tokens={loss_tokens}", *ISOLATED]
        return train_step(self.twins, self._run(loss_tokens, seed), "maths", self.rewards.model, seed, [pairs], data)

    def _candidates(self, part: str, seed: int) -> Step:
        ranked = self.rewards.ranked(part, seed)
        outputs = [self.folder / f"{kind}_{part}_{seed}.jsonl" for kind in ("candidates", "texts")]

        def _write() -> None:
            """Write the candidates with their forward values, and as texts alone.

            Models that read in the wrong direction get the texts alone.
            """
            valued = with_values(ranked)
            bare = [{**record, "candidates": [one["text"] for one in record["candidates"]]} for record in valued]
            for path, records in zip(outputs, (valued, bare), strict=True):
                write_lines(path, records)

        return Step(name=f"candidates_{part}_{seed}", inputs=[ranked], outputs=outputs, work=_write)

    def _mislabelled(self, seed: int, direction: str) -> Path:
        return self.folder / "models" / f"said_to_be_{direction}_{seed}"

    def _mislabel(self, seed: int) -> Step:
        """Return the step that copies the twins with the other direction in their config."""
        sides = {"forward": "reverse", "reverse": "forward"}
        inputs = [self.rewards.model_of(seed, truth) for truth in sides.values()]

        def _copy() -> None:
            for said, truth in sides.items():
                target = self._mislabelled(seed, said)
                shutil.copytree(self.rewards.model_of(seed, truth), target)
                config = json.loads((target / "config.json").read_text(encoding="utf-8"))
                (target / "config.json").write_text(json.dumps({**config, "direction": said}), encoding="utf-8")

        outputs = [self._mislabelled(seed, said) for said in sides]
        return Step(name=f"mislabel_{seed}", inputs=inputs, outputs=outputs, work=_copy)

    def _score(self, part: str, seed: int, scorer: str, forward: Path, reverse: Path, kind: str) -> Step:
        candidates, output = self.folder / f"{kind}_{part}_{seed}.jsonl", self.scored(part, seed, scorer)
        return ranking_step(f"score_{output.stem}", candidates, output, [forward, reverse])

    def results(self) -> list[dict[str, Any]]:
        """Return the accuracy of each variant by seed, and its paired difference from the Reverse Reward of part 2."""
        settings = ReportSettings(gold_key=GOLD, reward=RewardSettings())
        development, test = (self.rewards.questions(part) for part in PARTS)
        base = outcomes_of(MAIN, test, settings, development)
        rows = [_row(name, outcomes_of(name, test, settings, development), base, settings) for name in _PLAIN]
        for kind in ("token", "byte"):
            reward = replace(settings.reward, forward_normalization=kind, reverse_normalization=kind)
            other = [self.rewards.questions(part, reward) for part in PARTS]
            rows.append(_row(f"both terms per {kind}", outcomes_of(MAIN, other[1], settings, other[0]), base, settings))
        for scorer in self.scorers(self.settings.seeds[0]):
            other = [self._questions(part, scorer) for part in PARTS]
            rows.append(_row(scorer, outcomes_of(MAIN, other[1], settings, other[0]), base, settings))
        mark_adjusted(rows)
        return rows

    def wrong_direction(self) -> list[dict[str, Any]]:
        """Return the accuracy of models that read in the wrong direction, compared with chance.

        Chance is the mean over all candidates of the same questions. `right_way`: the same comparison for the model in
        its own direction. If it is not above chance, the control shows nothing.
        """
        settings = ReportSettings(gold_key=GOLD, reward=RewardSettings())
        wrong = self._questions("test", WRONG)
        chance, test = outcomes_of("random of N", wrong, settings, wrong), self.rewards.questions("test")
        methods = {  # method with the model in the other's role -> (method in its own role, name)
            "forward likelihood, mean": ("reverse only", "reverse model fed text order"),
            "reverse only": ("forward likelihood, mean", "forward model fed reversed order"),
        }
        rows = []
        for method, (own_method, name) in methods.items():
            right_way = _row(own_method, outcomes_of(own_method, test, settings, test), chance, settings)
            row = _row(name, outcomes_of(method, wrong, settings, wrong), chance, settings)
            rows.append({**row, "right_way": [right_way["difference"], right_way["difference_interval"]]})
        mark_adjusted(rows)
        for row in rows:  # a guard must not miss an error, so it is not corrected
            row["is_significant"] = row["p"] < 1 - LEVEL
        return rows

    def _questions(self, part: str, scorer: str) -> list[list[Question]]:
        paths = [self.scored(part, seed, scorer) for seed in self.settings.seeds]
        return [load_questions(path, GOLD, answers_by("number"), RewardSettings()) for path in paths]


_PLAIN = (MAIN, "reverse only", "forward likelihood, sum", "forward likelihood, mean", "random of N")


def _row(name: str, outcomes: Values, base: Values, settings: ReportSettings) -> dict[str, Any]:
    difference = np.round(outcomes - base, 12) + 0.0  # rounding of means is not a difference
    return {
        "name": name,
        "accuracy": float(outcomes.mean()),
        "interval": interval_of(outcomes, LEVEL, settings),
        "by_seed": outcomes.mean(axis=1).tolist(),
        "difference": float(difference.mean()),
        "difference_interval": interval_of(difference, LEVEL, settings),
        "p": crossed_p_value(difference, num_resamples=settings.num_resamples, seed=settings.seed),
    }

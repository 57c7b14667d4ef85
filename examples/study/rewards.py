"""Part 2: the forward model answers and Reverse Reward chooses, compared with baselines and beam search."""

import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from commands import tool
from lines import read_lines, write_lines
from losses import Twins
from problems import GOLD
from steps import Step

from megatron_ledom.evaluation.grading.answers import answers_by, is_right
from megatron_ledom.evaluation.intervals import LEVEL
from megatron_ledom.evaluation.selection_methods import Question, load_questions, share_with_any
from megatron_ledom.inference.reverse_reward.reward import RewardSettings
from megatron_ledom.reports.method_comparison import MAIN, ReportSettings, compare, interval_of, num_candidates, outcomes_of

BATCH = 64
WANTED = (0.2, 0.6)
"""Range of the greedy accuracy of a level that can be chosen."""
PARTS = ("development", "test")


class Rewards:
    """The files of part 2, and the steps that write them."""

    def __init__(self, twins: Twins, model: str | None = None, seeds: list[int] | None = None) -> None:
        """Use another model and its seeds than part 2 does, if they are given, in a folder of their own."""
        self.twins, self.settings = twins, twins.settings
        self.model, self.seeds = model or twins.largest, seeds or self.settings.seeds
        self.folder = twins.folder / ("rewards" if model is None else f"rewards_{model}")
        self.prefix = "" if model is None else f"{model}_"
        longest = max(level.steps for level in self.settings.levels)
        self.max_new_tokens = 16 * (longest + 1)

    def model_of(self, seed: int, direction: str) -> Path:
        """Return the folder of the twin that answers (forward) or scores (reverse)."""
        return self.twins.model_of("maths", self.model, seed, direction)

    def ranked(self, part: str, seed: int) -> Path:
        """Return the file of the ranked candidates of a part."""
        return self.folder / f"{part}_{seed}.jsonl"

    def beam(self, seed: int) -> Path:
        """Return the file of the beam search's answers to the test part."""
        return self.folder / f"beam_{seed}.jsonl"

    def stages(self) -> Iterator[list[Step]]:
        """Yield the steps: greedy answers to the calibration part, the level, sampling and search at that level."""
        *before, last = self.ranked_stages()
        beams, expansions = self.settings.beams
        searched = ["--beam", beams, "--expansions", expansions]
        yield from before
        yield last + [self.rerank_step(self.folder / "test.jsonl", self.beam(seed), seed, searched) for seed in self.seeds]

    def ranked_stages(self) -> Iterator[list[Step]]:
        """Yield the steps without the search."""
        self.folder.mkdir(parents=True, exist_ok=True)
        calibration = self.twins.folder / "maths/calibration.jsonl"
        seeds = self.seeds
        yield [self.rerank_step(calibration, self.ranked("calibration", s), s, ["--sample", 1, "--greedy"]) for s in seeds]
        inputs = [self.ranked("calibration", seed) for seed in seeds]
        inputs += [self.twins.folder / "maths" / f"{part}.jsonl" for part in PARTS]
        outputs = [self.folder / name for name in ("level.json", *(f"{part}.jsonl" for part in PARTS))]
        name = f"{self.prefix}level"
        yield [Step(name=name, inputs=inputs, outputs=outputs, work=self._choose_level, settings=WANTED)]
        yield [self.ranked_step(part, seed) for seed in seeds for part in PARTS]

    def ranked_step(self, part: str, seed: int) -> Step:
        """Return the step that samples and ranks the candidates of a part."""
        return self.sampling_step(part, self.ranked(part, seed), seed, self.twins_of(seed))

    def sampling_step(self, part: str, output: Path, seed: int, models: Sequence[Path]) -> Step:
        """Return the step that samples and ranks the candidates of a part. models: the forward and the reverse one."""
        options = ["--sample", self.settings.num_samples, "--greedy"]
        return self.rerank_step(self.folder / f"{part}.jsonl", output, seed, options, models)

    def twins_of(self, seed: int) -> list[Path]:
        """Return the folders of the forward and the reverse twin of a seed."""
        return [self.model_of(seed, direction) for direction in ("forward", "reverse")]

    def rerank_step(
        self, questions: Path, output: Path, seed: int, options: list[Any], models: Sequence[Path] | None = None
    ) -> Step:
        """Return the step in which tools/rerank.py samples and ranks, with the twins of a seed or the given models."""
        sampling = ["--temperature", self.settings.temperature, "--max-new-tokens", self.max_new_tokens, "--seed", seed]
        name = f"rerank_{self.prefix}{output.stem}"
        return ranking_step(name, questions, output, models or self.twins_of(seed), [*options, *sampling])

    def _choose_level(self) -> None:
        """Choose the first level whose mean greedy accuracy is in WANTED, else the nearest to its middle."""
        answers = answers_by("number")
        right: dict[int, list[bool]] = {}
        for seed in self.seeds:
            for record in read_lines(self.ranked("calibration", seed)):
                right.setdefault(int(record["level"]), []).append(is_right(answers, str(record[GOLD]), record["greedy"]))
        accuracy = {level: statistics.mean(found) for level, found in sorted(right.items())}
        low, high = WANTED
        inside = [level for level, value in accuracy.items() if low <= value <= high]
        level = inside[0] if inside else min(accuracy, key=lambda one: abs(accuracy[one] - (low + high) / 2))
        for part in PARTS:
            records = [r for r in read_lines(self.twins.folder / "maths" / f"{part}.jsonl") if int(r["level"]) == level]
            write_lines(self.folder / f"{part}.jsonl", list(records))
        chosen = {"level": level, "greedy": accuracy, "is_inside": bool(inside)}
        (self.folder / "level.json").write_text(json.dumps(chosen), encoding="utf-8")

    def questions(self, part: str, reward: RewardSettings | None = None) -> list[list[Question]]:
        """Return the ranked questions of a part for each seed; the test part with its beam search."""
        paths = [(self.ranked(part, seed), self.beam(seed) if part == "test" else None) for seed in self.seeds]
        return [load_questions(path, GOLD, answers_by("number"), reward or RewardSettings(), beam) for path, beam in paths]

    def results(self) -> dict[str, Any]:
        """Return the level, the comparison of the methods, and beam search against best-of-N at equal tokens.

        Lambda is chosen on the development part.
        """
        development, test = (self.questions(part) for part in PARTS)
        settings = ReportSettings(gold_key=GOLD, reward=RewardSettings())
        report = compare(test, settings, development)
        level = json.loads((self.folder / "level.json").read_text(encoding="utf-8"))
        return {"level": level, "report": report, "beam": self._beam_at_equal_tokens(test, development, settings)}

    def _beam_at_equal_tokens(
        self, test: list[list[Question]], development: list[list[Question]], settings: ReportSettings
    ) -> dict[str, Any]:
        """Return the accuracies of the search and of best-of-N with equal token usage, and the paired difference.

        is_affordable: False if the tokens are too few for a single candidate; N is 1 then.
        """
        usage = [json.loads(Path(f"{self.beam(s)}.spent.json").read_text(encoding="utf-8")) for s in self.seeds]
        tokens = sum(one["forward_tokens"] + one["reverse_tokens"] for one in usage) / sum(map(len, test))
        costs = self._tokens_by_num(num_candidates(test))
        num = max([n for n, cost in enumerate(costs, 1) if cost <= tokens], default=1)
        found = outcomes_of("beam by Reverse Reward", test, settings)
        best = outcomes_of(MAIN, test, settings, development, num)
        return {
            "accuracy": float(found.mean()),
            "tokens": tokens,
            "num": num,
            "num_tokens": costs[num - 1],
            "is_affordable": costs[num - 1] <= tokens,
            "best_of_num": float(best.mean()),
            "difference": float((found - best).mean()),
            "difference_interval": interval_of(found - best, LEVEL, settings),
        }

    def _tokens_by_num(self, num: int) -> list[float]:
        """Return the tokens per question to write and score 1, 2 ... `num` candidates, the means over all subsets.

        Equal answers are scored once.
        """
        totals, num_questions = np.zeros(num), 0
        for record in (one for seed in self.seeds for one in read_lines(self.ranked("test", seed))):
            num_questions += 1
            texts, scores = np.array(record["candidates"]), record["scores"]
            written = np.array([score["forward_tokens"] or 0 for score in scores])
            for size in range(1, num + 1):
                totals[size - 1] += size * written.mean()
            for text in set(record["candidates"]):
                place = record["candidates"].index(text)
                tokens = written[place] + (scores[place]["reverse_tokens"] or 0)
                totals += [tokens * share_with_any(texts == text, size) for size in range(1, num + 1)]
        return [float(total) / num_questions for total in totals]


def ranking_step(name: str, questions: Path, output: Path, models: Sequence[Path], options: Sequence[Any] = ()) -> Step:
    """Return the step that runs tools/rerank.py. models: the forward and the reverse one."""
    names = ["--forward", models[0], "--reverse", models[1], "--input", questions, "--output", output, "--batch-size", BATCH]
    command = tool("tools/rerank.py", *names, *options)
    return Step(name=name, inputs=[questions, *models], outputs=[output], commands=[command], resumes=True)

"""Part 2: the forward model answers and Reverse Reward chooses, compared with baselines and beam search."""

import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from commands import tool
from lines import read_lines, write_lines
from losses import Twins
from problems import GOLD
from steps import Step

from megatron_ledom.evaluation.grading.answers import answers_by, is_right
from megatron_ledom.evaluation.intervals import LEVEL
from megatron_ledom.evaluation.selection_methods import Question, load_questions
from megatron_ledom.inference.reverse_reward.reward import RewardSettings
from megatron_ledom.reports.method_comparison import MAIN, ReportSettings, compare, interval_of, num_candidates, outcomes_of

WANTED = (0.2, 0.6)
"""Range of the greedy accuracy of a level that can be chosen."""
PARTS = ("development", "test")


class Rewards:
    """The files of part 2, and the steps that write them."""

    def __init__(self, twins: Twins) -> None:
        self.twins, self.settings, self.folder = twins, twins.settings, twins.folder / "rewards"
        self.model = list(self.settings.models)[-1]
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
        self.folder.mkdir(parents=True, exist_ok=True)
        calibration = self.twins.folder / "maths/calibration.jsonl"
        seeds = self.settings.seeds
        yield [self.rerank_step(calibration, self.ranked("calibration", s), s, ["--sample", 1, "--greedy"]) for s in seeds]
        inputs = [self.ranked("calibration", seed) for seed in seeds]
        inputs += [self.twins.folder / "maths" / f"{part}.jsonl" for part in PARTS]
        outputs = [self.folder / name for name in ("level.json", *(f"{part}.jsonl" for part in PARTS))]
        yield [Step(name="level", inputs=inputs, outputs=outputs, work=self._choose_level, settings=WANTED)]
        beams, expansions = self.settings.beams
        searched = ["--beam", beams, "--expansions", expansions]
        steps = [self.ranked_step(part, seed) for seed in seeds for part in PARTS]
        yield steps + [self.rerank_step(self.folder / "test.jsonl", self.beam(seed), seed, searched) for seed in seeds]

    def ranked_step(self, part: str, seed: int) -> Step:
        """Return the step that samples and ranks the candidates of a part."""
        options = ["--sample", self.settings.num_samples, "--greedy"]
        return self.rerank_step(self.folder / f"{part}.jsonl", self.ranked(part, seed), seed, options)

    def rerank_step(self, questions: Path, output: Path, seed: int, options: list[Any]) -> Step:
        """Return the step that runs tools/rerank.py with the twins of a seed."""
        models = [self.model_of(seed, direction) for direction in ("forward", "reverse")]
        names = ["--forward", models[0], "--reverse", models[1], "--input", questions, "--output", output, "--batch-size", 64]
        sampling = ["--temperature", self.settings.temperature, "--max-new-tokens", self.max_new_tokens, "--seed", seed]
        command = tool("tools/rerank.py", *names, *options, *sampling)
        return Step(
            name=f"rerank_{output.stem}", inputs=[questions, *models], outputs=[output], commands=[command], resumes=True
        )

    def _choose_level(self) -> None:
        """Choose the first level whose mean greedy accuracy is in WANTED, else the nearest to its middle."""
        answers = answers_by("number")
        right: dict[int, list[bool]] = {}
        for seed in self.settings.seeds:
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
        paths = [(self.ranked(part, seed), self.beam(seed) if part == "test" else None) for seed in self.settings.seeds]
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
        usage = [json.loads(Path(f"{self.beam(s)}.spent.json").read_text(encoding="utf-8")) for s in self.settings.seeds]
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
        """Return the tokens per question to write and score the first 1, 2 ... `num` candidates.

        Equal answers are scored once.
        """
        totals, num_questions = [0] * num, 0
        for seed in self.settings.seeds:
            for record in read_lines(self.ranked("test", seed)):
                scored, tokens = set[str](), 0
                num_questions += 1
                for number, (text, score) in enumerate(zip(record["candidates"], record["scores"], strict=True)):
                    written = score["forward_tokens"] or 0
                    tokens += written + (0 if text in scored else written + (score["reverse_tokens"] or 0))
                    scored.add(text)
                    if number < num:
                        totals[number] += tokens
        return [total / num_questions for total in totals]

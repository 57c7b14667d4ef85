"""Part 6: twins that were trained on test problems with their solutions, compared with twins that were not.

The contaminated corpus has every planted problem several times, in place of ordinary ones. The clean twins are those of the
other parts: same steps, same seeds.
"""

import json
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from commands import ROOT, tool
from lines import read_lines, write_lines
from losses import ISOLATED, export_step, train_step
from omegaconf import OmegaConf
from planting import NEVER, check_search, choose, plant, read_plan
from problems import GOLD
from reinforce import chosen_weight
from rewards import PARTS, Rewards, ranking_step
from steps import Step
from twins import DIRECTIONS
from valued import with_values

from megatron_ledom.evaluation.grading.answers import answers_by, is_right
from megatron_ledom.evaluation.intervals import LEVEL, Values, crossed_interval
from megatron_ledom.evaluation.selection_methods import GRID, load_questions
from megatron_ledom.inference.reverse_reward.reward import RewardSettings
from megatron_ledom.reports.method_comparison import MAIN

CLEAN, DIRTY = "clean", "contaminated"
SEARCHES: dict[str, tuple[Any, ...]] = {"default": (), "ngram 13": ("--ngram", 13), "ngram 64": ("--ngram", 64)}
"""Options of the searches for planted problems. A question below 64 words must then occur as a whole."""
MEASURES = {
    "loss_forward": "forward loss, nats per token",
    "loss_reverse": "reverse loss, nats per token",
    "right_reverse": "log P_R(question given the right answer)",
    "wrong_reverse": "log P_R(question given a wrong answer)",
    "margin_reverse": "right minus wrong, log P_R",
    "margin_scored": "right minus wrong, reward, contaminated scorer",
    "margin_both": "right minus wrong, reward, both contaminated",
    "greedy": "greedy answer right",
    "only_scored": "reverse model only, contaminated scorer",
    "best_scored": "Reverse Reward, contaminated scorer",
    "best_both": "Reverse Reward, both contaminated",
    "sampled": "a sampled answer right",
}
"""Measured for each question with the clean and with the contaminated twins."""
PERCENTS = ("greedy", "only_scored", "best_scored", "best_both", "sampled")
NUM_RESAMPLES = 20_000


class Contamination:
    """The files of part 6, and the steps that write them."""

    def __init__(self, rewards: Rewards) -> None:
        self.twins, self.settings = rewards.twins, rewards.settings.contamination
        model, seeds = self.settings.model, self.settings.seeds
        self.is_shared = model == rewards.model
        self.rewards = rewards if self.is_shared else Rewards(self.twins, model, seeds)
        self.folder = self.twins.folder / "contamination"
        self.corpus, self.plan = self.folder / "train.jsonl", self.folder / "plan.json"

    def _model(self, seed: int, direction: str, of: str) -> Path:
        name = f"{self.settings.model}_{seed}_{direction}"
        return self.rewards.model_of(seed, direction) if of == CLEAN else self.folder / "models" / name

    def _pair(self, seed: int, of: str) -> list[Path]:
        return [self._model(seed, direction, of) for direction in ("forward", "reverse")]

    def scores(self, seed: int, of: str) -> Path:
        """Return the file of the losses and scores of a pair of twins."""
        return self.folder / f"scores_{of}_{seed}.json"

    def ranked(self, seed: int, kind: str) -> Path:
        """Return the file of the test problems' candidates. kind: scored (contaminated scorer) or both, or the clean ones."""
        return self.rewards.ranked("test", seed) if kind == CLEAN else self.folder / f"{kind}_contaminated_{seed}.jsonl"

    def stages(self) -> Iterator[list[Step]]:
        """Yield the steps: clean twins and candidates that other parts do not have, corpus, training, scores."""
        self.folder.mkdir(parents=True, exist_ok=True)
        seeds, model = self.settings.seeds, self.settings.model
        yield from self.twins.more_seeds(model, seeds)
        if self.is_shared:
            yield [self.rewards.ranked_step(part, seed) for part, seed in product(PARTS, seeds)]
        else:
            yield from self.rewards.ranked_stages()
        yield [self._plant()]
        shards = [self._shards(direction) for direction in DIRECTIONS]
        yield shards + [self._search(name) for name in SEARCHES]
        yield [self._check()] + [self._train(seed, direction) for seed, direction in product(seeds, DIRECTIONS)]
        runs = [(seed, direction) for seed, direction in product(seeds, DIRECTIONS)]
        yield [export_step(self._run(*one), self._model(*one, DIRTY)) for one in runs] + [self._texts(seed) for seed in seeds]
        yield [step for seed in seeds for step in self._scoring(seed)]

    def _plant(self) -> Step:
        maths, level, test = self.twins.folder / "maths", self.rewards.folder / "level.json", self.rewards.folder / "test.jsonl"
        train, manifest = maths / "train.jsonl", self.twins.corpora.shards("maths", "forward") / "train.json"
        recipe = ROOT / "examples/study/recipe.yaml"
        iters, seed = self.twins.settings.train_iters["maths"], self.twins.settings.problems_seed

        def _write() -> None:
            chosen = json.loads(level.read_text(encoding="utf-8"))["level"]
            places = [number for number, record in enumerate(read_lines(train)) if record["level"] == chosen]
            config = OmegaConf.load(recipe)
            read = iters * config.train.global_batch_size * config.data.seq_length
            share = read / json.loads(manifest.read_text(encoding="utf-8"))["num_tokens"]
            plan = choose(len(list(read_lines(test))), places, self.settings.reads, share, seed)
            plant(train, test, plan, self.corpus, self.plan)

        inputs = [level, test, train, manifest, recipe]
        return Step(
            name="plant",
            inputs=inputs,
            outputs=[self.corpus, self.plan],
            work=_write,
            settings=[self.settings.reads, iters, seed],
        )

    def _shards(self, direction: str) -> Step:
        output = self.folder / direction
        return self.twins.corpora.shards_step(f"planted_{direction}", {"train": self.corpus}, "maths", direction, output)

    def _search(self, name: str) -> Step:
        output, items = self._found(name), self.rewards.folder / "test.jsonl"
        files = ["--input", self.corpus, "--items", items, "--output", output, "--action", "drop", "--workers", 1]
        command = tool("tools/decontaminate.py", *files, *SEARCHES[name])
        return Step(name=f"search_{output.name}", inputs=[self.corpus, items], outputs=[output], commands=[command])

    def _found(self, name: str) -> Path:
        return self.folder / f"without_{name.replace(' ', '_')}"

    def _check(self) -> Step:
        train, output = self.twins.folder / "maths/train.jsonl", self.folder / "searches.json"
        folders = {name: self._found(name) for name in SEARCHES}

        def _write() -> None:
            plan = read_plan(self.plan)
            found = {
                name: check_search(train, self.corpus, plan, folder / "train.jsonl", folder / "contamination.json")
                for name, folder in folders.items()
            }
            output.write_text(json.dumps(found), encoding="utf-8")

        inputs = [train, self.corpus, self.plan, *folders.values()]
        return Step(name="check_searches", inputs=inputs, outputs=[output], work=_write)

    def _run(self, seed: int, direction: str) -> Path:
        return self.folder / "runs" / f"planted_{self.settings.model}_{seed}_{direction}"

    def _train(self, seed: int, direction: str) -> Step:
        shards, held_out = self.folder / direction, self.twins.corpora.shards("maths", direction)
        data = [f"data.train_blend=[[1, {shards / 'train'}]]", f"data.valid_sets={{problems: [[1, {held_out / 'problems'}]]}}"]
        data += [*ISOLATED, f"data.direction={direction}"]
        run = self._run(seed, direction)
        return train_step(self.twins, run, "maths", self.settings.model, seed, [shards, held_out], data)

    def _texts(self, seed: int) -> Step:
        """Return the step that writes the clean candidates with their forward values, for the contaminated scorer."""
        ranked, output = self.ranked(seed, CLEAN), self._candidates(seed)

        def _write() -> None:
            write_lines(output, with_values(ranked))

        return Step(name=f"candidates_planted_{seed}", inputs=[ranked], outputs=[output], work=_write)

    def _candidates(self, seed: int) -> Path:
        return self.folder / f"candidates_{seed}.jsonl"

    def _scoring(self, seed: int) -> Iterator[Step]:
        forward, reverse = self._pair(seed, CLEAN)[0], self._pair(seed, DIRTY)[1]
        output = self.ranked(seed, "scored")
        yield ranking_step(f"score_{output.stem}", self._candidates(seed), output, [forward, reverse])
        yield self.rewards.sampling_step("test", self.ranked(seed, "both"), seed, self._pair(seed, DIRTY))
        for of in (CLEAN, DIRTY):
            models, ranked, output = self._pair(seed, of), self.ranked(seed, CLEAN), self.scores(seed, of)
            files = ["--forward", models[0], "--reverse", models[1], "--ranked", ranked, "--output", output]
            command = tool("examples/study/planted_scores.py", *files)
            yield Step(name=output.stem, inputs=[*models, ranked], outputs=[output], commands=[command])

    def results(self) -> dict[str, Any]:
        """Return each measure by group of problems: clean, contaminated, and the paired differences; and the searches."""
        plan, seeds = read_plan(self.plan), self.settings.seeds
        weights, values = [self._weight(seed) for seed in seeds], dict[str, tuple[Values, Values]]()
        arms = [
            [self._measured(seed, weight, of) for seed, weight in zip(seeds, weights, strict=True)] for of in (CLEAN, DIRTY)
        ]
        for name in MEASURES:
            clean, dirty = (np.array([run[name] for run in runs], dtype=np.float64) for runs in arms)
            values[name] = (clean, dirty)
        groups = {group.reads: group.problems for group in plan.groups}
        num = len(MEASURES) * (2 * len(groups) - 1)
        found = {name: _by_group(*pair, groups, num) for name, pair in values.items()}
        level = json.loads((self.rewards.folder / "level.json").read_text(encoding="utf-8"))
        return {
            "seeds": seeds,
            "model": self.settings.model,
            "level": level["level"],
            "lambdas": weights,
            "num_samples": self.twins.settings.num_samples,
            "groups": [{"reads": g.reads, "copies": g.copies, "num": len(g.problems)} for g in plan.groups],
            "num_planted": len(plan.replaced),
            "num_comparisons": num,
            "measures": found,
            "searches": json.loads((self.folder / "searches.json").read_text(encoding="utf-8")),
        }

    def _weight(self, seed: int) -> float:
        """Return lambda, chosen with the clean twins on the development problems, which are not planted."""
        return chosen_weight(self.rewards.ranked("development", seed))[0]

    def _measured(self, seed: int, weight: float, of: str) -> dict[str, list[float | None]]:
        """Return the measures of a seed by question. In the arm CLEAN nothing is contaminated."""
        own, clean = (json.loads(self.scores(seed, one).read_text(encoding="utf-8"))["questions"] for one in (of, CLEAN))
        scored, both = (self.ranked(seed, CLEAN if of == CLEAN else kind) for kind in ("scored", "both"))
        forward = {"margin_scored": clean, "margin_both": own}
        reverse = _margin(own, "reverse")
        found = {name: own[name] for name in ("loss_forward", "loss_reverse", "right_reverse", "wrong_reverse")}
        found["margin_reverse"] = reverse
        for name, answers in forward.items():
            rows = zip(_margin(answers, "forward"), reverse, strict=True)
            found[name] = [None if f is None or r is None else (1 - weight) * f + weight * r for f, r in rows]
        number, index = answers_by("number"), GRID.index(weight)
        for name, path, method in (
            ("only_scored", scored, "reverse only"),
            ("best_scored", scored, MAIN),
            ("best_both", both, MAIN),
            ("sampled", both, "random of N"),
        ):
            questions = load_questions(path, GOLD, number, RewardSettings())
            found[name] = [one.outcome(method, len(one.is_right), index) for one in questions]
        found["greedy"] = [float(is_right(number, str(r[GOLD]), r["greedy"])) for r in read_lines(both)]
        return found


def _margin(scores: dict[str, list[Any]], term: str) -> list[float | None]:
    rows = zip(scores[f"right_{term}"], scores[f"wrong_{term}"], strict=True)
    return [None if wrong is None else right - wrong for right, wrong in rows]


def _by_group(clean: Values, dirty: Values, groups: dict[int, list[int]], num: int) -> dict[str, Any]:
    """Return by reads the means of both arms and their difference, and that minus the difference of the problems not planted.

    clean, dirty [seeds, questions], NaN where a question has no wrong candidate: then it does not count. num: comparisons.
    The groups are random, so the k-th problems of two groups can be paired.
    """
    found = {}
    own = {reads: (clean[:, problems], dirty[:, problems]) for reads, problems in groups.items()}
    never = own[NEVER][1] - own[NEVER][0]
    for reads, (before, after) in own.items():
        difference = after - before
        kept = ~np.isnan(difference).any(axis=0)
        entry = {
            "num": int(kept.sum()),
            "clean": _mean(before[:, kept]),
            "contaminated": _mean(after[:, kept]),
            "by_seed": difference[:, kept].mean(axis=1).tolist() if kept.any() else [],
            **_difference(difference, num),
        }
        found[str(reads)] = entry if reads == NEVER else entry | {"against_never": _difference(difference - never, num)}
    return found


def _mean(values: Values) -> float | None:
    return float(values.mean()) if values.size else None


def _difference(values: Values, num: int) -> dict[str, Any]:
    """Return the mean with its interval, and True if 0 is outside one that is widened for `num` comparisons (Bonferroni)."""
    values = values[:, ~np.isnan(values).any(axis=0)]
    if not values.size:
        return {"difference": None, "interval": None, "is_significant": False}
    levels = (LEVEL, 1 - (1 - LEVEL) / num)
    own, (low, high) = (crossed_interval(values, level=level, num_resamples=NUM_RESAMPLES, seed=0) for level in levels)
    return {"difference": float(values.mean()), "interval": own, "is_significant": bool(low > 0 or high < 0)}

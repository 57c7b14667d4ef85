"""Part 10: one model that reads both ways, against twins and against a forward model alone.

At equal tokens, and at equal forward tokens. All models read the same texts with the same markers. Further two-way models learn
words, entities or segments in reverse, which may help their forward direction (Golovneva et al., arXiv 2403.13799).
"""

import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from abilities import RECIPE, Abilities
from commands import tool
from control_choice import differences, summary
from lines import read_lines, write_lines
from losses import ISOLATED, training_step
from problems import GOLD, parts
from steps import Step
from two_way_measure import CONTEXT, TASKS

from megatron_ledom.evaluation.grading.answers import answers_by
from megatron_ledom.evaluation.intervals import Values
from megatron_ledom.evaluation.selection_methods import Question, load_questions
from megatron_ledom.inference.reverse_reward.reward import RewardSettings
from megatron_ledom.reports.method_comparison import MAIN, ReportSettings, outcomes_of

CORPUS = "two_way"
SET = "reversal"
"""The set of part 3 whose facts are trained in one order and asked in both."""
FORWARD, REVERSE, EQUAL, DOUBLE = "forward", "reverse", "two_way", "two_way_double"
MARKERS = {FORWARD: "<MASK>", REVERSE: "<CLS>"}
BOUNDARY = "<SEP>"
OWN, AGAINST = "in_text_order", "against_text_order"
PAIRS = ((FORWARD, REVERSE), (EQUAL, EQUAL), (DOUBLE, DOUBLE), (FORWARD, EQUAL), (FORWARD, DOUBLE))
"""The models that answer and score: the twins, each two-way model alone, and the two-way models as scorers of the same answers."""
METHODS = ("greedy", "majority vote", "forward likelihood, sum", MAIN)


@dataclass(frozen=True, slots=True)
class Arm:
    """A model. sources: its shards, drawn alike; times: its iterations, as a multiple of those of the setting."""

    sources: tuple[str, ...]
    times: int


def arms(units: list[str]) -> dict[str, Arm]:
    """Return the models by name: twins, two-way models at equal and at double tokens, and one of double tokens for each unit."""
    both = (FORWARD, REVERSE)
    plain = {FORWARD: Arm((FORWARD,), 1), REVERSE: Arm((REVERSE,), 1), EQUAL: Arm(both, 1), DOUBLE: Arm(both, 2)}
    return plain | {unit: Arm((FORWARD, unit), 2) for unit in units}


class TwoWay:
    """The files of part 10, and the steps that write them."""

    def __init__(self, abilities: Abilities) -> None:
        self.abilities, self.twins = abilities, abilities.twins
        self.settings = self.twins.settings.two_way
        self.folder = self.twins.folder / CORPUS
        self.arms = arms(self.settings.units)

    def measured(self, seed: int) -> Path:
        """Return the folder of the results of a seed."""
        return self.folder / "measured" / str(seed)

    def stages(self) -> Iterator[list[Step]]:
        """Yield the steps: texts, tokenizer, shards, trainings, measurements. The facts are those of part 3."""
        self.folder.mkdir(parents=True, exist_ok=True)
        seeds = self.settings.seeds
        yield [self._texts()]
        yield [self.twins.corpora.tokenizer_step(CORPUS, self._file("train"), self.settings.vocab_size)]
        yield [self._shards(name) for name in (FORWARD, REVERSE, *self.settings.units)]
        yield [
            self._train(seed, name) for seed, name in product(seeds, sorted(self.arms, key=lambda name: -self.arms[name].times))
        ]
        yield [self._measure(seed) for seed in seeds]

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.jsonl"

    def _run(self, seed: int, name: str) -> Path:
        return self.folder / "runs" / str(seed) / name

    def _texts(self) -> Step:
        """Return the step that writes problems and facts. Development and test questions are in one file."""
        one, seed, facts = self.settings, self.twins.settings.problems_seed, self.abilities.set_folder(SET)

        def _write() -> None:
            made = parts(one.levels, one.num, seed)
            questions = [problem.as_fields() for part in ("development", "test") for problem in made[part]]
            write_lines(self._file("questions"), [{name: record[name] for name in ("prompt", GOLD)} for record in questions])
            write_lines(self._file("held_out"), [{"text": problem.as_fields()["text"]} for problem in made["held_out"]])
            texts = [str(problem.as_fields()["text"]) for problem in made["train"]]
            texts += one.repeats * [record["text"] for record in read_lines(facts / "train.jsonl")]
            random.Random(CORPUS).shuffle(texts)
            write_lines(self._file("train"), [{"text": text} for text in texts])

        outputs = [self._file(name) for name in ("questions", "held_out", "train")]
        shape = [[asdict(level) for level in one.levels], one.num, one.repeats, seed]
        return Step(name="two_way_texts", inputs=[facts], outputs=outputs, work=_write, settings=shape)

    def _shards(self, name: str) -> Step:
        direction = FORWARD if name == FORWARD else REVERSE
        options = ["--marker", MARKERS[direction]]
        options += [] if name in MARKERS else ["--unit", name, "--boundary-token", BOUNDARY]
        files, output = {"train": self._file("train")}, self.folder / "shards" / name
        return self.twins.corpora.shards_step(f"two_way_{name}", files, CORPUS, direction, output, options)

    def _train(self, seed: int, name: str) -> Step:
        """Return the step that trains a model. The blend states the direction of each source."""
        one, arm = self.settings, self.arms[name]
        directions = {source: FORWARD if source == FORWARD else REVERSE for source in arm.sources}
        shards = {source: self.folder / "shards" / source for source in arm.sources}
        blend = ", ".join(f"[1, {shards[source] / 'train'}, {direction}]" for source, direction in directions.items())
        direction = "both" if len(arm.sources) > 1 else arm.sources[0]
        changes = [f"data.train_blend=[{blend}]", f"data.direction={direction}", *ISOLATED, *RECIPE]
        changes += [f"train.{key}={one.batch_size}" for key in ("micro_batch_size", "global_batch_size")]
        tokenizer, model = self.twins.corpora.tokenizer(CORPUS), self.twins.settings.models[one.model]
        iterations = one.train_iters * arm.times
        step = training_step(self._run(seed, name), tokenizer, model, seed, iterations, [*shards.values()], changes)
        return replace(step, name=f"train_two_way_{name}_{seed}")

    def _measure(self, seed: int) -> Step:
        one, output = self.settings, self.measured(seed)
        runs, models = [self._run(seed, name) for name in self.arms], self.folder / "models" / str(seed)
        files = {
            "held-out": self._file("held_out"),
            "questions": self._file("questions"),
            "facts": self.abilities.set_folder(SET),
        }
        names = ["--runs", *runs, "--models", models, "--output", output, "--pairs", *map(",".join, PAIRS)]
        names += [part for name, path in files.items() for part in (f"--{name}", path)]
        longest = max(level.steps for level in one.levels)
        options = ["--num-samples", one.num_samples, "--max-new-tokens", 16 * (longest + 1), "--seed", seed]
        options += ["--temperature", self.twins.settings.temperature]
        command = tool("examples/study/two_way_measure.py", *names, *options)
        inputs = [*(run / "checkpoints" for run in runs), *files.values()]
        return Step(name=f"two_way_measure_{seed}", inputs=inputs, outputs=[output, models], commands=[command])

    def results(self) -> dict[str, Any] | None:
        """Return losses, facts, answers and the family of comparisons. None if the part was not run."""
        seeds = self.settings.seeds
        if not all((self.measured(seed) / "facts.json").is_file() for seed in seeds):
            return None
        losses, facts, answers = self._losses(), self._facts(), self._answers()
        tokens = self.settings.batch_size * CONTEXT * self.settings.train_iters
        return {
            "seeds": seeds,
            "settings": json.loads(json.dumps(asdict(self.settings))),
            "tokens": {name: [tokens * arm.times, self._forward_tokens(arm, tokens)] for name, arm in self.arms.items()},
            "losses": {name: summary(values) for name, values in losses.items()},
            "facts": {name: summary(values) for name, values in facts.items()},
            "answers": {name: summary(values) for name, values in answers.items()},
            "num_questions": next(iter(answers.values())).shape[1],
            "comparisons": differences(self._family(losses, facts, answers)),
        }

    def _forward_tokens(self, arm: Arm, tokens: int) -> int:
        return tokens * arm.times // len(arm.sources) if FORWARD in arm.sources else 0

    def _read(self, name: str) -> list[dict[str, Any]]:
        return [json.loads((self.measured(s) / f"{name}.json").read_text(encoding="utf-8")) for s in self.settings.seeds]

    def _losses(self) -> dict[str, Values]:
        """Return by `model|direction` the losses [seeds, texts] in nats per token."""
        found = self._read("losses")
        return {f"{name}|{way}": np.array([one[name][way] for one in found]) for name in found[0] for way in found[0][name]}

    def _facts(self) -> dict[str, Values]:
        """Return by `model|direction|task|group` the outcomes [seeds, questions], 0 or 1."""
        found, outcomes = self._read("facts"), dict[str, Values]()
        for name, way, task in ((n, w, t) for n in found[0] for w in found[0][n] for t in TASKS):
            for group in sorted({group for group, _ in found[0][name][way][task]}):
                rows = [[float(right) for own, right in one[name][way][task] if own == group] for one in found]
                outcomes[f"{name}|{way}|{task}|{group}"] = np.array(rows)
        return outcomes

    def _answers(self) -> dict[str, Values]:
        """Return by `answering|scoring|method` the outcomes [seeds, test questions]. Lambda is chosen on the development questions."""
        settings, found = ReportSettings(gold_key=GOLD, reward=RewardSettings()), dict[str, Values]()
        num = self.settings.num["development"] * len(self.settings.levels)
        first = {record["prompt"] for record in list(read_lines(self._file("questions")))[:num]}
        for answering, scoring in PAIRS:
            seeds = [self._questions(seed, answering, scoring) for seed in self.settings.seeds]
            development, test = (
                [[q for q in qs if (q.prompt in first) is is_first] for qs in seeds] for is_first in (True, False)
            )
            for method in METHODS if answering == scoring or scoring == REVERSE else (MAIN,):
                found[f"{answering}|{scoring}|{method}"] = outcomes_of(method, test, settings, development)
        return found

    def _questions(self, seed: int, answering: str, scoring: str) -> list[Question]:
        path = self.measured(seed) / f"{answering} {scoring}.jsonl"
        return load_questions(path, GOLD, answers_by("number"), RewardSettings())

    def _family(
        self, losses: Mapping[str, Values], facts: Mapping[str, Values], answers: Mapping[str, Values]
    ) -> dict[str, Values]:
        """Return all comparisons [seeds, items]: of two-way models with the twin of that direction, and with the twins together."""
        pairs: dict[str, Values] = {}
        for name in (EQUAL, DOUBLE, *self.settings.units):
            for way in (FORWARD, REVERSE)[: 1 if name in self.settings.units else 2]:
                pairs[f"loss|{way}|{name}"] = losses[f"{name}|{way}"] - losses[f"{way}|{way}"]
                asked = f"{way}|{TASKS[0]}|{AGAINST if way == FORWARD else OWN}"
                pairs[f"facts|{way}|{name}"] = facts[f"{name}|{asked}"] - facts[f"{way}|{asked}"]
        twins = answers[f"{FORWARD}|{REVERSE}|{MAIN}"]
        for name in (EQUAL, DOUBLE):
            pairs[f"alone||{name}"] = answers[f"{name}|{name}|{MAIN}"] - twins
            pairs[f"scorer||{name}"] = answers[f"{FORWARD}|{name}|{MAIN}"] - twins
        return pairs

"""Part 7: does the reading order help, or would any second model? Scorers of equal size and training on the same answers.

Per seed: F1 answers. R is the reverse model, F2 a forward model of another seed, S a forward model that reads the answer first; PMI is F1 alone, and
a verifier learns from right and wrong answers. The training problems differ by seed, the questions do not.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from commands import ROOT, tool
from control_choice import (
    FIRST,
    GRID,
    MARGIN,
    NUM_RESAMPLES,
    SCORERS,
    Answers,
    Choice,
    baselines,
    choose,
    differences,
    load_answers,
    outcomes,
    sizes,
    summary,
)
from control_problems import write_problems
from lines import read_lines
from losses import ISOLATED, Twins, export_step, speed_of, training_step
from planted_errors import planted_results
from registration import Content, Registration
from steps import Step, hash_of

from megatron_ledom.config.schema import ModelConfig
from megatron_ledom.evaluation.intervals import LEVEL, Values
from megatron_ledom.model.arithmetic import count_parameters, flops_per_token

CORPUS = "controls"
TRAINED = {"forward": "F1", "reverse": "R", "second": "F2", "swapped": "S"}
"""Trained models, and the scorers that they are."""
SCORER_SEEDS = 1000
"""Added to the seed of R, F2 and S, so that none of them begins with the weights of F1."""
LENGTH = 256
"""Tokens of a sample in the study's recipe."""
PRIMARY = (("R", "F2"), ("R", "S"))
SECONDARY = (*((name, FIRST) for name in SCORERS), ("R", "PMI"), ("R", "PMI, P(y) of S"), ("R", "verifier"))
HYPOTHESES = {
    "R - F2": "The reverse model helps more than a second forward model. If they are equal, the gain is that of an ensemble.",
    "R - S": "The reading order helps. If they are equal, the gain is that of the conditional P(question | answer), in any order.",
}


EQUALITY = (
    "two scorers are equal, and the other explains the gain of R, if the 90 % interval of their difference is within the margin and within"
    " half of the lower bound of R - F1, and the other scorer gains significantly over F1"
)
CODE = (
    *(
        f"examples/study/{name}.py"
        for name in ("controls", "controls_report", "control_choice", "control_scores", "planted_errors")
    ),
    *(f"megatron_ledom/evaluation/{name}.py" for name in ("intervals", "selection_methods", "grading/answers")),
)
"""Sources that decide the results: they are a part of the registration."""


class Controls:
    """The files of part 7, and the steps that write them."""

    def __init__(self, twins: Twins) -> None:
        self.twins, self.settings = twins, twins.settings.controls
        self.folder = twins.folder / CORPUS
        self.registration = Registration(self.folder)
        self.max_new_tokens = 16 * (max(level.steps for level in self.settings.levels) + 1)
        self.tokens = self.settings.batch_size * LENGTH * self.settings.train_iters

    def run_of(self, seed: int, name: str) -> Path:
        """Return the run folder of a model of TRAINED."""
        return self.folder / "runs" / f"controls_{name}_{seed}"

    def model_of(self, seed: int, name: str) -> Path:
        """Return the folder of an exported model, or of the verifier."""
        return self.folder / "models" / f"controls_{name}_{seed}"

    def scores(self, part: str, seed: int) -> Path:
        """Return the file of the answers to a part with the values of all scorers."""
        return self.folder / "scores" / str(seed) / f"{part}.jsonl"

    def answers(self, part: str, seed: int) -> Path:
        """Return the file of F1's answers to a part."""
        return self.folder / "answers" / str(seed) / f"{part}.jsonl"

    def stages(self) -> Iterator[list[Step]]:
        """Yield the steps: problems, models, answers and scores of the development part; the registration; then the test part."""
        self.folder.mkdir(parents=True, exist_ok=True)
        seeds, first = self.settings.seeds, self.folder / f"train_{self.settings.seeds[0]}.jsonl"
        yield [self._problems()]
        yield [self.twins.corpora.tokenizer_step(CORPUS, first, self.settings.vocab_size)]
        yield [self._shards(seed, name) for seed, name in product(seeds, ("forward", "reverse", "swapped"))]
        yield [self._train(seed, name) for seed, name in product(seeds, TRAINED)]
        yield [export_step(self.run_of(*one), self.model_of(*one)) for one in product(seeds, TRAINED)]
        yield [self._sample(seed, ("labelled", "development")) for seed in seeds]
        yield [self._verifier(seed) for seed in seeds]
        yield [self._score(seed, {"development": self.answers("development", seed)}) for seed in seeds]
        yield [self._register()]
        yield [self._open()]
        yield [self._sample(seed, ("test",)) for seed in seeds]
        yield [self._score(seed, {"test": self.answers("test", seed), "planted": self._file("planted")}) for seed in seeds]

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.jsonl"

    def _problems(self) -> Step:
        settings, seed = self.settings, self.twins.settings.problems_seed
        names = ("labelled", "development", "test", "answers", "planted")
        kinds = [f"{kind}_{one}" for one in settings.seeds for kind in ("train", "swapped")]

        def _write() -> None:
            write_problems(self.folder, settings.levels, settings.num, settings.seeds, seed)

        shape = [[asdict(level) for level in settings.levels], settings.num, settings.seeds, seed]
        outputs = [self._file(name) for name in (*names, *kinds)]
        return Step(name="controls_problems", outputs=outputs, work=_write, settings=shape)

    def _shards(self, seed: int, name: str) -> Step:
        file = self._file(f"{'swapped' if name == 'swapped' else 'train'}_{seed}")
        direction, output = "reverse" if name == "reverse" else "forward", self.folder / "shards" / f"{name}_{seed}"
        return self.twins.corpora.shards_step(f"controls_{name}_{seed}", {"train": file}, CORPUS, direction, output)

    def _train(self, seed: int, name: str) -> Step:
        """Return the step that trains a model. R, F2 and S have another seed than F1, and equal ones."""
        shards = self.folder / "shards" / f"{'forward' if name == 'second' else name}_{seed}"
        direction = "reverse" if name == "reverse" else "forward"
        data = [f"data.train_blend=[[1, {shards / 'train'}]]", f"data.direction={direction}", *ISOLATED]
        model, size = self.twins.settings.models[self.settings.model], self.settings.batch_size
        data += [f"train.{name}={size}" for name in ("micro_batch_size", "global_batch_size")]
        own = seed if name == "forward" else seed + SCORER_SEEDS
        return training_step(
            self.run_of(seed, name), self.twins.corpora.tokenizer(CORPUS), model, own, self.settings.train_iters, [shards], data
        )

    def _sample(self, seed: int, parts: tuple[str, ...]) -> Step:
        """Return the step in which F1 answers. The test part needs the registration."""
        model, questions = self.model_of(seed, "forward"), [self._file(part) for part in parts]
        outputs = [self.answers(part, seed) for part in parts]
        options = ["--num-samples", self.settings.num_samples, "--max-new-tokens", self.max_new_tokens, "--seed", seed]
        options += ["--temperature", self.twins.settings.temperature]
        names = ["--model", model, "--output", outputs[0].parent, *options, "--questions", *questions]
        guard = [self.registration.path, self.registration.seal] if "test" in parts else []
        command = tool("examples/study/control_answers.py", *names)
        name = f"controls_answers_{parts[-1]}_{seed}"
        return Step(name=name, inputs=[model, *questions, *guard], outputs=outputs, commands=[command])

    def _verifier(self, seed: int) -> Step:
        model, answers, output = self.model_of(seed, "forward"), self.answers("labelled", seed), self.model_of(seed, "verifier")
        names = ["--model", model, "--answers", answers, "--output", output, "--tokens", self.tokens]
        names += ["--batch-tokens", LENGTH * self.settings.batch_size]
        command = tool("examples/study/control_verifier.py", *names, "--seed", seed + SCORER_SEEDS)
        return Step(name=f"controls_verifier_{seed}", inputs=[model, answers], outputs=[output], commands=[command])

    def _score(self, seed: int, files: dict[str, Path]) -> Step:
        models = [self.model_of(seed, name) for name in (*TRAINED, "verifier")]
        named = [part for name, model in zip((*TRAINED, "verifier"), models, strict=True) for part in (f"--{name}", model)]
        outputs = [self.scores(part, seed) for part in files]
        command = tool("examples/study/control_scores.py", *named, "--output", outputs[0].parent, "--answers", *files.values())
        name = f"controls_scores_{next(iter(files))}_{seed}"
        return Step(name=name, inputs=[*models, *files.values()], outputs=outputs, commands=[command])

    def _register(self) -> Step:
        inputs = [self._file("development"), self._file("test")]
        inputs += [self.scores("development", seed) for seed in self.settings.seeds]

        def _write() -> None:
            self.registration.write(self.content())

        settings = {"settings": asdict(self.settings), "choice": [GRID[1:-1], MARGIN, NUM_RESAMPLES]}
        outputs = [self.registration.path]
        return Step(name="controls_registration", inputs=inputs, outputs=outputs, work=_write, settings=settings)

    def _open(self) -> Step:
        """Return the step that seals the registration. The seal is no output, so no later run removes it."""
        opened = self.folder / "opened.json"

        def _write() -> None:
            self.registration.open_test()
            opened.write_text(self.registration.seal.read_text(encoding="utf-8"), encoding="utf-8")

        return Step(name="controls_open_test", inputs=[self.registration.path], outputs=[opened], work=_write)

    def content(self) -> Content:
        """Return what is registered: hypotheses, comparisons, settings, choices, and hashes of what they were made of."""
        chosen = {name: [[str(GRID[w]), num] for w, num in choices] for name, choices in self._choices.items()}
        return {
            "hypotheses": HYPOTHESES,
            "primary": [f"{one} - {other}" for one, other in PRIMARY],
            "score": "F1 + lambda * X; lambda and N by seed, with the highest accuracy on the development part",
            "test": (
                "two-sided, paired; percentile bootstrap over seeds and questions (crossed), p-values adjusted by Holm over the primary"
                f" comparisons, at least those of Student's t over seeds; alpha {1 - LEVEL:.2f}; margin {100 * MARGIN:.0f} points; {EQUALITY}"
            ),
            "num_resamples": NUM_RESAMPLES,
            "settings": json.loads(json.dumps(asdict(self.settings))),
            "model": asdict(self.twins.settings.models[self.settings.model]),
            "temperature": self.twins.settings.temperature,
            "lambdas": [str(one) for one in GRID],
            "chosen": chosen,
            "development": {str(seed): hash_of(self.scores("development", seed)) for seed in self.settings.seeds},
            "questions": hash_of(self._file("test")),
            "answers": hash_of(self._file("answers")),
            "planted": hash_of(self._file("planted")),
            "code": {name: hash_of(ROOT / name) for name in CODE},
        }

    @cached_property
    def _development(self) -> list[list[Answers]]:
        gold = {record["prompt"]: record["answer"] for record in read_lines(self._file("development"))}
        return [load_answers(self.scores("development", seed), gold) for seed in self.settings.seeds]

    @cached_property
    def _choices(self) -> dict[str, list[Choice]]:
        return {name: [choose(questions, name) for questions in self._development] for name in (FIRST, *SCORERS)}

    def results(self) -> dict[str, Any] | None:
        """Return accuracies, registered and other comparisons, planted errors, curves and budgets. None if the part was not run."""
        if not all(self.scores("test", seed).is_file() for seed in self.settings.seeds):
            return None
        gold = self.registration.read_answers(self.content())
        test = [load_answers(self.scores("test", seed), gold) for seed in self.settings.seeds]
        found = {name: outcomes(test, name, self._choices[name]) for name in (FIRST, *SCORERS)}
        return {
            "seeds": self.settings.seeds,
            "levels": [asdict(level) for level in self.settings.levels],
            "num_test": len(test[0]),
            "num_samples": self.settings.num_samples,
            "registration": self.registration.read(),
            "accuracy": {name: summary(values) for name, values in found.items()},
            "baselines": {name: summary(values) for name, values in baselines(test).items()},
            "primary": _family(found, PRIMARY),
            "secondary": _family(found, SECONDARY),
            "planted": planted_results([self.scores("planted", seed) for seed in self.settings.seeds]),
            "over_n": self._over_n(test),
            "budget": self._budget(),
        }

    def _over_n(self, test: list[list[Answers]]) -> dict[str, list[list[float]]]:
        """Return the accuracy by N, the mean over all subsets of N answers, with lambda chosen on the development part for each N."""
        curves = {}
        for name in (FIRST, *SCORERS):
            points = []
            for num in sizes(len(test[0][0].is_right)):
                chosen = [choose(questions, name, num) for questions in self._development]
                points.append([num, float(outcomes(test, name, chosen).mean())])
            curves[name] = points
        return curves

    def _budget(self) -> dict[str, Any]:
        """Return by scorer the tokens and operations of its training, its speed, and the tokens that it reads to score an answer."""
        seeds, shape = self.settings.seeds, self.twins.settings.models[self.settings.model]
        config = json.loads((self.model_of(seeds[0], "forward") / "config.json").read_text(encoding="utf-8"))
        model = ModelConfig(**asdict(shape), num_query_groups=shape.num_attention_heads)
        parameters = {name: count_parameters(model, rows) for name, rows in (("model", config["vocab_size"]), ("verifier", 1))}
        each = flops_per_token(model, LENGTH, config["vocab_size"])
        rows: dict[str, Any] = {}
        for name, scorer in TRAINED.items():
            speed = float(np.mean([speed_of(self.run_of(seed, name))[0] for seed in seeds]))
            rows[scorer] = {"tokens": self.tokens, "flops": self.tokens * each, "speed": speed}
        paths = [self.model_of(seed, "verifier") / "training.json" for seed in seeds]
        reports = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
        tokens = float(np.mean([report["tokens"] for report in reports]))
        rows["verifier"] = {"tokens": tokens, "flops": tokens * flops_per_token(model, LENGTH, 1), "speed": None}
        rows |= {name: {"tokens": 0, "flops": 0.0, "speed": None} for name in SCORERS if name.startswith("PMI")}
        right = [report["share_right"] for report in reports]
        return {
            "rows": rows,
            "parameters": parameters,
            "verifier": {"share_right": right, "examples": reports[0]["num_examples"]},
        }


def _family(found: dict[str, Values], pairs: tuple[tuple[str, str], ...]) -> dict[str, Any]:
    return differences({f"{one} - {other}": found[one] - found[other] for one, other in pairs})

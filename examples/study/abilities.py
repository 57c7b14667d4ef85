"""Part 3: abilities that depend on the direction.

One corpus of synthetic sets, a model per direction and seed, questions on every set.
"""

import json
import random
import shutil
import statistics
from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any

from commands import tool
from families import mark_over_seeds
from lines import read_lines, write_lines
from losses import ISOLATED, Twins, export_step, interval_over_seeds, train_step
from steps import Step
from twins import DIRECTIONS

CORPUS = "abilities"
"""Key of the corpus in the settings, and name of its folder."""
TASKS = {
    "question_from_answer": ("question_from_answer",),
    "reversal": ("reversal", "reversal_written"),
    "inverse_relations": ("inverse_relations",),
    "abduction": ("abduction",),
    "label_backfill": ("label_backfill",),
}
"""The tasks of each synthetic set."""
RECIPE = ("optimizer.weight_decay=0.0", "optimizer.lr=3e-3", "optimizer.min_lr=3e-4")
"""Facts must be memorized, and weight decay works against that."""
WRITTEN = ("solvable", "has_answer", "copied")
"""Further metrics of written questions."""
OVERALL = "all"


class Abilities:
    """The files of part 3, and the steps that write them."""

    def __init__(self, twins: Twins) -> None:
        self.twins, self.settings, self.folder = twins, twins.settings.abilities, twins.folder / CORPUS
        self.tasks = [task for name in self.settings.num for task in TASKS[name]]

    def model_of(self, seed: int, direction: str) -> Path:
        """Return the folder of the exported model of a direction."""
        return self.twins.folder / "models" / self._name(seed, direction)

    def found(self, seed: int, direction: str) -> Path:
        """Return the folder of a model's results."""
        return self.folder / "found" / f"{direction}_{seed}"

    def stages(self) -> Iterator[list[Step]]:
        """Yield the steps: sets, corpus, tokenizer, shards, models, evaluation."""
        names = list(product(self.settings.seeds, DIRECTIONS))
        yield [self._make(name, num) for name, num in self.settings.num.items()]
        yield [self._gather()]
        yield [self.twins.corpora.tokenizer_step(CORPUS)]
        yield [self._shards(direction) for direction in DIRECTIONS]
        yield [self._train(*one) for one in names]
        yield [export_step(self._run(*one), self.model_of(*one)) for one in names]
        yield [self._evaluate(*one) for one in names]

    def _name(self, seed: int, direction: str) -> str:
        return f"{CORPUS}_{seed}_{direction}"

    def _run(self, seed: int, direction: str) -> Path:
        return self.twins.folder / "runs" / self._name(seed, direction)

    def set_folder(self, name: str) -> Path:
        """Return the folder of a synthetic set: texts and questions."""
        return self.folder / "made" / name

    def _make(self, name: str, num: int) -> Step:
        folder = self.set_folder(name)
        command = tool("tools/make_analysis_data.py", "--task", name, "--out", folder, "--num", num, "--seed", 0)
        return Step(name=f"make_{name}", outputs=[folder], commands=[command])

    def _gather(self) -> Step:
        outputs = [self.folder / "train.jsonl", self.folder / "asked"]
        inputs = [self.set_folder(name) for name in self.settings.num]
        return Step(name="gather", inputs=inputs, outputs=outputs, work=self._write, settings=self.settings.repeats)

    def _write(self) -> None:
        """Write one corpus with the texts of each set repeated, and all questions into one folder.

        The texts are shuffled, not blended by sample, so that no training step has one set alone.
        """
        questions, texts = self.folder / "asked", list[dict[str, Any]]()
        questions.mkdir(exist_ok=True)
        for name, times in self.settings.repeats.items():
            texts += times * list(read_lines(self.set_folder(name) / "train.jsonl"))
            for path in self.set_folder(name).glob("*.jsonl"):
                if path.name != "train.jsonl":
                    shutil.copy(path, questions)
        random.Random(CORPUS).shuffle(texts)
        write_lines(self.folder / "train.jsonl", texts)

    def _shards(self, direction: str) -> Step:
        inputs = [self.folder / "train.jsonl", self.folder / "tokenizer"]
        names = ["--input", inputs[0], "--tokenizer", inputs[1], "--output-prefix", self.folder / direction / "train"]
        command = tool("tools/preprocess_data.py", *names, "--direction", direction, "--workers", 1, "--overwrite")
        return Step(name=f"shards_{CORPUS}_{direction}", inputs=inputs, outputs=[self.folder / direction], commands=[command])

    def _train(self, seed: int, direction: str) -> Step:
        shards = self.folder / direction
        data = [f"data.train_blend=[[1, {shards / 'train'}]]", f"data.direction={direction}", *ISOLATED, *RECIPE]
        return train_step(self.twins, self._run(seed, direction), CORPUS, self.settings.model, seed, [shards], data)

    def _evaluate(self, seed: int, direction: str) -> Step:
        questions, model, found = self.folder / "asked", self.model_of(seed, direction), self.found(seed, direction)
        names = ["--tasks", ",".join(self.tasks), "--data", questions, "--model", model, "--output", found, "--batch-size", 64]
        command = tool("tools/evaluate.py", *names)
        return Step(name=f"evaluate_{found.name}", inputs=[questions, model], outputs=[found], commands=[command], resumes=True)

    def results(self) -> dict[str, Any]:
        """Return the metrics of both directions by task, group and seed, and reverse minus forward.

        Differences are paired by seed.
        """
        summaries = {direction: [self._summary(seed, direction) for seed in self.settings.seeds] for direction in DIRECTIONS}
        rows = [
            row for task in self.tasks for row in _rows(task, {d: [s[task] for s in found] for d, found in summaries.items()})
        ]
        mark_over_seeds(rows)
        about = {"num_seeds": len(self.settings.seeds), "num": self.settings.num, "model": self.settings.model}
        return {**about, "rows": rows}

    def _summary(self, seed: int, direction: str) -> dict[str, Any]:
        path = self.found(seed, direction) / "summary.json"
        tasks: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["tasks"]
        return tasks


def _rows(task: str, found: Mapping[str, list[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """Yield rows for all questions, for each group and for the metrics WRITTEN.

    found: direction -> results of the task by seed.
    """
    first = found[DIRECTIONS[0]][0]
    groups = [name.rpartition("/")[2] for name in first["metrics"] if name.startswith(f"{first['main']}/")]
    kinds = [OVERALL, *(name for name in groups if name != OVERALL), *(name for name in WRITTEN if name in first["metrics"])]
    for kind in kinds:
        by_direction = {direction: [_metric(one, kind) for one in seeds] for direction, seeds in found.items()}
        values = {direction: [metric["value"] for metric in metrics] for direction, metrics in by_direction.items()}
        difference = [r - f for r, f in zip(values["reverse"], values["forward"], strict=True)]
        yield {
            "task": task,
            "group": kind,
            "num_items": by_direction[DIRECTIONS[0]][0]["num_items"],
            "values": values,
            "means": {direction: statistics.mean(found) for direction, found in values.items()},
            "within": {d: [[metric["low"], metric["high"]] for metric in metrics] for d, metrics in by_direction.items()},
            "by_seed": difference,
            "difference": statistics.mean(difference),
            "interval": interval_over_seeds(difference, -1.0, 1.0),
        }


def _metric(task: dict[str, Any], kind: str) -> dict[str, Any]:
    """Return the main metric of all questions or of a group, or a metric of WRITTEN."""
    main = task["main"]
    names = {OVERALL: main, **dict(zip(WRITTEN, WRITTEN, strict=True))}
    metric: dict[str, Any] = task["metrics"][names.get(kind, f"{main}/{kind}")]
    return metric

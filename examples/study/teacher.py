"""The part `teacher`: does a reverse model teach a forward model to plan, on tasks in which next-token training does not?

Arms of equal data, each a forward model of one shape: plain next-token training; multi-token prediction; a head that predicts the states
of a reverse model trained on the same texts (Mahajan et al., arXiv 2510.14751); and the same head with a teacher of random weights.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from commands import tool
from control_choice import differences, summary
from lines import read_lines, write_lines
from losses import Twins, export_step, speed_of, training_step
from plan_tasks import SIBLINGS, STAR, TASKS, begins_an_arm, is_coherent, new_answers, write_tasks
from steps import Step
from twins import DIRECTIONS

from megatron_ledom.config.derived import padded_vocab_size
from megatron_ledom.config.schema import ModelConfig
from megatron_ledom.evaluation.intervals import Values
from megatron_ledom.model.arithmetic import flops_per_token

CORPUS = "teacher"
PLAIN, MULTI, TAUGHT, RANDOM = "plain", "multi-token", "reverse teacher", "random teacher"
ARMS = (PLAIN, MULTI, TAUGHT, RANDOM)
TEACHERS = {TAUGHT: "reverse", RANDOM: "untrained"}
"""The teacher of an arm."""
PAIRS = ((TAUGHT, PLAIN), (TAUGHT, MULTI), (TAUGHT, RANDOM))
ROWS = 16
"""The rows of the embedding are a multiple of this: a vocabulary of words is small."""
TEACHER_SEEDS = 1000
"""A teacher has the seed of its arm plus this: with the same seed it would begin as the arm itself does."""
UNTRAINED = ("optimizer.lr=1e-30", "optimizer.min_lr=0", "optimizer.lr_warmup_iters=0")
"""A step at this rate changes no weight."""
MEASURES = {
    STAR: ("right path", "right second node", "an edge first"),
    SIBLINGS: ("new and right", "right", "in the training part"),
}
"""Measures of a task; the first one is compared."""


class Teacher:
    """The files of the part, and the steps that write them."""

    def __init__(self, twins: Twins) -> None:
        self.twins, self.settings = twins, twins.settings.teacher
        self.folder, self.tasks = twins.folder / CORPUS, self.settings.tasks
        self.sizes = {STAR: self.settings.star, SIBLINGS: self.settings.siblings}
        self.length = {task: self.sizes[task].num_tokens for task in TASKS}
        """Tokens of a sample: one text, so that no text attends to another."""

    def run_of(self, task: str, name: str, seed: int) -> Path:
        """Return the run folder of an arm, or of a teacher of TEACHERS."""
        return self.folder / "runs" / f"teacher_{task}_{name.replace(' ', '_')}_{seed}"

    def model_of(self, task: str, name: str, seed: int) -> Path:
        """Return the folder of an exported arm or teacher."""
        return self.folder / "models" / self.run_of(task, name, seed).name

    def answers(self, task: str, seed: int) -> Path:
        """Return the file of the answers of all arms."""
        return self.folder / "answers" / f"{task}_{seed}.jsonl"

    def stages(self) -> Iterator[list[Step]]:
        """Yield the steps: texts, shards, teachers, the arms, and their answers."""
        self.folder.mkdir(parents=True, exist_ok=True)
        each = list(product(self.tasks, self.settings.seeds))
        yield [self._texts()]
        yield [self._shards(task) for task in self.tasks]
        yield [self._train(task, name, seed) for (task, seed), name in product(each, TEACHERS.values())]
        yield [self._export(task, name, seed) for (task, seed), name in product(each, TEACHERS.values())]
        yield [self._train(task, name, seed) for (task, seed), name in product(each, ARMS)]
        yield [self._export(task, name, seed) for (task, seed), name in product(each, ARMS)]
        yield [self._answer(task, seed) for task, seed in each]

    def _file(self, task: str, part: str) -> Path:
        return self.folder / task / f"{part}.jsonl"

    def _texts(self) -> Step:
        one, seed = self.settings, self.twins.settings.problems_seed

        def _write() -> None:
            for task, parts in write_tasks(self.folder, one.star, one.siblings, one.num, seed).items():
                for part, records in parts.items():
                    write_lines(self._file(task, part), records)

        outputs = [self._file(*names) for names in product(TASKS, ("train", "test"))]
        outputs += [self.folder / task / "tokenizer" for task in TASKS]
        settings = [asdict(one.star), asdict(one.siblings), one.num, seed]
        return Step(name="teacher_texts", outputs=outputs, work=_write, settings=settings)

    def _shards(self, task: str) -> Step:
        """Return the step that writes both shards of a task."""
        file, tokenizer, output = self._file(task, "train"), self.folder / task / "tokenizer", self.folder / task / "shards"
        same = ["--input", file, "--tokenizer", tokenizer, "--workers", 1, "--overwrite"]
        commands = [
            tool("tools/preprocess_data.py", *same, "--output-prefix", output / direction, "--direction", direction)
            for direction in DIRECTIONS
        ]
        return Step(name=f"shards_teacher_{task}", inputs=[file, tokenizer], outputs=[output], commands=commands)

    def _train(self, task: str, name: str, seed: int) -> Step:
        one, shards = self.settings, self.folder / task / "shards"
        is_teacher, inputs = name in TEACHERS.values(), [shards]
        direction = "reverse" if is_teacher else "forward"
        changes = [f"data.train_blend=[[1, {shards / direction}]]", f"data.direction={direction}"]
        changes += [f"data.seq_length={self.length[task]}", f"model.make_vocab_size_divisible_by={ROWS}"]
        changes += [f"train.{key}={one.batch_texts}" for key in ("micro_batch_size", "global_batch_size")]
        if name == MULTI:
            changes += ["model.mtp_num_layers=1", f"model.mtp_loss_scaling_factor={one.weight}"]
        if name in TEACHERS:
            inputs.append(self.model_of(task, TEACHERS[name], seed))
            changes += ["train.auxiliary.kind=reverse_state", f"train.auxiliary.teacher={inputs[-1]}"]
            changes += [f"train.auxiliary.weight={one.weight}"]
        changes += UNTRAINED if name == TEACHERS[RANDOM] else [f"optimizer.lr={one.lr}"]
        iters = 1 if name == TEACHERS[RANDOM] else one.train_iters
        tokenizer = self.folder / task / "tokenizer"
        own = seed + TEACHER_SEEDS if is_teacher else seed
        return training_step(self.run_of(task, name, seed), tokenizer, one.shape, own, iters, inputs, changes)

    def _export(self, task: str, name: str, seed: int) -> Step:
        return export_step(self.run_of(task, name, seed), self.model_of(task, name, seed))

    def _answer(self, task: str, seed: int) -> Step:
        models, output = [self.model_of(task, arm, seed) for arm in ARMS], self.answers(task, seed)
        named = [part for arm, model in zip(ARMS, models, strict=True) for part in ("--model", arm, model)]
        options = [
            "--max-new-tokens",
            self.sizes[task].answer_tokens,
            "--prompts",
            self._file(task, "test"),
            "--output",
            output,
        ]
        options += ["--num-samples", self.settings.num["test"], "--seed", seed] if task == SIBLINGS else []
        command = tool("examples/study/plan_answers.py", *named, *options)
        inputs = [*models, self._file(task, "test")]
        return Step(name=f"teacher_answers_{task}_{seed}", inputs=inputs, outputs=[output], commands=[command])

    def results(self) -> dict[str, Any] | None:
        """Return the measures by task and arm, the comparisons, and the budget. None if the part was not run."""
        seeds = self.settings.seeds
        if not all(self.answers(task, seed).is_file() for task, seed in product(self.tasks, seeds)):
            return None
        found = {task: self._outcomes(task) for task in self.tasks}
        first = {task: MEASURES[task][0] for task in self.tasks}
        pairs = {
            f"{task}|{one} - {other}": found[task][one][first[task]] - found[task][other][first[task]]
            for task, (one, other) in product(self.tasks, PAIRS)
        }
        return {
            "seeds": seeds,
            "settings": json.loads(json.dumps(asdict(self.settings))),
            "measures": {
                f"{task}|{arm}": {name: summary(values) for name, values in found[task][arm].items()}
                for task, arm in product(self.tasks, ARMS)
            },
            "comparisons": differences(pairs),
            "tokens": {task: self._tokens(task) for task in self.tasks},
            "budget": {f"{task}|{arm}": self._budget(task, arm) for task, arm in product(self.tasks, ARMS)},
        }

    def _outcomes(self, task: str) -> dict[str, dict[str, Values]]:
        """Return by arm and measure the outcomes [seeds, prompts or samples], 1 or 0."""
        measure = self._of_star if task == STAR else self._of_siblings
        by_seed = [list(read_lines(self.answers(task, seed))) for seed in self.settings.seeds]
        outcomes = {arm: [measure([r for r in records if r["model"] == arm]) for records in by_seed] for arm in ARMS}
        return {
            arm: {name: np.array([one[place] for one in seeds], float) for place, name in enumerate(MEASURES[task])}
            for arm, seeds in outcomes.items()
        }

    def _of_star(self, records: list[dict[str, str]]) -> tuple[list[bool], ...]:
        right = {record["prompt"]: record["answer"] for record in read_lines(self._file(STAR, "test"))}
        exact = [record["answer"] == right[record["prompt"]] for record in records]
        second = [record["answer"].split()[:2] == right[record["prompt"]].split()[:2] for record in records]
        return exact, second, [begins_an_arm(record["prompt"], record["answer"]) for record in records]

    def _of_siblings(self, records: list[dict[str, str]]) -> tuple[list[bool], ...]:
        one, seed, answers = self.settings.siblings, self.twins.settings.problems_seed, [record["answer"] for record in records]
        families, trained = one.families(seed), set(one.answers(seed)[0])
        new = list(new_answers(answers, families, trained))
        return new, [is_coherent(answer, families) for answer in answers], [answer in trained for answer in answers]

    def _tokens(self, task: str) -> int:
        """Return the tokens that each arm, and the trained teacher, reads."""
        return self.settings.train_iters * self.settings.batch_texts * self.length[task]

    def _budget(self, task: str, arm: str) -> dict[str, float]:
        """Return floating-point operations of the training of an arm, with its module or head, and of its teacher; and its speed."""
        shape, tokens, length = self.settings.shape, self._tokens(task), self.length[task]
        rows = padded_vocab_size(len(self.sizes[task].words) + 2, ROWS)
        model = ModelConfig(**asdict(shape), num_query_groups=shape.num_attention_heads)
        deeper = ModelConfig(
            **{**asdict(shape), "num_layers": shape.num_layers + 1}, num_query_groups=shape.num_attention_heads
        )
        plain, width = flops_per_token(model, length, rows), shape.hidden_size
        own, teacher = plain, 0.0
        if arm == MULTI:
            own = flops_per_token(deeper, length, rows) + 6.0 * (2 * width * width + width * rows)
        if arm in TEACHERS:
            own += 6.0 * 2 * width * shape.ffn_hidden_size
            states = (plain - 6.0 * width * rows) / 3  # forward only, without the output layer
            teacher = states + (plain if arm == TAUGHT else 0.0)
        speeds = [speed_of(self.run_of(task, arm, seed))[0] for seed in self.settings.seeds]
        return {"own": own * tokens, "teacher": teacher * tokens, "speed": float(np.mean(speeds))}

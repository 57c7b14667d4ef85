"""Part 9: infilling by twins or by one two-way model that meet in the middle, beside the forward model alone and a FIM model.

All models of a seed have the same shape, the same pieces of text and equally many tokens.
"""

from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from commands import tool
from control_choice import differences, summary
from controls import LENGTH
from infill_texts import KINDS, gaps_of, kind_of, pieces_of, rearranged
from lines import read_lines, write_lines
from losses import ISOLATED, Twins, export_step, training_step
from steps import Step

from megatron_ledom.errors import DataError
from megatron_ledom.evaluation.intervals import Values
from megatron_ledom.inference.joint_tokenizer import JointTokenizer

CORPUS = "infill"
MARKERS = {"forward": "<MASK>", "reverse": "<CLS>"}
"""Special tokens that name the direction to the two-way model."""
BASELINES = ("forward only", "FIM")
OURS = "twins"
PRIMARY = tuple((OURS, other) for other in BASELINES)
SECONDARY = (
    ("twins, samples", "twins"),
    ("twins, samples", "twins, samples, score alone"),
    ("twins, samples", "twins, forward samples, score of both"),
    ("twins, samples", "FIM"),
    ("two-way", "twins"),
    ("two-way, samples", "twins, samples"),
)
MAX_NEW_TOKENS, NUM_MARKS = 40, 8
"""Tokens that each model writes for a gap, and room for marks and for ids that change at the seams."""
MEASURES = ("exact match", "edit similarity")


class Infilling:
    """The files of part 9, and the steps that write them."""

    def __init__(self, twins: Twins) -> None:
        self.twins, self.settings = twins, twins.settings.infill
        self.folder = twins.folder / CORPUS
        self.models = ("forward", "reverse", "fim", *(["both"] if self.settings.two_way else []))

    def run_of(self, seed: int, name: str) -> Path:
        """Return the run folder of a model."""
        return self.folder / "runs" / f"infill_{name}_{seed}"

    def model_of(self, seed: int, name: str) -> Path:
        """Return the folder of an exported model."""
        return self.folder / "models" / f"infill_{name}_{seed}"

    def answers(self, seed: int) -> Path:
        """Return the file of the gaps with the answers of every method."""
        return self.folder / f"answers_{seed}.jsonl"

    def stages(self) -> Iterator[list[Step]]:
        """Yield the steps: texts, tokenizer, shards, models, and their answers."""
        self.folder.mkdir(parents=True, exist_ok=True)
        seeds = self.settings.seeds
        yield [self._texts()]
        yield [self.twins.corpora.tokenizer_step(CORPUS, self._file("train"), self.settings.vocab_size)]
        yield [self._items(), *(self._shards(name) for name in self._sources())]
        yield [self._train(seed, name) for seed, name in product(seeds, self.models)]
        yield [export_step(self.run_of(*one), self.model_of(*one)) for one in product(seeds, self.models)]
        yield [self._answer(seed) for seed in seeds]

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.jsonl"

    def _texts(self) -> Step:
        source, seed = self.twins.folder / "text/train.jsonl", self.twins.settings.problems_seed

        def _write() -> None:
            random = Random(seed)
            train = [(piece, kind_of(record)) for record in read_lines(source) for piece in pieces_of(record["text"])]
            random.shuffle(train)
            write_lines(self._file("train"), [{"text": piece} for piece, _ in train])
            write_lines(self._file("fim"), [{"text": rearranged(piece, kind, random)} for piece, kind in train])

        outputs = [self._file("train"), self._file("fim")]
        return Step(name="infill_texts", inputs=[source], outputs=outputs, work=_write, settings=seed)

    def _items(self) -> Step:
        """Return the step that draws gaps of held-out pieces, one of a piece.

        They leave room for two texts of MAX_NEW_TOKENS, each text can be written whole, and none stands anywhere in the training text.
        """
        files = {kind: self.twins.folder / "text" / f"{kind}.jsonl" for kind in KINDS}
        train, folder, output = self._file("train"), self.twins.corpora.tokenizer(CORPUS), self._file("items")
        num, seed = self.settings.num_items, self.twins.settings.problems_seed

        def _write() -> None:
            random, tokenizer = Random(seed), JointTokenizer.from_pretrained(folder)
            known = {record["text"] for record in read_lines(train)}
            trained = "".join(known)

            def _usable(gap: tuple[str, str, str]) -> bool:
                prefix, middle, suffix = gap
                fits = len(tokenizer.encode(prefix + suffix)) <= LENGTH - 2 * MAX_NEW_TOKENS - NUM_MARKS
                return fits and len(tokenizer.encode(middle)) < MAX_NEW_TOKENS and middle.strip() not in trained

            items: list[dict[str, str]] = []
            for kind, file in files.items():
                pieces = dict.fromkeys(piece for record in read_lines(file) for piece in pieces_of(record["text"]))
                each = [[*filter(_usable, gaps_of(piece, kind))] for piece in pieces if piece not in known]
                gaps = [random.choice(one) for one in each if one]
                chosen = random.sample(gaps, min(num, len(gaps)))
                items += [
                    {"prompt": prefix, "suffix": suffix, "middle": middle, "kind": kind} for prefix, middle, suffix in chosen
                ]
            if not items:
                raise DataError("no held-out piece has a gap that fits; raise text_kilobytes.held_out or infill.vocab_size")
            write_lines(output, items)

        inputs = [*files.values(), train, folder]
        return Step(name="infill_items", inputs=inputs, outputs=[output], work=_write, settings=[num, seed, MAX_NEW_TOKENS])

    def _sources(self) -> list[str]:
        marked = [f"marked_{direction}" for direction in MARKERS] if self.settings.two_way else []
        return ["forward", "reverse", "fim", *marked]

    def _shards(self, name: str) -> Step:
        direction = "reverse" if name.endswith("reverse") else "forward"
        file, output = self._file("fim" if name == "fim" else "train"), self.folder / "shards" / name
        step = self.twins.corpora.shards_step(f"infill_{name}", {"train": file}, CORPUS, direction, output)
        if not name.startswith("marked"):
            return step
        return replace(step, commands=[[*command, "--marker", MARKERS[direction]] for command in step.commands])

    def _train(self, seed: int, name: str) -> Step:
        one, shards = self.settings, self.folder / "shards"
        sources = [shards / f"marked_{direction}" for direction in MARKERS] if name == "both" else [shards / name]
        blend = ", ".join(f"[1, {source / 'train'}]" for source in sources)
        direction = name if name in ("both", "reverse") else "forward"
        changes = [f"data.train_blend=[{blend}]", f"data.direction={direction}", *ISOLATED]
        changes += [f"train.{size}={one.batch_size}" for size in ("micro_batch_size", "global_batch_size")]
        tokenizer, shape = self.twins.corpora.tokenizer(CORPUS), self.twins.settings.models[one.model]
        return training_step(self.run_of(seed, name), tokenizer, shape, seed, one.train_iters, sources, changes)

    def _answer(self, seed: int) -> Step:
        one, output = self.settings, self.answers(seed)
        models = {name: self.model_of(seed, name) for name in self.models}
        options = [part for name, model in models.items() for part in (f"--{name}", model)]
        options += [
            "--items",
            self._file("items"),
            "--output",
            output,
            "--num-samples",
            one.num_samples,
            "--max-new-tokens",
            MAX_NEW_TOKENS,
        ]
        command = tool(
            "examples/study/infill_answers.py", *options, "--temperature", self.twins.settings.temperature, "--seed", seed
        )
        inputs = [*models.values(), self._file("items")]
        return Step(name=f"infill_answers_{seed}", inputs=inputs, outputs=[output], commands=[command])

    def results(self) -> dict[str, Any] | None:
        """Return both measures by method and kind, comparisons, and how often the models met. None if the part was not run."""
        if not all(self.answers(seed).is_file() for seed in self.settings.seeds):
            return None
        found = [list(read_lines(self.answers(seed))) for seed in self.settings.seeds]
        measured = {name: measures_of(found, name) for name in found[0][0]["answers"]}
        known = [pair for pair in SECONDARY if set(pair) <= set(measured)]
        kinds = [record["kind"] for record in found[0]]
        return {
            "settings": asdict(self.settings),
            "num_items": {kind: kinds.count(kind) for kind in KINDS},
            "rows": {
                f"{kind}|{name}": {
                    measure: summary(values[:, [one == kind for one in kinds]]) for measure, values in both.items()
                }
                for kind in dict.fromkeys(kinds)
                for name, both in measured.items()
            },
            "primary": _compared(measured, PRIMARY),
            "secondary": _compared(measured, known),
            "met": {
                name: summary(_values(found, lambda record, name=name: record["met"][name])) for name in found[0][0]["met"]
            },
            "right_if_met": {name: _right_if_met(found, name) for name in found[0][0]["met"]},
        }


def measures_of(found: list[list[dict[str, Any]]], name: str) -> dict[str, Values]:
    """Return the values [seeds, gaps] of a method. Edit similarity: 1 - edit distance / length of the longer text."""
    from nltk.metrics.distance import edit_distance

    def _similarity(record: dict[str, Any]) -> float:
        text, gold = record["answers"][name], record["middle"]
        return 1 - edit_distance(text, gold) / max(len(text), len(gold))

    exact = _values(found, lambda record: record["answers"][name] == record["middle"])
    return {"exact match": exact, "edit similarity": _values(found, _similarity)}


def _values(found: list[list[dict[str, Any]]], value: Any) -> Values:
    return np.array([[float(value(record)) for record in records] for records in found])


def _compared(measured: dict[str, dict[str, Values]], pairs: Any) -> dict[str, Any]:
    """Return the differences of pairs of methods in both measures, as one family."""
    return differences(
        {f"{one} - {other}|{m}": measured[one][m] - measured[other][m] for one, other in pairs for m in MEASURES}
    )


def _right_if_met(found: list[list[dict[str, Any]]], name: str) -> dict[str, list[int]]:
    """Return by met and not met the number of exact matches, and of gaps, over all seeds."""
    counts = {"met": [0, 0], "not met": [0, 0]}
    for record in [record for records in found for record in records]:
        count = counts["met" if record["met"][name] else "not met"]
        count[0] += record["answers"][name] == record["middle"]
        count[1] += 1
    return counts

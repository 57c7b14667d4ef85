"""Part 8: the gap of the losses of twins over contexts and sizes, with a positive and a negative control.

Papadopoulos et al. (arXiv 2401.17505) find that the gap grows with both. All models read equally many tokens.
"""

import json
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from families import t_family
from gap_controls import CHAIN, PRIMES, products, vocab_size, walks
from lines import write_lines
from losses import ISOLATED, Twins, final_losses, speed_of, training_step
from steps import Step
from twins import DIRECTIONS

PUBLISHED = (2.1, 2.4)
"""The gaps in percent of arXiv 2502.18435."""
NEGLIGIBLE = 0.2
"""Bound in percent of the gap of the negative control."""
CONTROLS = (PRIMES, CHAIN)
HELD_OUT, SEEN = "held_out", "seen"
"""Held-out sets of the controls: unseen lines; and lines of primes that were trained on, of the positive control only."""
NUM_SEEN = 1000
FRESH = 7_000_000
"""Added to the seed of the problems: the pairs of primes are others than those of the trials that chose the form of the lines."""
Names = tuple[str, str, int, int]
"""Corpus, model, context and seed of a pair of twins."""


class LossGap:
    """The files of part 8, and the steps that write them."""

    def __init__(self, twins: Twins) -> None:
        self.twins, self.settings = twins, twins.settings.loss_gap
        self.folder = twins.folder / "loss_gap"

    def names(self) -> Iterator[Names]:
        """Yield the names of each pair of twins, those of the controls last."""
        one = self.settings
        yield from product(one.corpora, one.models, one.contexts, one.seeds)
        yield from product(CONTROLS, [one.control_model], [one.control_context], one.seeds)

    def run_of(self, names: Names, direction: str) -> Path:
        """Return the run folder of a twin."""
        return self.folder / "runs" / "_".join(["gap", *map(str, names), direction])

    def stages(self) -> Iterator[list[Step]]:
        """Yield the steps: texts, tokenizers and shards of the controls, then all trainings."""
        self.folder.mkdir(parents=True, exist_ok=True)
        corpora, states = self.twins.corpora, self.settings.num_states
        yield [self._texts(control) for control in CONTROLS]
        files = {control: self._file(control, "train") for control in CONTROLS}
        yield [corpora.tokenizer_step(self._corpus(one), files[one], vocab_size(one, states)) for one in CONTROLS]
        yield [self._shards(control, direction) for control, direction in product(CONTROLS, DIRECTIONS)]
        yield [self._train(names, direction) for names, direction in product(self.names(), DIRECTIONS)]

    def _corpus(self, name: str) -> str:
        """Return the name of a corpus's folder within the study's."""
        return f"gap_{name}" if name in CONTROLS else name

    def _file(self, control: str, part: str) -> Path:
        return self.twins.folder / self._corpus(control) / f"{part}.jsonl"

    def _texts(self, control: str) -> Step:
        one, seed = self.settings, self.twins.settings.problems_seed + FRESH
        make, size = (products, one.largest_prime) if control == PRIMES else (walks, one.num_states)

        def _write() -> None:
            train, held_out = make(one.num_lines, size, seed)
            for part, texts in {"train": train, HELD_OUT: held_out, SEEN: train[:NUM_SEEN]}.items():
                write_lines(self._file(control, part), [{"text": text} for text in texts])

        outputs = [self._file(control, part) for part in ("train", HELD_OUT, SEEN)]
        return Step(name=f"gap_{control}", outputs=outputs, work=_write, settings=[one.num_lines, size, seed])

    def _shards(self, control: str, direction: str) -> Step:
        files = {part: self._file(control, part) for part in ("train", *self.domains(control))}
        corpus = self._corpus(control)
        output = self.twins.corpora.shards(corpus, direction)
        return self.twins.corpora.shards_step(f"{corpus}_{direction}", files, corpus, direction, output)

    def domains(self, corpus: str) -> tuple[str, ...]:
        """Return the held-out sets of a corpus."""
        controls = {PRIMES: (HELD_OUT, SEEN), CHAIN: (HELD_OUT,)}
        return controls[corpus] if corpus in controls else self.twins.corpora.domains[corpus]

    def _train(self, names: Names, direction: str) -> Step:
        """Return the step that trains a twin. Only the lines of a control are trained without attention to each other."""
        corpus, model, context, seed = names
        shards = self.twins.corpora.shards(self._corpus(corpus), direction)
        sets = ", ".join(f"{domain}: [[1, {shards / domain}]]" for domain in self.domains(corpus))
        changes = [f"data.train_blend=[[1, {shards / 'train'}]]", f"data.valid_sets={{{sets}}}", f"data.direction={direction}"]
        changes += [f"data.seq_length={context}", *(ISOLATED if corpus in CONTROLS else ())]
        size = self.settings.batch_tokens // context
        changes += [f"train.micro_batch_size={size}", f"train.global_batch_size={size}"]
        tokens = self.settings.control_tokens if corpus in CONTROLS else self.settings.tokens
        tokenizer, shape = self.twins.corpora.tokenizer(self._corpus(corpus)), self.twins.settings.models[model]
        return training_step(
            self.run_of(names, direction), tokenizer, shape, seed, tokens // (size * context), [shards], changes
        )

    def results(self) -> dict[str, Any] | None:
        """Return the gaps in percent by cell and of the controls, how they change, and speeds. None if the part was not run."""
        runs = [self.run_of(names, direction) for names, direction in product(self.names(), DIRECTIONS)]
        if not all((run / "metrics.jsonl").is_file() for run in runs):
            return None
        one = self.settings
        cells = {
            f"{domain}|{model}|{context}": self._gaps(corpus, domain, model, context)
            for corpus, model, context in product(one.corpora, one.models, one.contexts)
            for domain in self.domains(corpus)
        }
        controls = {c: self._gaps(c, HELD_OUT, one.control_model, one.control_context) for c in CONTROLS}
        controls[SEEN] = self._gaps(PRIMES, SEEN, one.control_model, one.control_context)
        return {
            "seeds": one.seeds,
            "settings": json.loads(json.dumps({name: getattr(one, name) for name in one.__slots__})),
            "cells": t_family(cells, PUBLISHED[0]),
            "controls": {name: t_family({name: values}, NEGLIGIBLE)[name] for name, values in controls.items()},
            "losses": {name: self._losses(name, HELD_OUT) for name in CONTROLS} | {SEEN: self._losses(PRIMES, SEEN)},
            "growth": t_family(self._growth(cells)),
            "speed": self._speeds(),
        }

    def _gaps(self, corpus: str, domain: str, model: str, context: int) -> list[float]:
        """Return by seed the relative difference of the final losses in percent, reverse against forward."""
        found = []
        for seed in self.settings.seeds:
            reverse, forward = (
                final_losses(self.run_of((corpus, model, context, seed), d))[domain] for d in ("reverse", "forward")
            )
            found.append(100 * (reverse / forward - 1))
        return found

    def _losses(self, control: str, domain: str) -> dict[str, float]:
        """Return by direction the mean final loss of a control, in nats per token."""
        one = self.settings
        names = [(control, one.control_model, one.control_context, seed) for seed in one.seeds]
        return {d: float(np.mean([final_losses(self.run_of(n, d))[domain] for n in names])) for d in DIRECTIONS}

    def _growth(self, cells: dict[str, list[float]]) -> dict[str, list[float]]:
        """Return by seed the gap at the longest context minus that at the shortest, and of the largest model minus the smallest."""
        one, found = self.settings, dict[str, list[float]]()
        for corpus in one.corpora:
            for domain in self.domains(corpus):
                if len(one.contexts) > 1:
                    for model in one.models:
                        ends = [cells[f"{domain}|{model}|{context}"] for context in (one.contexts[-1], one.contexts[0])]
                        found[f"{domain}, {model}: context {one.contexts[0]} to {one.contexts[-1]}"] = _minus(*ends)
                if len(one.models) > 1:
                    for context in one.contexts:
                        ends = [cells[f"{domain}|{model}|{context}"] for model in (one.models[-1], one.models[0])]
                        found[f"{domain}, context {context}: {one.models[0]} to {one.models[-1]}"] = _minus(*ends)
        return found

    def _speeds(self) -> dict[str, float]:
        """Return by model and context the mean tokens per second of a run."""
        found: dict[str, list[float]] = {}
        for names, direction in product(self.names(), DIRECTIONS):
            found.setdefault(f"{names[1]}, context {names[2]}", []).append(speed_of(self.run_of(names, direction))[0])
        return {name: float(np.mean(values)) for name, values in found.items()}


def _minus(one: list[float], other: list[float]) -> list[float]:
    return [a - b for a, b in zip(one, other, strict=True)]

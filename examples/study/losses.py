"""Part 1: twins that differ only in direction, for several corpora, sizes and seeds, and the gap between their losses."""

import json
import math
import statistics
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from commands import ROOT, QuickstartError, module, tool
from corpora import Corpora
from settings import Model, Settings
from steps import Step
from twins import DIRECTIONS, read_metrics

from megatron_ledom.checkpoint.folder import finished_checkpoints
from megatron_ledom.evaluation.intervals import t_interval

ISOLATED = ("data.reset_attention_mask=true", "data.reset_position_ids=true")
"""Problems are evaluated one by one, so they are trained without attention to each other."""


class Twins:
    """The files of part 1, and the steps that write them."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.folder, self.settings = folder, settings
        self.corpora = Corpora(folder, settings)
        self.largest = list(settings.models)[-1]

    def names(self) -> Iterator[tuple[str, str, int]]:
        """Yield (corpus, model, seed) of each pair of twins."""
        return product(self.corpora.domains, self.settings.models, self.settings.seeds)

    def run_of(self, corpus: str, model: str, seed: int, direction: str) -> Path:
        """Return the run folder of a twin."""
        return self.folder / "runs" / f"{corpus}_{model}_{seed}_{direction}"

    def model_of(self, corpus: str, model: str, seed: int, direction: str) -> Path:
        """Return the folder of the exported twin."""
        return self.folder / "models" / f"{corpus}_{model}_{seed}_{direction}"

    def stages(self) -> Iterator[list[Step]]:
        """Yield lists of steps, in order. The steps of one list are independent."""
        yield from self.corpora.stages()
        twins = list(product(self.names(), DIRECTIONS))
        yield [self.twin_step(*names, direction) for names, direction in twins]
        exported = [(n, d) for n, d in twins if n[0] == "maths" or n[1] == self.largest]
        yield [export_step(self.run_of(*n, d), self.model_of(*n, d)) for n, d in exported]
        yield [self._compare(corpus, seed) for corpus, seed in product(self.corpora.domains, self.settings.seeds)]

    def compared(self, corpus: str, seed: int) -> Path:
        """Return the folder of the comparison of the largest twins' losses by position."""
        return self.folder / "compared" / f"{corpus}_{seed}"

    def _compare(self, corpus: str, seed: int) -> Step:
        models = [self.model_of(corpus, self.largest, seed, direction) for direction in ("forward", "reverse")]
        data, output = self.corpora.held_out(corpus), self.compared(corpus, seed)
        options = ["--data", data, "--domain-key", "domain", "--output", output, "--batch-size", 32]
        command = tool("tools/compare_losses.py", *models, *options)
        name = f"compare_{output.name}"
        return Step(name=name, inputs=[*models, data], outputs=[output], commands=[command], resumes=True)

    def more_seeds(self, model: str, seeds: Sequence[int]) -> Iterator[list[Step]]:
        """Yield the steps that train and export the twins on word problems of those seeds that part 1 does not have."""
        names = [("maths", model, seed, d) for seed in seeds if seed not in self.settings.seeds for d in DIRECTIONS]
        yield [self.twin_step(*one) for one in names]
        yield [export_step(self.run_of(*one), self.model_of(*one)) for one in names]

    def twin_step(self, corpus: str, model: str, seed: int, direction: str) -> Step:
        """Return the step that trains a twin."""
        shards = self.corpora.shards(corpus, direction)
        sets = ", ".join(f"{domain}: [[1, {shards / domain}]]" for domain in self.corpora.domains[corpus])
        data = [f"data.train_blend=[[1, {shards / 'train'}]]", f"data.valid_sets={{{sets}}}"]
        data += [] if corpus == "text" else ISOLATED
        run = self.run_of(corpus, model, seed, direction)
        return train_step(self, run, corpus, model, seed, [shards], [*data, f"data.direction={direction}"])


def train_step(twins: Twins, run: Path, corpus: str, model: str, seed: int, inputs: list[Path], data: list[str]) -> Step:
    """Return the step of a training run with the study's recipe. data: overrides of the data section."""
    tokenizer, settings = twins.corpora.tokenizer(corpus), twins.settings
    return training_step(run, tokenizer, settings.models[model], seed, settings.train_iters[corpus], inputs, data)


def training_step(
    run: Path, tokenizer: Path, model: Model, seed: int, train_iters: int, inputs: list[Path], changes: list[str]
) -> Step:
    """Return the step of a training run with the study's recipe. changes: overrides of data and of the recipe."""
    paths = [f"run_dir={run}", f"data.tokenizer={tokenizer}"]
    length = [f"train.train_iters={train_iters}", f"train.seed={seed}"]
    config = ROOT / "examples/study/recipe.yaml"
    overrides = [*paths, *changes, *model.overrides(), *length]
    command = module("megatron_ledom.pretrain", "--config", config, *overrides)
    return Step(
        name=f"train_{run.name}",
        inputs=[*inputs, tokenizer, config],
        outputs=[run],
        commands=[command],
        resumes=True,
        check=partial(check_complete, run, train_iters),
    )


def check_complete(run: Path, train_iters: int) -> None:
    """Raise QuickstartError if a run stopped before its end: after a signal, training saves and exits with 0."""
    saved = max(finished_checkpoints(str(run / "checkpoints")), default=0)
    if saved < train_iters:
        raise QuickstartError(
            f"{run} was stopped and saved at iteration {saved} of {train_iters}; run the study again to resume it"
        )


def export_step(run: Path, model: Path) -> Step:
    """Return the step that exports a run to a Hugging Face folder, with the parity check."""
    command = tool("tools/convert_checkpoint.py", "mcore-to-hf", "--load", run, "--save", model)
    return Step(name=f"export_{model.name}", inputs=[run / "checkpoints"], outputs=[model], commands=[command])


def final_losses(run: Path) -> dict[str, float]:
    """Return the loss of each held-out set at the end of a run, in nats per token."""
    last = [record["validation"] for record in read_metrics(run / "metrics.jsonl") if "validation" in record][-1]
    return {name: found["lm_loss"] for name, found in last.items()}


def speed_of(run: Path) -> tuple[float, float]:
    """Return the median tokens per second of a run, and their fraction of the measured matmul peak."""
    records = read_metrics(run / "metrics.jsonl")
    return statistics.median(r["tokens_per_second"] for r in records), statistics.median(r["mfu"] for r in records)


def gaps(twins: Twins) -> list[dict[str, Any]]:
    """Return the losses of both directions by corpus, model, domain and seed, and the gap in percent with its interval."""
    rows = []
    for corpus, model in product(twins.corpora.domains, twins.settings.models):
        found = {d: [final_losses(twins.run_of(corpus, model, seed, d)) for seed in twins.settings.seeds] for d in DIRECTIONS}
        for domain in twins.corpora.domains[corpus]:
            losses = {d: [loss[domain] for loss in found[d]] for d in DIRECTIONS}
            by_seed = [100 * (r / f - 1) for r, f in zip(losses["reverse"], losses["forward"], strict=True)]
            row = {"corpus": corpus, "model": model, "domain": domain, "losses": losses, "by_seed": by_seed}
            rows.append({**row, "gap": statistics.mean(by_seed), "interval": interval_over_seeds(by_seed)})
    return rows


def gaps_by_place(twins: Twins) -> dict[str, list[dict[str, Any]]]:
    """Return by corpus and tenth of a document reverse minus forward of the largest twins, in nats per inner token.

    Tenths are in text order.
    """
    found = {}
    for corpus in twins.corpora.domains:
        paths = [twins.compared(corpus, seed) / "report.json" for seed in twins.settings.seeds]
        reports = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
        rows = []
        for tenths in zip(*(report["tenths"] for report in reports), strict=True):
            by_seed = [tenth["reverse"] - tenth["forward"] for tenth in tenths]
            row = {"tenth": tenths[0]["group"], "tokens": tenths[0]["tokens"], "by_seed": by_seed}
            rows.append({**row, "difference": statistics.mean(by_seed), "interval": interval_over_seeds(by_seed)})
        found[corpus] = rows
    return found


def interval_over_seeds(values: Sequence[float], least: float = -math.inf, most: float = math.inf) -> list[float] | None:
    """Return the 95 % interval of the mean by Student's t, cut to [least, most]. None for a single seed."""
    if len(values) < 2:
        return None
    low, high = t_interval(values)
    return [max(least, low), min(most, high)]

"""Part 1: twins that differ in direction alone, over corpora, sizes and seeds, and the gap between their losses."""

import json
import statistics
from collections.abc import Iterator
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

from commands import ROOT, module, tool
from problems import parts, read_lines
from settings import Settings
from steps import Step
from twins import DIRECTIONS, read_metrics

DOMAINS = {"text": ("prose", "code"), "maths": ("problems",)}
"""Held-out sets of each corpus."""
ISOLATED = ("data.reset_attention_mask=true", "data.reset_position_ids=true")
"""Problems are asked alone, so they are learnt alone."""


class Twins:
    """Where everything of part 1 lies, and the steps that make it."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.folder, self.settings = folder, settings

    def names(self) -> Iterator[tuple[str, str, int]]:
        """(corpus, model, seed) of each pair of twins."""
        return product(DOMAINS, self.settings.models, self.settings.seeds)

    def run_of(self, corpus: str, model: str, seed: int, direction: str) -> Path:
        """Run folder of one twin."""
        return self.folder / "runs" / f"{corpus}_{model}_{seed}_{direction}"

    def model_of(self, corpus: str, model: str, seed: int, direction: str) -> Path:
        """Its export."""
        return self.folder / "models" / f"{corpus}_{model}_{seed}_{direction}"

    def stages(self) -> Iterator[list[Step]]:
        """Steps in order; those of one list do not need each other."""
        yield self._corpora()
        yield [self._split()]
        yield [self.tokenizer_step(corpus) for corpus in DOMAINS]
        yield [self._shards(corpus, direction) for corpus, direction in product(DOMAINS, DIRECTIONS)]
        twins = list(product(self.names(), DIRECTIONS))
        yield [self._train(*names, direction) for names, direction in twins]
        yield [export_step(self.run_of(*n, d), self.model_of(*n, d)) for n, d in twins if n[0] == "maths"]

    def _corpora(self) -> list[Step]:
        text, maths, settings = self.folder / "text", self.folder / "maths", self.settings
        limits = ["--most-megabytes", 40, "--least-megabytes", 20, "--held-out-percent", 5]
        collect = tool("examples/quickstart/collect.py", "--output", text / "collected", *limits)
        outputs = [maths / f"{part}.jsonl" for part in settings.num_problems]
        asked = [[asdict(level) for level in settings.levels], settings.num_problems, settings.problems_seed]
        return [
            Step(name="collect", outputs=[text / "collected"], commands=[collect]),
            Step(name="problems", outputs=outputs, work=self._write_problems, settings=asked),
        ]

    def _write_problems(self) -> None:
        made = parts(self.settings.levels, self.settings.num_problems, self.settings.problems_seed)
        for part, problems in made.items():
            write_lines(self.folder / "maths" / f"{part}.jsonl", [problem.as_fields() for problem in problems])

    def _split(self) -> Step:
        text = self.folder / "text"
        outputs = [text / f"{name}.jsonl" for name in ("train", "prose", "code")]
        files = [text / "collected" / f"{split}.jsonl" for split in ("train", "valid")]
        asked = self.settings.text_kilobytes
        return Step(name="split", inputs=files, outputs=outputs, work=self._write_domains, settings=asked)

    def _write_domains(self) -> None:
        """As much prose as code: what is collected has most of its prose in front and most of its code behind."""
        text, sizes = self.folder / "text", self.settings.text_kilobytes
        train = self._some_of_each(text / "collected/train.jsonl", 1000 * sizes["train"])
        write_lines(text / "train.jsonl", [record for domain in train.values() for record in domain])
        for domain, records in self._some_of_each(text / "collected/valid.jsonl", 1000 * sizes["held_out"]).items():
            write_lines(text / f"{domain}.jsonl", records)

    def _some_of_each(self, path: Path, most_bytes: int) -> dict[str, list[dict[str, str]]]:
        """The first records of each domain, up to `most_bytes` of text and at least one."""
        chosen: dict[str, list[dict[str, str]]] = {domain: [] for domain in DOMAINS["text"]}
        left = dict.fromkeys(chosen, most_bytes)
        for record in read_lines(path):
            domain = "code" if record["source"].endswith(".py") else "prose"
            num_bytes = len(record["text"].encode())
            if num_bytes <= left[domain] or not chosen[domain]:
                chosen[domain].append(record)
                left[domain] -= num_bytes
        return chosen

    def held_out_file(self, corpus: str, domain: str) -> Path:
        """JSON lines of a held-out set."""
        return self.folder / corpus / ("valid.jsonl" if corpus == "maths" else f"{domain}.jsonl")

    def tokenizer_step(self, corpus: str) -> Step:
        """A vocabulary of the training text of a corpus."""
        train, output = self.folder / corpus / "train.jsonl", self.folder / corpus / "tokenizer"
        options = ["--vocab-size", self.settings.vocab_size[corpus], "--max-sentences", 100_000]
        command = tool("tools/train_tokenizer.py", "--input", train, "--output", output, *options)
        return Step(name=f"tokenizer_{corpus}", inputs=[train], outputs=[output], commands=[command])

    def _shards(self, corpus: str, direction: str) -> Step:
        files = {"train": self.folder / corpus / "train.jsonl"}
        files |= {domain: self.held_out_file(corpus, domain) for domain in DOMAINS[corpus]}
        tokenizer, output = self.folder / corpus / "tokenizer", self.folder / corpus / direction
        commands = []
        for name, file in files.items():
            names = ["--input", file, "--tokenizer", tokenizer, "--output-prefix", output / name, "--direction", direction]
            commands.append(tool("tools/preprocess_data.py", *names, "--workers", 1, "--overwrite"))
        name = f"shards_{corpus}_{direction}"
        return Step(name=name, inputs=[*files.values(), tokenizer], outputs=[output], commands=commands)

    def _train(self, corpus: str, model: str, seed: int, direction: str) -> Step:
        shards = self.folder / corpus / direction
        sets = ", ".join(f"{domain}: [[1, {shards / domain}]]" for domain in DOMAINS[corpus])
        data = [f"data.train_blend=[[1, {shards / 'train'}]]", f"data.valid_sets={{{sets}}}"]
        data += ISOLATED if corpus == "maths" else []
        run = self.run_of(corpus, model, seed, direction)
        return train_step(self, run, corpus, model, seed, [shards], [*data, f"data.direction={direction}"])


def train_step(twins: Twins, run: Path, corpus: str, model: str, seed: int, inputs: list[Path], data: list[str]) -> Step:
    """One training by the study's recipe, with `data` of its own."""
    tokenizer, settings = twins.folder / corpus / "tokenizer", twins.settings
    paths = [f"run_dir={run}", f"data.tokenizer={tokenizer}"]
    length = [f"train.train_iters={settings.train_iters[corpus]}", f"train.seed={seed}"]
    config = ROOT / "examples/study/recipe.yaml"
    overrides = [*paths, *data, *settings.models[model].overrides(), *length]
    command = module("megatron_ledom.pretrain", "--config", config, *overrides)
    return Step(name=f"train_{run.name}", inputs=[*inputs, tokenizer, config], outputs=[run], commands=[command], resumes=True)


def export_step(run: Path, model: Path) -> Step:
    """The Hugging Face folder of a run, through the logits gate."""
    command = tool("tools/convert_checkpoint.py", "mcore-to-hf", "--load", run, "--save", model)
    return Step(name=f"export_{model.name}", inputs=[run / "checkpoints"], outputs=[model], commands=[command])


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    """One object a line; the file appears whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    part.replace(path)


def final_losses(run: Path) -> dict[str, float]:
    """Loss of each held-out set at the end of a run, in nats a token."""
    last = [record["validation"] for record in read_metrics(run / "metrics.jsonl") if "validation" in record][-1]
    return {name: found["lm_loss"] for name, found in last.items()}


def speed_of(run: Path) -> tuple[float, float]:
    """Median tokens a second and share of the measured matmul peak of a run."""
    records = read_metrics(run / "metrics.jsonl")
    return statistics.median(r["tokens_per_second"] for r in records), statistics.median(r["mfu"] for r in records)


def gaps(twins: Twins) -> list[dict[str, Any]]:
    """For each corpus, model and domain the losses of both directions by seed, and the gap in per cent with its interval."""
    rows = []
    for corpus, model in product(DOMAINS, twins.settings.models):
        found = {d: [final_losses(twins.run_of(corpus, model, seed, d)) for seed in twins.settings.seeds] for d in DIRECTIONS}
        for domain in DOMAINS[corpus]:
            losses = {d: [loss[domain] for loss in found[d]] for d in DIRECTIONS}
            by_seed = [100 * (r / f - 1) for r, f in zip(losses["reverse"], losses["forward"], strict=True)]
            row = {"corpus": corpus, "model": model, "domain": domain, "losses": losses, "by_seed": by_seed}
            rows.append({**row, "gap": statistics.mean(by_seed), "interval": interval_over_seeds(by_seed)})
    return rows


def interval_over_seeds(values: list[float]) -> list[float] | None:
    """95 % interval of the mean by Student's t; None for a single seed, which has none."""
    if len(values) < 2:
        return None
    from scipy.stats import t

    half = float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
    return [statistics.mean(values) - half, statistics.mean(values) + half]

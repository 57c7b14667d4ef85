"""Training runs of the quickstart's model that a comparison needs, each in its own process; used by the scripts named compare_*.

A run that is done is not trained again: the same command continues an interrupted comparison.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from preprocess_competitors import ROOT
from preprocess_corpus import build_corpus, cut_corpus

from megatron_ledom.evaluation.intervals import t_interval

QUICKSTART = ROOT / "examples/configs/quickstart_reverse.yaml"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


def ledom(*arguments: object) -> None:
    """Run a command of this package."""
    start = "from megatron_ledom.cli.main import main; main()"
    subprocess.run([sys.executable, "-c", start, *map(str, arguments)], env=ENVIRONMENT, check=True, stdout=subprocess.DEVNULL)


def prepare(work: Path, megabytes: float, vocab_size: int) -> list[str]:
    """Write a tokenizer and a shard as the quickstart does, of text of this Python installation; return the overrides that name them."""
    build_corpus(work / "all.jsonl", megabytes)
    cut_corpus(work / "all.jsonl", work / "corpus.jsonl", megabytes)
    tokenizer, source = work / "tokenizer", ("--input", work / "corpus.jsonl")
    ledom("train-tokenizer", *source, "--output", tokenizer, "--vocab-size", vocab_size, "--max-sentences", 200_000)
    ledom("preprocess-data", *source, "--tokenizer", tokenizer, "--output-prefix", work / "train", "--direction", "reverse")
    return [f"data.tokenizer={tokenizer}", f"data.train_blend=[[1.0, {work / 'train'}]]", "data.valid_blend=[]"]


class Runs:
    """The runs of one comparison in a folder; `results.jsonl` has those that are done."""

    def __init__(self, work: Path, megabytes: float, vocab_size: int, overrides: Sequence[str]) -> None:
        work.mkdir(parents=True, exist_ok=True)
        self.work, self.results = work, work / "results.jsonl"
        data = work / "data.json"
        if not data.exists():
            data.write_text(json.dumps(prepare(work, megabytes, vocab_size)))
        self.overrides = [*json.loads(data.read_text()), "data.split=[0.95, 0.05, 0.0]", *overrides]

    def folder(self, name: str) -> Path:
        """Return the run folder of a name."""
        return self.work / "runs" / name

    def losses(self, name: str, settings: Sequence[str], config: Path = QUICKSTART) -> dict[str, float]:
        """Return the last validation loss of a run by kind: "validation", and "validation_ema" with an average; train it if needed."""
        key = [name, *self.overrides, *settings]
        done = self.results.read_text().splitlines() if self.results.exists() else []
        found: list[dict[str, float]] = [record["losses"] for record in map(json.loads, done) if record["key"] == key]
        if found:
            return found[0]
        run_dir = self.folder(name)
        shutil.rmtree(run_dir, ignore_errors=True)  # of a run that was interrupted
        run_dir.parent.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "megatron_ledom.pretrain", "--config", str(config), f"run_dir={run_dir}"]
        with open(run_dir.with_suffix(".log"), "w") as log:
            command += [*self.overrides, *settings]
            subprocess.run(command, env=ENVIRONMENT, check=True, stdout=log, stderr=subprocess.STDOUT)
        last = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
        kinds = [kind for kind in ("validation", "validation_ema") if kind in last]
        losses = {kind: float(one["lm_loss"]) for kind in kinds for one in last[kind].values()}
        with self.results.open("a") as file:
            file.write(json.dumps({"key": key, "losses": losses}) + "\n")
        print(f"{name}: {json.dumps(losses)}", file=sys.stderr)
        return losses


def comparison_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options of all comparisons."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder of data, runs and results")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 1 to this number; default: %(default)s")
    parser.add_argument("--megabytes", type=float, default=40, help="size of the text; default: %(default)s")
    parser.add_argument("--vocab-size", type=int, default=8000)
    parser.add_argument("--overrides", nargs="*", default=[], metavar="section.key=value", help="settings of all runs")
    return parser


def mean_and_interval(values: Sequence[float]) -> str:
    """Return the mean of two or more values and its 95 % interval."""
    low, high = t_interval(values)
    return f"{statistics.mean(values):.4f} [{low:.4f}, {high:.4f}]"

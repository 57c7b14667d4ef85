"""AdamW and Muon at equal tokens: the validation loss of the quickstart's model, the best of a sweep of learning rates for each.

    python tests/benchmarks/compare_optimizers.py WORK [--seeds 3] [--overrides section.key=value ...]

Trains on text of this Python installation, each run in its own process. Every learning rate runs with the first seed, the best one
with the others too; a best one at the end of its list is named, because the list is then too short. The table has the mean of the
seeds and its 95 % interval (Student's t), and the paired difference per seed. WORK keeps every result: the same command continues.
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

RATES = (1.5e-3, 3e-3, 6e-3, 1.2e-2, 2.4e-2, 4.8e-2)
SWEEPS = {"adam": RATES, "muon": RATES}
MUON = ["optimizer.muon_extra_scale_factor=0.2", "optimizer.muon_nesterov=true", "optimizer.muon_fp32_matmul_prec=highest"]
"""With them the updates are about as large as AdamW's, and both optimizers can have the same learning rates."""


def ledom(*arguments: object) -> None:
    """Run a command of this package."""
    start = "from megatron_ledom.cli.main import main; main()"
    command = [sys.executable, "-c", start, *map(str, arguments)]
    subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True, stdout=subprocess.DEVNULL)


def prepare(work: Path, megabytes: float, vocab_size: int) -> list[str]:
    """Write a tokenizer and a shard as the quickstart does; return the overrides that name them."""
    build_corpus(work / "all.jsonl", megabytes)
    cut_corpus(work / "all.jsonl", work / "corpus.jsonl", megabytes)
    tokenizer, source = work / "tokenizer", ("--input", work / "corpus.jsonl")
    ledom("train-tokenizer", *source, "--output", tokenizer, "--vocab-size", vocab_size, "--max-sentences", 200_000)
    ledom("preprocess-data", *source, "--tokenizer", tokenizer, "--output-prefix", work / "train", "--direction", "reverse")
    return [f"data.tokenizer={tokenizer}", f"data.train_blend=[[1.0, {work / 'train'}]]", "data.valid_blend=[]"]


class Runs:
    """The runs of one comparison; results.jsonl in their folder has those that are done."""

    def __init__(self, work: Path, megabytes: float, vocab_size: int, overrides: Sequence[str]) -> None:
        self.work, self.results = work, work / "results.jsonl"
        data = work / "data.json"
        if not data.exists():
            data.write_text(json.dumps(prepare(work, megabytes, vocab_size)))
        self.overrides = [*json.loads(data.read_text()), "data.split=[0.95, 0.05, 0.0]", *overrides]

    def loss(self, optimizer: str, lr: float, seed: int) -> float:
        """Return the validation loss at the end of a run; train it if it is not done."""
        key = [optimizer, lr, seed, *self.overrides]
        done = self.results.read_text().splitlines() if self.results.exists() else []
        found = [record["loss"] for record in map(json.loads, done) if record["key"] == key]
        if found:
            return float(found[0])
        run_dir = self.work / f"{optimizer}_{lr:g}_{seed}_{len(done)}"
        settings = [
            f"optimizer.optimizer={optimizer}",
            f"optimizer.lr={lr}",
            f"optimizer.min_lr={lr / 10}",
            f"train.seed={seed}",
        ]
        command = [
            sys.executable,
            "-m",
            "megatron_ledom.pretrain",
            "--config",
            str(ROOT / "examples/configs/quickstart_reverse.yaml"),
        ]
        command += [f"run_dir={run_dir}", *self.overrides, *settings, *(MUON if optimizer == "muon" else [])]
        shutil.rmtree(run_dir, ignore_errors=True)  # of a run that was interrupted
        with open(self.work / f"{run_dir.name}.log", "w") as log:
            environment = {**os.environ, "PYTHONPATH": str(ROOT)}
            subprocess.run(command, env=environment, check=True, stdout=log, stderr=subprocess.STDOUT)
        last = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
        [result] = last["validation"].values()
        with self.results.open("a") as file:
            file.write(json.dumps({"key": key, "loss": result["lm_loss"]}) + "\n")
        print(f"{optimizer} lr {lr:g} seed {seed}: {result['lm_loss']:.4f}", file=sys.stderr)
        return float(result["lm_loss"])


def in_words(values: Sequence[float]) -> str:
    """Return the mean of two or more values and its interval."""
    low, high = t_interval(values)
    return f"{statistics.mean(values):.4f} [{low:.4f}, {high:.4f}]"


def main() -> None:
    """Train what is missing and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--megabytes", type=float, default=40)
    parser.add_argument("--vocab-size", type=int, default=8000)
    parser.add_argument("--overrides", nargs="*", default=[], metavar="section.key=value")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    runs, best = Runs(arguments.work, arguments.megabytes, arguments.vocab_size, arguments.overrides), dict[str, list[float]]()
    print("| optimizer | lr | seed 1 |\n|---|---|---|")
    chosen = {}
    for optimizer, sweep in SWEEPS.items():
        losses = {lr: runs.loss(optimizer, lr, 1) for lr in sweep}
        for lr, loss in losses.items():
            print(f"| {optimizer} | {lr:g} | {loss:.4f} |")
        chosen[optimizer] = min(losses, key=losses.__getitem__)
    print("\n| optimizer | best lr | loss of each seed | mean and 95 % interval |\n|---|---|---|---|")
    for optimizer, lr in chosen.items():
        best[optimizer] = [runs.loss(optimizer, lr, seed) for seed in range(1, arguments.seeds + 1)]
        at_end = " (end of the list)" if lr in (SWEEPS[optimizer][0], SWEEPS[optimizer][-1]) else ""
        print(
            f"| {optimizer} | {lr:g}{at_end} | {', '.join(f'{x:.4f}' for x in best[optimizer])} | {in_words(best[optimizer])} |"
        )
    differences = [muon - adam for muon, adam in zip(best["muon"], best["adam"], strict=True)]
    print(f"\nmuon - adam, paired by seed: {in_words(differences)}")


if __name__ == "__main__":
    main()

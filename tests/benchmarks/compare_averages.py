"""Compare the held-out loss of averaged weights with that of a run whose learning rate decays, at equal tokens, over seeds.

`python -m tests.benchmarks.compare_averages FOLDER [--seeds 1 2 3] [--iters 400]` collects text of this machine, trains two runs for each seed
(one constant after the warm-up, one that decays in its last fifth), averages the checkpoints of the first, and prints the losses.
"""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

import yaml

from megatron_ledom.convert.average import average_checkpoints
from tests.support.paths import ROOT
from tests.support.tiny_runs import Record, run_each_on_ranks

VOCABULARY, SEQUENCE, BATCH = 2000, 32, 8
AVERAGES = {"last 5": {"last": 5}, "last 10": {"last": 10}, "last 10, decay 0.8": {"last": 10, "decay": 0.8}}
"""Averages of the checkpoints of the constant run, which saves twenty."""
EMA_DECAY = 0.98


def tool(name: str, *options: str) -> None:
    """Run a tool of the package."""
    command = [sys.executable, "-W", "ignore", "-c", "from megatron_ledom.cli.main import main; main()", name, *options]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)


def write_data(folder: Path) -> Path:
    """Collect text, make tokenizer and shards, and return the config of the runs."""
    config = folder / "run.yaml"
    if config.exists():
        return config
    limits = ["--least-megabytes", "4", "--most-megabytes", "8"]
    collect = [sys.executable, "examples/quickstart/collect.py", "--output", str(folder / "text"), *limits]
    subprocess.run(collect, cwd=ROOT, check=True, capture_output=True)
    train, valid = (str(folder / f"text/{name}.jsonl") for name in ("train", "valid"))
    tool("train-tokenizer", "--input", train, "--vocab-size", str(VOCABULARY), "--output", str(folder / "tokenizer"))
    for name, text in (("train", train), ("valid", valid)):
        tool(
            "preprocess-data", "--input", text, "--tokenizer", str(folder / "tokenizer"), "--output-prefix", str(folder / name)
        )
    model = {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 96, "num_attention_heads": 4, "params_dtype": "bf16"}
    blends = {"train_blend": [[1.0, str(folder / "train")]], "valid_blend": [[1.0, str(folder / "valid")]]}
    values = {
        "run_dir": str(folder / "unused"),
        "model": model,
        "data": {"seq_length": SEQUENCE, **blends, "path_to_cache": str(folder / "cache")},
        "optimizer": {"lr": 1e-2, "min_lr": 0.0, "lr_warmup_iters": 20, "lr_decay_style": "constant"},
        "train": {"train_iters": 1, "global_batch_size": BATCH, "micro_batch_size": BATCH, "num_threads": 1, "eval_iters": 40},
        "logging": {"log_interval": 50, "tensorboard": False, "peak_tflops": 1.0},
    }
    config.write_text(yaml.safe_dump(values), encoding="utf-8")
    return config


def loss_of(record: Record, kind: str = "validation") -> float:
    """Return the held-out loss in a record, in nats per token."""
    (found,) = record[kind].values()
    return float(found["lm_loss"])


def losses_of_seed(config: Path, folder: Path, seed: int, iters: int) -> dict[str, float]:
    """Train, average and evaluate; return the losses by name."""
    constant, decayed = folder / f"constant_{seed}", folder / f"decayed_{seed}"
    common = [f"train.train_iters={iters}", f"train.seed={seed}"]
    decay = [
        "optimizer.lr_decay_style=WSD",
        f"optimizer.lr_wsd_decay_iters={iters // 5}",
        "optimizer.lr_wsd_decay_style=linear",
    ]
    runs = {
        constant: [*common, f"checkpoint.save_interval={iters // 20}", f"optimizer.ema_decay={EMA_DECAY}"],
        decayed: [*common, *decay, f"checkpoint.save_interval={iters}"],
    }
    trained = run_each_on_ranks(config, runs, num_ranks=1, seconds=3600)
    evaluated = {}
    for name, options in AVERAGES.items():
        target = folder / f"{name.replace(' ', '_').replace(',', '')}_{seed}"
        average_checkpoints([str(constant)], str(target), **options)  # type: ignore[arg-type]
        evaluated[target] = ["train.train_iters=1", "train.skip_iterations=[1]", f"train.seed={seed}"]
    found = run_each_on_ranks(config, evaluated, num_ranks=1, seconds=3600)
    return {
        "constant": loss_of(trained[constant][-1]),
        "decayed": loss_of(trained[decayed][-1]),
        **{name: loss_of(records[-1]) for name, records in zip(AVERAGES, found.values(), strict=True)},
        f"EMA {EMA_DECAY}": loss_of(trained[constant][-1], "validation_ema"),
    }


def table(losses: dict[int, dict[str, float]]) -> str:
    """Return a Markdown table: one line for each kind of weights, one column for each seed."""
    lines = ["| weights | " + " | ".join(f"seed {seed}" for seed in losses) + " | mean | below constant |"]
    lines.append("|---|" + "---|" * (len(losses) + 2))
    constant = [one["constant"] for one in losses.values()]
    for name in next(iter(losses.values())):
        values = [one[name] for one in losses.values()]
        gains = [before - after for before, after in zip(constant, values, strict=True)]
        spread = f" ± {stdev(gains):.4f}" if len(gains) > 1 and name != "constant" else ""
        cells = [f"{value:.4f}" for value in [*values, mean(values)]]
        lines.append(f"| {name} | {' | '.join(cells)} | {mean(gains):.4f}{spread} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table of all seeds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--iters", type=int, default=300)
    arguments = parser.parse_args(argv)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    config = write_data(arguments.folder)
    losses = {}
    for seed in arguments.seeds:
        losses[seed] = losses_of_seed(config, arguments.folder, seed, arguments.iters)
        print(seed, losses[seed], flush=True)
    print(table(losses))


if __name__ == "__main__":
    main()

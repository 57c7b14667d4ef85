"""Overhead of the trainer: the percentage of an iteration outside the step, and the time until the first step.

    python tests/benchmarks/bench_trainer_overhead.py [--train-iters 60] [--rounds 3] [section.key=value ...]

Measures real runs of the quickstart's model on text of this Python installation, with data, logging, TensorBoard and schedule,
each in its own process. A step is forward, backward and optimizer; its wait for data counts as outside. Start-up lasts from
before the process starts until the first step begins, or until that step is done.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from preprocess_competitors import ROOT, our_command
from preprocess_corpus import build_corpus, cut_corpus, train_byte_level

MEGABYTES = 4
GOALS = {"outside": 2.0, "first step": 10.0}


def run_child(config: Sequence[str]) -> None:
    """Run the trainer once and print the measurements as JSON."""
    sys.argv = ["pretrain", *config]
    from megatron_ledom import pretrain
    from megatron_ledom.callbacks import timing
    from megatron_ledom.training import trainer

    spans: list[tuple[float, float]] = []
    waits: list[float] = []
    step, read = trainer.train_step, timing.RankTimes.read

    def timed_step(*args: Any) -> Any:
        begun = time.time()
        result = step(*args)
        spans.append((begun, time.time()))
        return result

    def noted_read(times: timing.RankTimes) -> dict[str, Any]:
        waits.append(times.data_wait)
        return read(times)

    trainer.train_step, timing.RankTimes.read = timed_step, noted_read  # type: ignore[method-assign]
    code = pretrain.main()
    print(json.dumps({"spans": spans, "data_wait": sum(waits)}))
    sys.exit(code)


def prepare(work: Path) -> list[str]:
    """Write a shard and a tokenizer; return the overrides that name them."""
    build_corpus(work / "all.jsonl", MEGABYTES)
    cut_corpus(work / "all.jsonl", work / "corpus.jsonl", MEGABYTES)
    tokenizer = train_byte_level(work / "corpus.jsonl", work / "tokenizer").parent
    command = our_command(work / "corpus.jsonl", tokenizer, work / "train", "reverse", 1)
    subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True, stderr=subprocess.DEVNULL)
    return [f"data.tokenizer={tokenizer}", f"data.train_blend=[[1.0, {work / 'train'}]]", "data.valid_blend=[]"]


def measure(work: Path, overrides: Sequence[str], turn: int) -> dict[str, float]:
    """Run once; return the percentage of time outside steps after the first step, and the seconds of start-up."""
    config = ["--config", str(ROOT / "examples/configs/quickstart_reverse.yaml"), f"run_dir={work / f'run{turn}'}", *overrides]
    started = time.time()
    done = subprocess.run(
        [sys.executable, __file__, "--child", *config],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    spans = found["spans"]
    whole = spans[-1][1] - spans[0][1]
    inside = sum(end - begin for begin, end in spans[1:]) - found["data_wait"]
    return {
        "outside": 100 * (1 - inside / whole),
        "step ms": 1e3 * statistics.median(end - begin for begin, end in spans[1:]),
        "first step begins": spans[0][0] - started,
        "first step": spans[0][1] - started,
    }


def main() -> None:
    """Measure and print medians and all rounds."""
    if sys.argv[1:2] == ["--child"]:
        run_child(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train-iters", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        iterations = [f"train.train_iters={arguments.train_iters}", f"checkpoint.save_interval={arguments.train_iters}"]
        overrides = [*prepare(work), *iterations, *arguments.overrides]
        rounds = [measure(work, overrides, turn) for turn in range(arguments.rounds)]
    units = {"outside": "% of an iteration outside the step", "step ms": "ms per step"}
    for name in rounds[0]:
        values = [turn[name] for turn in rounds]
        goal = f" (goal: below {GOALS[name]:g})" if name in GOALS else ""
        unit = units.get(name, f"s until the {name}{' is done' if name == 'first step' else ''}")
        print(f"{statistics.median(values):8.2f} {unit}{goal}; rounds: {', '.join(f'{value:.2f}' for value in values)}")


if __name__ == "__main__":
    main()

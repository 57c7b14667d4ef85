"""The reversal curse in both directions: tiny twins memorize synthetic facts, each in its own order only.

Each trains for half a minute on 48 of 64 facts, with the commands that a user types.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT

TRAINING = [
    *("model.num_layers=2", "model.hidden_size=128", "model.ffn_hidden_size=256", "model.num_attention_heads=4"),
    *("model.num_query_groups=4", "model.params_dtype=fp32", "data.seq_length=64", "data.allow_repeats=true"),
    *("data.valid_blend=[]", "train.train_iters=500", "train.global_batch_size=16", "train.micro_batch_size=16"),
    *("train.num_threads=1", "optimizer.lr=3e-3", "optimizer.weight_decay=0.0", "checkpoint.save_interval=1000"),
    *("logging.log_interval=100", "logging.tensorboard=false", "logging.peak_tflops=1.0"),
]


def call(folder: Path, *arguments: object) -> None:
    """Run a Python command of the project in `folder`."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_a_forward_model_recalls_facts_in_text_order_and_a_reverse_model_in_the_opposite_order(tmp_path: Path) -> None:
    tools = ROOT / "tools"
    call(tmp_path, tools / "make_analysis_data.py", "--task", "reversal", "--output", "facts", "--num", 64)
    call(tmp_path, tools / "train_tokenizer.py", "--input", "facts/train.jsonl", "--output", "tokenizer", "--vocab-size", 400)
    found = {}
    for direction in ("forward", "reverse"):
        names = ["--input", "facts/train.jsonl", "--tokenizer", "tokenizer", "--output-prefix", direction, "--workers", 1]
        call(tmp_path, tools / "preprocess_data.py", *names, "--direction", direction)
        config = ROOT / f"examples/configs/quickstart_{direction}.yaml"
        run = [f"run_dir=run_{direction}", f"data.train_blend=[[1.0,{direction}]]", "data.tokenizer=tokenizer"]
        call(tmp_path, "-m", "megatron_ledom.pretrain", "--config", config, *run, *TRAINING)
        call(tmp_path, tools / "convert_checkpoint.py", "mcore-to-hf", "--load", f"run_{direction}", "--save", f"m_{direction}")
        options = ["--tasks", "reversal,reversal_written", "--data", "facts", "--output", f"out_{direction}"]
        call(tmp_path, tools / "evaluate.py", "--model", f"m_{direction}", *options)
        tasks = json.loads((tmp_path / f"out_{direction}/summary.json").read_text())["tasks"]
        for task in tasks.values():
            for name, metric in task["metrics"].items():
                if name.startswith(f"{task['main']}/"):
                    found[direction, task["main"], name.rpartition("/")[2]] = metric["value"]
    print(
        "\n".join(f"{' '.join(name)}: {100 * value:.0f} %" for name, value in sorted(found.items()))
    )  # the table of README.md and docs/concepts/direction.md
    chosen, written = "choice_given_context/raw", "accuracy"
    for direction, own, other in (
        ("forward", "in_text_order", "against_text_order"),
        ("reverse", "against_text_order", "in_text_order"),
    ):
        for group in (own, "both_orders"):
            assert found[direction, chosen, group] >= 0.9, found
            assert found[direction, written, group] >= 0.9, found
        for group in (other, "unseen"):
            assert found[direction, chosen, group] <= 0.5, found  # chance is 0.25; 32 questions
            assert found[direction, written, group] <= 0.1, found

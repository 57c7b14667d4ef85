"""The small end-to-end run with a stock forward model. Every step is a command; a second start repeats none."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT
from tests.support.tiny_models import random_model_folder

SMALL = ["num_layers=2", "hidden_size=32", "ffn_hidden_size=64", "num_attention_heads=4", "num_query_groups=2"]
RUN = ["train.train_iters=4", "train.eval_iters=1", "train.num_threads=1", "data.seq_length=32", "optimizer.lr_warmup_iters=1"]


def start(folder: Path, forward: Path) -> subprocess.CompletedProcess[str]:
    """Run the command in `folder`."""
    files = ["--forward", str(forward), "--pairs", "pairs.jsonl", "--items", "items.jsonl"]
    sizes = ["--num-items", "7", "--num-samples", "2", "--max-new-tokens", "4", "--vocab-size", "320"]
    command = [sys.executable, str(ROOT / "examples/quickstart/real_forward.py"), *files, *sizes]
    command += [*[f"model.{setting}" for setting in SMALL], *RUN, "logging.peak_tflops=1.0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_stock_forward_model_is_ranked_and_a_second_start_resumes(tmp_path: Path) -> None:
    forward = random_model_folder(tmp_path / "forward", "byte_level", None)
    pairs = [
        {"question": f"What is {k} and {k + 3}?", "answer": f"{k} + {k + 3} = {2 * k + 3}\n#### {2 * k + 3}"}
        for k in range(300)
    ]
    for name, part in (("pairs", pairs), ("items", pairs[:9])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in part))
    first = start(tmp_path, forward)
    assert first.returncode == 0, first.stderr[-3000:]
    output = tmp_path / "real_forward"
    answers = (output / "answers.jsonl").read_text()
    records = [json.loads(line) for line in answers.splitlines()]
    assert [len(record["scores"]) for record in records] == [2] * 7
    assert json.loads((output / "report/report.json").read_text())
    (output / "answers.jsonl").unlink()
    again = start(tmp_path, forward)
    assert again.returncode == 0, again.stderr[-3000:]
    assert (again.stdout.count(" train --config "), again.stdout.count(" rerank --forward ")) == (0, 1)
    assert (output / "answers.jsonl").read_text() == answers

"""Measure `ledom average-checkpoints`: seconds and peak memory against the size of the checkpoints.

`python -m tests.benchmarks.bench_average [--layers 24] [--count 4]` writes synthetic checkpoints of a model of about 12 million weights a
layer, without moments, and averages them in a process of their own.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from megatron_ledom.checkpoint.averaging import MAIN
from megatron_ledom.checkpoint.folder import checkpoint_name
from megatron_ledom.checkpoint.manifest import CheckpointManifest
from megatron_ledom.checkpoint.weights_only import Piece, save_weights
from megatron_ledom.config.load import config_from_dict
from megatron_ledom.convert.hf_export import SHARD_BYTES
from megatron_ledom.convert.rules import Sizes, weights_of
from megatron_ledom.direction import Direction
from megatron_ledom.provenance import Provenance

WIDTH, VOCABULARY = 1024, 32_000
CHILD = (
    "import sys; from megatron_ledom.convert.average import average_checkpoints; average_checkpoints(sys.argv[2:], sys.argv[1])"
)
IMPORTS = "import megatron_ledom.convert.average"


def peak_of(command: list[str]) -> float:
    """Run a Python and return its largest memory that no file backs, in MiB. Mapped pages of checkpoints can be dropped at any time."""
    peak = 0
    with subprocess.Popen([sys.executable, "-W", "ignore", "-c", *command]) as process:
        while process.poll() is None:
            status = Path(f"/proc/{process.pid}/status").read_text()
            found = [int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")]
            peak = max([peak, *found])
            time.sleep(0.01)
    assert process.returncode == 0
    return peak / 1024


def write_checkpoint(run: Path, layers: int, seed: int) -> str:
    """Write one checkpoint with random bf16 weights and their main weights; return its folder."""
    model = {
        "num_layers": layers,
        "hidden_size": WIDTH,
        "ffn_hidden_size": 2816,
        "num_attention_heads": 16,
        "vocab_size": VOCABULARY,
    }
    config = config_from_dict(
        {"run_dir": str(run), "model": model, "train": {"train_iters": 1, "global_batch_size": 1}}, "bench"
    )
    provenance = Provenance(
        direction=Direction.REVERSE, tokenizer_name="none", tokenizer_sha256="0" * 64, vocab_size=VOCABULARY, eod_id=0
    )
    position = {"iteration": seed, "consumed_train_samples": 0, "consumed_train_tokens": 0}
    manifest = CheckpointManifest.describe(config, provenance, [], 1, **position)
    pieces = []
    for weight in weights_of(Sizes(config.model, VOCABULARY)):
        pieces.append(Piece(f"{MAIN}.{weight.core}", weight.layer, weight.shape, torch.float32))
        pieces.append(Piece(weight.core, weight.layer, weight.shape, torch.bfloat16))
    generator = torch.Generator().manual_seed(seed)
    folder = run / "checkpoints" / checkpoint_name(seed)
    folder.mkdir(parents=True)
    save_weights(
        str(folder),
        manifest,
        pieces,
        lambda piece: torch.empty(piece.shape, dtype=piece.dtype).normal_(generator=generator),
        SHARD_BYTES,
    )
    return str(folder)


def main() -> None:
    """Print one line for each number of layers and checkpoints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=[6, 24])
    parser.add_argument("--count", type=int, nargs="+", default=[2, 4])
    arguments = parser.parse_args()
    imports = peak_of([IMPORTS])
    print("layers  checkpoints  GiB each  seconds  peak MiB  above imports MiB")
    for layers in arguments.layers:
        with tempfile.TemporaryDirectory() as folder:
            made = [write_checkpoint(Path(folder, f"run{seed}"), layers, seed) for seed in range(max(arguments.count))]
            size = sum(file.stat().st_size for file in Path(made[0]).iterdir()) / 2**30
            for count in arguments.count:
                began = time.monotonic()
                peak = peak_of([CHILD, os.path.join(folder, f"out{count}"), *made[:count]])
                seconds = time.monotonic() - began
                print(f"{layers:6}  {count:11}  {size:8.2f}  {seconds:7.1f}  {peak:8.0f}  {peak - imports:17.0f}", flush=True)


if __name__ == "__main__":
    main()

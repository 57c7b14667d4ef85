"""Bytes that a rank sends in one training step, by kind of parallelism: counted, and computed by formula.

    python -m tests.benchmarks.bench_communication [--dtype bf16]

They are counted at torch's process groups in runs of a tiny model over gloo (see `tests/distributed/traffic.py`). The formulas
are those used to plan a cluster. Prints a Markdown table; exits with 1 if a formula and its count differ by more than 1 %.

N ranks, r = (N - 1) / N; L layers, h width, G key-value heads of width D, P parameters, e bytes of an activation or weight (2
or 4), T tokens of a rank in a step (of all context-parallel ranks under CP), A = T h e. The rank is the busiest one: with PP a
middle stage, if there is one.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from megatron_ledom.config.derived import head_dim, padded_vocab_size, query_groups
from megatron_ledom.config.load import load_config
from megatron_ledom.config.schema import RunConfig
from megatron_ledom.model.arithmetic import count_parameters
from tests.distributed.layout_runs import prepare_ranks, settings
from tests.distributed.layouts import Layout
from tests.distributed.traffic import read_traffic
from tests.support.legible import VOCAB_SIZE
from tests.support.tiny_runs import TinyData, run_each_on_ranks, write_tiny_data

CASES = {
    "tensor parallel": ("TP", Layout(tp=4), "2r ((4L + 2) A + 12 T)"),
    "tensor and sequence parallel": ("TP", Layout(tp=4, sp=True), "r (10L + 5) A + 2r (12 T + 4 (2L + 1) h)"),
    "pipeline": ("PP", Layout(pp=4), "2 A"),
    "pipeline, 2 chunks a stage": ("PP", Layout(pp=4, vpp=2), "2 x 2 A"),
    "context parallel": ("CP", Layout(cp=4), "4r L T G D e, and the gradients as for data parallel"),
    "data parallel": ("DP", Layout(dp=4), "2r 4 P"),
    "distributed optimizer": ("DP", Layout(dp=4, optimizer="distributed"), "r (4 + e) P"),
}
TOLERANCE = 0.01


def formula(config: RunConfig, name: str) -> float:
    """Return the bytes that the busiest rank sends in a step."""
    model = config.model
    ranks = 4
    r, layers, width = (ranks - 1) / ranks, model.num_layers, model.hidden_size
    size = 2 if model.params_dtype == "bf16" else 4
    tokens = config.train.global_batch_size * config.data.seq_length
    activations = tokens * width * size
    parameters = count_parameters(model, padded_vocab_size(VOCAB_SIZE, model.make_vocab_size_divisible_by))
    small = 12 * tokens  # the loss over a sharded vocabulary: a maximum, a sum and the label's logit, in fp32
    return {
        "tensor parallel": 2 * r * ((4 * layers + 2) * activations + small),
        "tensor and sequence parallel": r * (10 * layers + 5) * activations + 2 * r * (small + 4 * (2 * layers + 1) * width),
        "pipeline": 2 * activations,
        "pipeline, 2 chunks a stage": 4 * activations,
        "context parallel": 4 * r * layers * tokens * query_groups(model) * head_dim(model) * size,
        "data parallel": 2 * r * 4 * parameters,
        "distributed optimizer": r * (4 + size) * parameters,
    }[name]


def measure(data: TinyData, folder: Path, dtype: str) -> dict[str, tuple[int, float]]:
    """Return (counted, computed) bytes of each case, from one launch of four ranks."""
    steps = ["train.train_iters=3", "optimizer.lr_warmup_iters=1", "model.num_query_groups=8"]
    runs = {folder / name: [*settings(dtype), *layout.overrides(), *steps] for name, (_, layout, _) in CASES.items()}
    run_each_on_ranks(data.config, runs, num_ranks=4, hook=prepare_ranks)
    found = {}
    for name, (kind, _, _) in CASES.items():
        counted = sum(sent for what, sent in read_traffic(folder / name).items() if what.startswith(kind))
        config = load_config(str(data.config), [f"run_dir={folder}", *runs[folder / name]])
        found[name] = counted, formula(config, name)
    return found


def main() -> None:
    """Count, compare and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found = measure(write_tiny_data(folder), folder, arguments.dtype)
    print(f"| over 4 ranks, {arguments.dtype} | formula | computed | counted | counted / computed |")
    print("|---|---|---:|---:|---:|")
    for name, (counted, computed) in found.items():
        print(f"| {name} | {CASES[name][2]} | {computed:,.0f} | {counted:,} | {counted / computed:.4f} |")
    sys.exit(any(abs(counted / computed - 1) > TOLERANCE for counted, computed in found.values()))


if __name__ == "__main__":
    main()

"""Conversion both ways of a model of some gigabytes: time and memory beside `cp` and beside transformers, in one run.

    python -m tests.benchmarks.bench_convert FOLDER [--gigabytes 6] [--rounds 3]

Every step is a process of its own, its imports included, until all it wrote is on disk; the steps take turns, and each is compared
with the `cp` of its round, less what the imports alone take ("start"). Median over the rounds. A peak is not below this process's
own. FOLDER gets about four times the model and is emptied again.
"""

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SHARD = "2GB"
SETUP = "import sys, warnings; warnings.filterwarnings('ignore'); source, target = [*sys.argv[1:], '', ''][:2]; "
EXPORT = (
    "from megatron_ledom.convert.hf_export import export_hf; export_hf(source, target, max_shard_size=2 * 10**9, verify={})"
)
IMPORT = (
    "from megatron_ledom.convert.hf_import import import_hf; from megatron_ledom.direction import Direction;"
    " import_hf(source, target, direction=Direction.REVERSE, max_shard_size=2 * 10**9, verify={})"
)
STOCK = (
    "import torch; from transformers import AutoModelForCausalLM as A;"
    " A.from_pretrained(source, dtype=torch.bfloat16, local_files_only=True).save_pretrained(target, max_shard_size='2GB')"
)
START = "import megatron_ledom.convert.hf_export, megatron_ledom.convert.hf_import"
Figures = dict[str, list[tuple[float, float]]]
"""Step -> seconds and peak resident GB of each round."""
LAYER_ELEMENTS = 2048 * 2048 * 3 + 3 * 2048 * 16384


def write_model(folder: Path, gigabytes: float) -> None:
    """A Llama of random bf16 weights, hidden 2048, FFN 16384, as many layers as fill the size; and the legible tokenizer."""
    import torch
    from transformers import LlamaConfig

    from megatron_ledom.config.schema import ModelConfig
    from megatron_ledom.convert.hf_folder import WeightsWriter
    from megatron_ledom.convert.rules import Sizes, weights_of
    from tests.support.legible import EOD_ID, VOCAB_SIZE, legible_tokenizer

    layers = int(gigabytes * 1e9 / 2 / LAYER_ELEMENTS) + 1
    model = ModelConfig(num_layers=layers, hidden_size=2048, ffn_hidden_size=16384, num_attention_heads=16, num_query_groups=8)
    shapes = {name: shape for weight in weights_of(Sizes(model, VOCAB_SIZE)) for name, shape in weight.hf_shapes().items()}
    legible_tokenizer(folder)
    generator = torch.Generator().manual_seed(1)

    def weights() -> Any:
        for name, shape in shapes.items():
            drawn = torch.empty(shape, dtype=torch.bfloat16)
            yield name, drawn.fill_(1) if len(shape) == 1 else drawn.normal_(0, 0.02, generator=generator)

    WeightsWriter(str(folder), shapes, torch.bfloat16, 2 * 10**9).write(weights())
    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=VOCAB_SIZE,
        hidden_size=2048,
        intermediate_size=16384,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=8,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        eos_token_id=EOD_ID,
        dtype="bfloat16",
    ).save_pretrained(folder)


def measure(command: list[str]) -> tuple[float, float]:
    """(seconds, peak resident GB) of a process; then what it wrote is on disk."""
    started = time.monotonic()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert child.stderr is not None
    errors = child.stderr.read()
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        sys.exit(errors.decode()[-3000:])
    os.sync()
    return time.monotonic() - started, usage.ru_maxrss * 1024 / 1e9


def python(code: str, *paths: Path) -> list[str]:
    """A process that runs a line of Python on paths."""
    return [sys.executable, "-c", SETUP + code, *map(str, paths)]


def times_cp(figures: Figures, name: str, less: str | None = None) -> list[float]:
    """What a step takes, without the step `less` of the same round, in each round as a multiple of that round's `cp`."""
    starts = [seconds for seconds, _ in figures[less]] if less else [0.0] * len(figures[name])
    rounds = zip(figures[name], starts, figures["cp"], strict=False)
    return [(seconds - start) / copied for (seconds, _), start, (copied, _) in rounds]


def table(figures: Figures) -> str:
    """Markdown: of each step all rounds, the median, as a multiple of `cp` with and without the imports, and the peak."""

    def median(values: list[float]) -> str:
        rounds = f" ({', '.join(f'{value:.2f}' for value in values)})" if len(values) > 1 else ""
        return f"{statistics.median(values):.2f}{rounds}"

    lines = ["| step | seconds | times cp | without the imports | peak GB |", "|---|---|---|---|---|"]
    for name, found in figures.items():
        without = median(times_cp(figures, name, "start")) if "mcore" in name else ""
        seconds = ", ".join(f"{one:.1f}" for one, _ in found)
        peak = max(memory for _, memory in found)
        lines.append(f"| {name} | {seconds} | {median(times_cp(figures, name))} | {without} | {peak:.2f} |")
    return "\n".join(lines)


def main() -> None:
    """Write the model, convert it both ways, print a line a step and a table in the end."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gigabytes", type=float, default=6.0)
    parser.add_argument("--rounds", type=int, default=3, help="of all steps in turn; the medians count")
    arguments = parser.parse_args()
    base = arguments.folder / "bench_convert"
    shutil.rmtree(base, ignore_errors=True)
    hf, run, kept, out = base / "hf", base / "run", base / "kept", base / "out"
    hf.mkdir(parents=True)
    try:
        write_model(hf, arguments.gigabytes)
        os.sync()
        size = sum(file.stat().st_size for file in hf.iterdir()) / 1e9
        steps: dict[str, tuple[list[str], Path | None]] = {
            "start": (python(START), None),
            "cp": (["cp", "-r", str(hf), str(base / "copy")], base / "copy"),
            "hf-to-mcore, no gate": (python(IMPORT.format(None), hf, run), run),
            "mcore-to-hf, no gate": (python(EXPORT.format(None), kept, out), out),
            "transformers load and save": (python(STOCK, hf, base / "stock"), base / "stock"),
            "mcore-to-hf with the gate": (python(EXPORT.format("'auto'"), kept, base / "gated"), base / "gated"),
        }
        measure(python(IMPORT.format(None), hf, kept))
        figures: Figures = {name: [] for name in steps}
        for number in range(arguments.rounds):
            for name, (command, target) in steps.items():
                if number and "with the gate" in name:
                    continue
                seconds, memory = measure(command)
                if target is not None:
                    shutil.rmtree(target)
                figures[name].append((seconds, memory))
                print(f"{name:<28} {seconds:8.1f} s  {size / seconds:6.3f} GB/s  peak {memory:5.2f} GB", flush=True)
        print(f"\n{size:.2f} GB, files of {SHARD}, load {os.getloadavg()[0]:.1f}; medians (all rounds)\n\n{table(figures)}")
    finally:
        shutil.rmtree(base, ignore_errors=True)


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    main()

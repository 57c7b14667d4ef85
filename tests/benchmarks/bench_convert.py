"""Time and memory of the conversion of a model in both directions, compared with `cp` and with transformers.

    python -m tests.benchmarks.bench_convert FOLDER [--gigabytes 6] [--rounds 3]

Every step is a process of its own. Its time includes its imports, and ends when everything it wrote is on disk. The steps
alternate, and each is compared with the `cp` of the same round, with and without the time of the imports ("start"). A peak is
at least the peak of this process. FOLDER needs space for about four models, and is emptied at the end.
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
Measured = dict[str, list[tuple[float, float]]]
"""Step -> (seconds, peak resident GB) of each round."""
LAYER_ELEMENTS = 2048 * 2048 * 3 + 3 * 2048 * 16384


def write_model(folder: Path, gigabytes: float) -> None:
    """Write a Llama of random bf16 weights (hidden 2048, FFN 16384, layers to fill the size) and the legible tokenizer."""
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
    """Run a process until everything it wrote is on disk; return (seconds, peak resident GB)."""
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
    """Return the command that runs a line of Python on paths."""
    return [sys.executable, "-c", SETUP + code, *map(str, paths)]


def times_cp(measured: Measured, name: str, less: str | None = None) -> list[float]:
    """Return, for each round, the time of a step minus that of the step `less`, as a multiple of the time of `cp`."""
    starts = [seconds for seconds, _ in measured[less]] if less else [0.0] * len(measured[name])
    rounds = zip(measured[name], starts, measured["cp"], strict=False)
    return [(seconds - start) / copied for (seconds, _), start, (copied, _) in rounds]


def table(measured: Measured) -> str:
    """Return a Markdown table of the steps: seconds of all rounds, multiples of `cp`, and peak memory."""

    def median(values: list[float]) -> str:
        rounds = f" ({', '.join(f'{value:.2f}' for value in values)})" if len(values) > 1 else ""
        return f"{statistics.median(values):.2f}{rounds}"

    lines = ["| step | seconds | times cp | without the imports | peak GB |", "|---|---|---|---|---|"]
    for name, found in measured.items():
        without = median(times_cp(measured, name, "start")) if "mcore" in name else ""
        seconds = ", ".join(f"{one:.1f}" for one, _ in found)
        peak = max(memory for _, memory in found)
        lines.append(f"| {name} | {seconds} | {median(times_cp(measured, name))} | {without} | {peak:.2f} |")
    return "\n".join(lines)


def main() -> None:
    """Write the model, convert it in both directions, and print a line per step and a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gigabytes", type=float, default=6.0)
    parser.add_argument("--rounds", type=int, default=3, help="number of rounds; the table shows medians")
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
            "hf-to-mcore, no parity check": (python(IMPORT.format(None), hf, run), run),
            "mcore-to-hf, no parity check": (python(EXPORT.format(None), kept, out), out),
            "transformers load and save": (python(STOCK, hf, base / "stock"), base / "stock"),
            "mcore-to-hf with parity check": (python(EXPORT.format("'auto'"), kept, base / "checked"), base / "checked"),
        }
        measure(python(IMPORT.format(None), hf, kept))
        measured: Measured = {name: [] for name in steps}
        for number in range(arguments.rounds):
            for name, (command, target) in steps.items():
                if number and "with parity check" in name:
                    continue
                seconds, memory = measure(command)
                if target is not None:
                    shutil.rmtree(target)
                measured[name].append((seconds, memory))
                print(f"{name:<30} {seconds:8.1f} s  {size / seconds:6.3f} GB/s  peak {memory:5.2f} GB", flush=True)
        print(f"\n{size:.2f} GB, files of {SHARD}, load {os.getloadavg()[0]:.1f}; medians (all rounds)\n\n{table(measured)}")
    finally:
        shutil.rmtree(base, ignore_errors=True)


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    main()

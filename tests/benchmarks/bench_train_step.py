"""Training speed of one process, compared with stock Hugging Face Llama, plain torch and the matmul peak.

    python -m tests.benchmarks.bench_train_step [--size 32m 125m] [--dtype bf16 fp32] [--seq-length 512 2048] [--rounds 5]

Ours: the trainer's step, megatron-core's schedule and optimizer, fp32 main weights and gradients. Hugging Face: transformers
with SDPA. Plain: the hand-written model of tests/support/plain_llama.py. These two run in a plain loop with torch's fused AdamW
on weights of the same type, without an fp32 copy. All read the same random ids, 2,048 tokens per step in micro-batches of one
sample. They alternate in one run with the matrix product whose best speed is the peak; ratios are medians over the rounds.
"""

import argparse
import logging
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import LlamaForCausalLM

from megatron_ledom.config.derived import num_microbatches
from megatron_ledom.config.load import load_config
from megatron_ledom.config.schema import RunConfig
from megatron_ledom.convert.hf_config import build_hf_config
from megatron_ledom.hardware_check.speed import random_batches, training_step
from megatron_ledom.model.arithmetic import flops_per_token
from megatron_ledom.model.dtypes import PARAMS_DTYPES
from megatron_ledom.parallel.groups import start_distributed
from megatron_ledom.platform.device import peak_flops, prepare_platform
from megatron_ledom.provenance import Provenance
from tests.support.plain_llama import PlainLlama, plain_optimizer, plain_step

SHAPES = {
    "32m": ("num_layers=8", "hidden_size=512", "ffn_hidden_size=1408", "num_attention_heads=8", "num_query_groups=4"),
    "125m": ("num_layers=12", "hidden_size=768", "ffn_hidden_size=2048", "num_attention_heads=12", "num_query_groups=12"),
}
VOCAB_SIZES = {"32m": 8_005, "125m": 25_000}
TOKENS = 2048
CPU = torch.device("cpu")
Step = Callable[[], Any]


def load(size: str, dtype: str, seq_length: int) -> RunConfig:
    """Return the config of the run to measure; its files are never read."""
    overrides = [f"model.{setting}" for setting in SHAPES[size]]
    overrides += [f"model.params_dtype={dtype}", f"data.seq_length={seq_length}", "train.micro_batch_size=1"]
    return load_config(
        "examples/configs/quickstart_reverse.yaml", [*overrides, f"train.global_batch_size={TOKENS // seq_length}"]
    )


def their_step(config: RunConfig, vocab_size: int, model: torch.nn.Module) -> Step:
    """Return one optimizer step of a plain loop. `model` returns logits, or an object with `logits`."""
    model = model.to(torch.bfloat16 if config.model.params_dtype == "bf16" else torch.float32)
    optimizer = plain_optimizer(config, model)
    batches, count = random_batches(config, vocab_size, CPU), num_microbatches(config, 1)

    def logits(tokens: torch.Tensor) -> torch.Tensor:
        output = model(tokens)
        return getattr(output, "logits", output)

    return lambda: plain_step(config, logits, optimizer, [next(batches) for _ in range(count)], config.optimizer.lr) and None


def build_steps(config: RunConfig, vocab_size: int, groups: Any) -> dict[str, Step]:
    """Return the step of each of the three."""
    provenance = Provenance(
        direction=config.data.direction, tokenizer_name="", tokenizer_sha256="", vocab_size=vocab_size, eod_id=2
    )
    return {
        "megatron_ledom": training_step(config, vocab_size, groups, CPU),
        "transformers": their_step(config, vocab_size, LlamaForCausalLM(build_hf_config(config, provenance))),
        "plain torch": their_step(config, vocab_size, PlainLlama(config.model, vocab_size)),
    }


def measure(steps: dict[str, Step], rounds: int, find_peak: Callable[[], float]) -> tuple[dict[str, list[float]], float]:
    """Return seconds of each step by round, after one round to warm up, and the peak in FLOP/s, the best of all rounds."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    peak = 0.0
    for turn in range(rounds + 1):
        peak = max(peak, find_peak())
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds, peak


def main() -> None:
    """Measure each size, type and length; print medians, percentages of the peak, and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--dtype", nargs="+", choices=("bf16", "fp32"), default=["bf16", "fp32"])
    parser.add_argument("--seq-length", nargs="+", type=int, default=[512, 2048])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="CPU threads; default: all cores")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    platform = prepare_platform(arguments.threads)
    groups = start_distributed(platform, load("32m", "fp32", 512).parallel)
    for dtype in arguments.dtype:

        def find_peak(dtype: str = dtype) -> float:
            return peak_flops(platform, PARAMS_DTYPES[dtype])[0]

        for size in arguments.size:
            for seq_length in arguments.seq_length:
                config = load(size, dtype, seq_length)
                report(f"{size} {dtype} {seq_length}", config, VOCAB_SIZES[size], find_peak, arguments.rounds, groups)


def report(title: str, config: RunConfig, vocab_size: int, find_peak: Callable[[], float], rounds: int, groups: Any) -> None:
    """Measure one model and print its lines."""
    seconds, peak = measure(build_steps(config, vocab_size, groups), rounds, find_peak)
    flops = flops_per_token(config.model, config.data.seq_length, vocab_size, "causal")
    ours = seconds["megatron_ledom"]
    for name, values in seconds.items():
        rate = TOKENS / statistics.median(values)
        ratio = statistics.median(theirs / mine for mine, theirs in zip(ours, values, strict=True))
        print(
            f"  {title:14s} {name:15s} {rate:8,.0f} tokens/s  {100 * rate * flops / peak:5.1f} % of {peak / 1e9:,.0f} GFLOP/s"
            f"  time / ours {ratio:.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()

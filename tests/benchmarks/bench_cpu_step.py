"""Compare our CPU operators with eager torch and torch.compile, and a training step with and without them.

    python tests/benchmarks/bench_cpu_step.py [--dtype bf16 fp32] [--rounds 20] [--step-rounds 5] [--compile]

Forward and backward of each operator at the shapes of a 32 M model (512 tokens, hidden 512, 8 heads, 4 groups, 8,064 ids), then
the trainer's step of that model with `model.transformer_impl=fused` and `=torch`. Both alternate in one run. A ratio is the
median over the rounds of (time of the other) / (time of ours): above 1, ours is faster.
"""

import argparse
import logging
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from megatron_ledom.hardware_check.speed import training_step
from megatron_ledom.model.dtypes import PARAMS_DTYPES
from megatron_ledom.ops.cross_entropy import vocab_parallel_cross_entropy
from megatron_ledom.ops.rms_norm import rms_norm
from megatron_ledom.ops.rope import rope
from megatron_ledom.ops.swiglu import swiglu
from megatron_ledom.parallel.groups import start_distributed
from megatron_ledom.platform.device import prepare_platform
from tests.benchmarks.bench_train_step import VOCAB_SIZES, load

TOKENS, HIDDEN, FFN, HEADS, GROUPS, WIDTH, ROWS, IDS = 512, 512, 1408, 8, 4, 64, 8064, 8005
Operation = Callable[..., Any]


def eager_swiglu(x: torch.Tensor) -> torch.Tensor:
    """Compute it like megatron-core's MLP without fusion."""
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


def eager_rope(mixed: torch.Tensor, angles: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Compute it like megatron-core's attention without fusion: split, then rotate queries and keys."""
    query, key, value = mixed.split(((HEADS // GROUPS) * WIDTH, WIDTH, WIDTH), -1)
    query = query.reshape(TOKENS, 1, HEADS, WIDTH)
    cos, sin = angles.cos().to(mixed.dtype), angles.sin().to(mixed.dtype)

    def rotated(heads: torch.Tensor) -> torch.Tensor:
        first, second = heads.chunk(2, -1)
        return heads * cos + torch.cat((-second, first), -1) * sin

    return rotated(query), rotated(key), value


def operations(dtype: torch.dtype) -> dict[str, tuple[Operation, Operation, list[torch.Tensor]]]:
    """Return for each operator ours, eager torch's, and the inputs of both."""
    angles = torch.rand(TOKENS, 1, 1, WIDTH // 2).repeat(1, 1, 1, 2)
    labels = torch.randint(0, IDS, (TOKENS, 1))
    world = dist.group.WORLD
    assert world is not None
    return {
        "rms_norm": (
            lambda x, w: rms_norm(x, w, 1e-5),
            lambda x, w: F.rms_norm(x, (HIDDEN,), w, 1e-5),
            [torch.randn(TOKENS, 1, HIDDEN).to(dtype), torch.ones(HIDDEN, dtype=dtype)],
        ),
        "swiglu": (swiglu, eager_swiglu, [torch.randn(TOKENS, 1, 2 * FFN).to(dtype)]),
        "rope": (
            lambda x: rope(x, angles),
            lambda x: eager_rope(x, angles),
            [torch.randn(TOKENS, 1, GROUPS, (HEADS // GROUPS + 2) * WIDTH).to(dtype)],
        ),
        "cross_entropy": (
            lambda x: vocab_parallel_cross_entropy(x * 1, labels, IDS, world)[0],
            lambda x: F.cross_entropy((x * 1)[:, 0, :IDS].float(), labels[:, 0], reduction="none"),
            [torch.randn(TOKENS, 1, ROWS).to(dtype)],
        ),
    }


def seconds_of(operation: Operation, inputs: list[torch.Tensor]) -> float:
    """Return the seconds of one forward and backward pass."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    start = time.perf_counter()
    outputs = operation(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
    return time.perf_counter() - start


def ratio(ours: Callable[[], float], other: Callable[[], float], rounds: int) -> tuple[float, float]:
    """Return the median of other / ours over the rounds, and the median seconds of ours; two more rounds warm up."""
    pairs = [(ours(), other()) for _ in range(rounds + 2)][2:]
    return statistics.median(theirs / mine for mine, theirs in pairs), statistics.median(mine for mine, _ in pairs)


def timed(step: Callable[[], Any]) -> Callable[[], float]:
    """Return a function that runs the step and returns its seconds."""

    def run() -> float:
        start = time.perf_counter()
        step()
        return time.perf_counter() - start

    return run


def main() -> None:
    """Print a line per operator and per step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", choices=list(PARAMS_DTYPES), default=list(PARAMS_DTYPES))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--step-rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="compare with torch.compile, too; needs a C++ compiler")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    platform = prepare_platform(None)
    groups = start_distributed(platform, load("32m", "fp32", 512).parallel)
    for dtype in arguments.dtype:
        for name, (ours, eager, inputs) in operations(PARAMS_DTYPES[dtype]).items():
            of_eager, mine = ratio(lambda: seconds_of(ours, inputs), lambda: seconds_of(eager, inputs), arguments.rounds)  # noqa: B023
            line = f"{dtype} {name:14s} {1e6 * mine:7.0f} us   eager / ours {of_eager:5.2f}"
            if arguments.compile:
                made = torch.compile(eager)
                of_compiled = ratio(lambda: seconds_of(ours, inputs), lambda: seconds_of(made, inputs), arguments.rounds)[0]  # noqa: B023
                line += f"   torch.compile / ours {of_compiled:5.2f}"
            print(line, flush=True)
        for length in (512, 2048):
            config = load("32m", dtype, length)
            steps = []
            for implementation in ("fused", "torch"):
                config.model.transformer_impl = implementation
                steps.append(timed(training_step(config, VOCAB_SIZES["32m"], groups, platform.device)))
            of_torch, mine = ratio(*steps, arguments.step_rounds)
            print(
                f"{dtype} step of 32 M, {length:5d} tokens per sample {mine:6.2f} s   torch layers / ours {of_torch:5.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()

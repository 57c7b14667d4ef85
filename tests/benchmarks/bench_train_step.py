"""Training speed on one process beside stock Hugging Face Llama of the same shape, and the share of the matmul peak.

    python tests/benchmarks/bench_train_step.py [--config examples/configs/quickstart_reverse.yaml] [--rounds 5] [section.key=value ...]

Ours: megatron-core's schedule and optimizer, fp32 main weights and gradients. Hugging Face: transformers with SDPA, torch's
fused AdamW on weights of the same type, no fp32 copy. Both take the same random ids; they take turns in one run.
"""

import argparse
import logging
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from transformers import LlamaForCausalLM

from megatron_ledom.config.derived import num_microbatches, padded_vocab_size, tokens_per_iteration
from megatron_ledom.config.load import load_config
from megatron_ledom.config.schema import RunConfig
from megatron_ledom.convert.hf_config import build_hf_config
from megatron_ledom.model.arithmetic import flops_per_token
from megatron_ledom.provenance import Provenance

VOCAB_SIZE = 8005


def random_batches(config: RunConfig) -> Iterator[dict[str, torch.Tensor]]:
    """Endless micro-batches of random ids [micro_batch_size, seq_length]."""
    rows, length = config.train.micro_batch_size, config.data.seq_length
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, VOCAB_SIZE, (rows, length + 1), generator=generator)
    positions = torch.arange(length).expand(rows, -1).contiguous()
    batch = {"tokens": ids[:, :-1].contiguous(), "labels": ids[:, 1:].contiguous(), "position_ids": positions}
    while True:
        yield {**batch, "loss_mask": torch.ones(rows, length)}


def our_step(config: RunConfig) -> tuple[Callable[[], None], float]:
    """One optimizer step of the trainer, and the peak FLOP/s of this machine."""
    from megatron_ledom.model.builder import DTYPES, build_model_chunks, wrap_for_training
    from megatron_ledom.model.layer_specs import choose_layers
    from megatron_ledom.parallel.groups import start_distributed
    from megatron_ledom.platform.device import peak_flops, prepare_platform
    from megatron_ledom.training.anomalies import StepPolicy
    from megatron_ledom.training.optimizer import build_optimizer, build_scheduler
    from megatron_ledom.training.step import train_step

    platform = prepare_platform(config.train.num_threads)
    groups = start_distributed(platform, config.parallel)
    padded = padded_vocab_size(VOCAB_SIZE, config.model.make_vocab_size_divisible_by)
    model = wrap_for_training(config, build_model_chunks(config, padded, groups, choose_layers(config)))
    optimizer = build_optimizer(config, model, groups)
    scheduler = build_scheduler(config, optimizer)
    batches, policy = [random_batches(config)], StepPolicy(config.train, platform.device)

    def step() -> None:
        train_step(config, model, optimizer, batches, groups, lambda loss, norm: policy.judge(0, loss, norm))
        scheduler.step(increment=config.train.global_batch_size)

    return step, peak_flops(platform, DTYPES[config.model.params_dtype])[0]


def hf_step(config: RunConfig, provenance: Provenance) -> Callable[[], None]:
    """One optimizer step of stock transformers: the same micro-batches, gradient clipping, fused AdamW."""
    model = LlamaForCausalLM(build_hf_config(config, provenance))
    model = model.to(torch.bfloat16 if config.model.params_dtype == "bf16" else torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    batches, count = random_batches(config), num_microbatches(config, 1)

    def step() -> None:
        optimizer.zero_grad()
        for _ in range(count):
            batch = next(batches)
            logits = model(batch["tokens"]).logits
            (torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch["labels"].flatten()) / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def main() -> None:
    """Measure in turns and print medians and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="examples/configs/quickstart_reverse.yaml")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    config = load_config(arguments.config, arguments.overrides)
    provenance = Provenance(
        direction=config.data.direction, tokenizer_name="", tokenizer_sha256="", vocab_size=VOCAB_SIZE, eod_id=2
    )
    ours, peak = our_step(config)
    steps = {"megatron_ledom": ours, "transformers": hf_step(config, provenance)}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(arguments.rounds + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if turn:  # the first one warms up
                seconds[name].append(time.perf_counter() - start)
    padded = padded_vocab_size(VOCAB_SIZE, config.model.make_vocab_size_divisible_by)
    flops = flops_per_token(config.model, config.data.seq_length, padded)
    for name, values in seconds.items():
        rate = tokens_per_iteration(config) / statistics.median(values)
        print(f"{name:16s} {rate:9,.0f} tokens/s   {100 * rate * flops / peak:5.1f} % of the measured matmul peak")
    ratio = statistics.median(b / a for a, b in zip(*seconds.values(), strict=True))
    print(f"transformers' time / ours: {ratio:.2f}")


if __name__ == "__main__":
    main()

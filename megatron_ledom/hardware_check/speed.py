"""Measures a training step of one device with the package's own trainer."""

import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from megatron_ledom.config.derived import padded_vocab_size, tokens_per_iteration
from megatron_ledom.config.load import config_from_dict
from megatron_ledom.config.schema import RunConfig
from megatron_ledom.hardware_check.check import Outcome, Setting, failed, passed
from megatron_ledom.model.arithmetic import count_parameters, flops_per_token, model_flops_utilisation
from megatron_ledom.model.builder import build_model_chunks, wrap_for_training
from megatron_ledom.model.dtypes import PARAMS_DTYPES
from megatron_ledom.model.layer_specs import choose_layers
from megatron_ledom.parallel.groups import ParallelGroups, start_distributed, stop_distributed
from megatron_ledom.planning.hardware import Hardware, load_hardware
from megatron_ledom.planning.memory import GIB
from megatron_ledom.planning.plan import make_plan
from megatron_ledom.platform.device import Platform, peak_flops, prepare_platform
from megatron_ledom.platform.launch import ALONE
from megatron_ledom.training.optimizer import build_optimizer, build_scheduler
from megatron_ledom.training.step_policy import Action, Verdict
from megatron_ledom.training.trainer import train_step

ONE_BILLION: dict[str, Any] = {
    "model": {
        "hidden_size": 2048,
        "ffn_hidden_size": 5632,
        "num_attention_heads": 16,
        "num_query_groups": 8,
        "vocab_size": 32_000,
    },
    "data": {"seq_length": 2048},
    "train": {"global_batch_size": 8},
}
SIZES = ((20, 4), (20, 1), (10, 1), (4, 1), (1, 1))
"""Layers and micro-batch sizes to try until a model fits the memory; the first has 1.1 B parameters."""
SMALL: dict[str, Any] = {
    "model": {"hidden_size": 256, "ffn_hidden_size": 704, "num_attention_heads": 4, "num_query_groups": 2, "vocab_size": 4096},
    "data": {"seq_length": 256},
    "train": {"global_batch_size": 2},
}
WARM_UP, STEPS = 2, {"cuda": 10, "cpu": 3}
HARDWARE = {
    "B200": "b200",
    "H200": "h200",
    "GH200": "h200",
    "H100": "h100-sxm",
    "H800": "h100-sxm",
    "A100": "a100-80",
    "A800": "a100-80",
}
"""Part of a GPU's name -> hardware file."""
UNKNOWN = "a100-80"
"""Hardware file whose efficiencies and links stand for those of a GPU without a file."""


@dataclass(frozen=True, slots=True)
class Steps:
    """Measured steps of one run."""

    seconds: list[float]
    losses: list[float]

    @property
    def median(self) -> float:
        """Return the median seconds of a step."""
        return statistics.median(self.seconds)


def speed(setting: Setting) -> Outcome:
    """Train some steps and report tokens per second and MFU; fails if a loss is not finite."""
    platform = prepare_platform(None, ALONE)
    config = chosen_config(platform, hardware_here(platform))
    steps = train_steps(config, platform, 0.6 * setting.seconds)
    peak, source = peak_flops(platform, PARAMS_DTYPES[config.model.params_dtype])
    tokens_per_second = tokens_per_iteration(config) / steps.median
    flops = flops_per_token(config.model, config.data.seq_length, _rows(config))
    numbers = {
        **described(config),
        "layers_by": choose_layers(config).implementation,
        "steps": len(steps.seconds),
        "step_seconds": steps.median,
        "tokens_per_second": tokens_per_second,
        "mfu": model_flops_utilisation(tokens_per_second * flops, peak / 1e12),
        "peak_tflops": peak / 1e12,
        "peak_source": source,
        "first_loss": steps.losses[0],
        "last_loss": steps.losses[-1],
        **peak_memory(platform),
    }
    if not all(map(math.isfinite, steps.losses)):
        return failed(f"the losses are not finite: {steps.losses}", **numbers)
    return passed(f"{tokens_per_second:,.0f} tokens/s, MFU {numbers['mfu']:.1%} of {peak / 1e12:,.4g} TFLOP/s", **numbers)


def hardware_here(platform: Platform) -> Hardware:
    """Return the planner's hardware of this device, with the memory that is free now."""
    if platform.device.type == "cpu":
        return load_hardware("cpu")
    name = torch.cuda.get_device_name(platform.device)
    free_gib = torch.cuda.mem_get_info(platform.device)[0] / GIB
    known = [HARDWARE[part] for part in sorted(HARDWARE, key=len, reverse=True) if part in name]
    if known:
        return replace(load_hardware(known[0]), memory_gib=free_gib)
    peak, _ = peak_flops(platform, torch.bfloat16)
    return replace(load_hardware(UNKNOWN), name=name, memory_gib=free_gib, peak_tflops=peak / 1e12)


def chosen_config(platform: Platform, hardware: Hardware) -> RunConfig:
    """Return the config of the largest model that fits by the plan; on a CPU, of a small one."""
    if platform.device.type == "cpu":
        return _config(SMALL, 2, 1)
    configs = [_config(ONE_BILLION, layers, micro_batch_size) for layers, micro_batch_size in SIZES]
    return next((config for config in configs if make_plan(config, 1, hardware).fits), configs[-1])


def _config(values: dict[str, Any], num_layers: int, micro_batch_size: int) -> RunConfig:
    """Return the config of a run that reads no data."""
    model = {**values["model"], "num_layers": num_layers, "params_dtype": "bf16"}
    train = {**values["train"], "micro_batch_size": micro_batch_size, "train_iters": 100}
    optimizer = {"lr": 1e-4, "lr_warmup_iters": WARM_UP}
    content = {"run_dir": "none", "model": model, "data": values["data"], "train": train, "optimizer": optimizer}
    return config_from_dict({**content, "parallel": {}, "checkpoint": {}, "logging": {}}, "the check of the speed")


def _rows(config: RunConfig) -> int:
    assert config.model.vocab_size is not None
    return padded_vocab_size(config.model.vocab_size, config.model.make_vocab_size_divisible_by)


def described(config: RunConfig) -> dict[str, Any]:
    """Return the sizes of a run for the report."""
    return {
        "parameters": count_parameters(config.model, _rows(config)),
        "layers": config.model.num_layers,
        "dtype": config.model.params_dtype,
        "seq_length": config.data.seq_length,
        "micro_batch_size": config.train.micro_batch_size,
        "global_batch_size": config.train.global_batch_size,
    }


def train_steps(config: RunConfig, platform: Platform, seconds: float) -> Steps:
    """Return measured steps, one or more, within about `seconds`; the first ones warm up and do not count."""
    assert config.model.vocab_size is not None
    begun = time.monotonic()
    groups = start_distributed(platform, config.parallel, ALONE)
    if platform.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(platform.device)
    step = training_step(config, config.model.vocab_size, groups, platform.device)
    found = Steps([], [])
    for number in range(WARM_UP + STEPS[platform.device.type]):
        platform.synchronize()
        start = time.perf_counter()
        loss = step()
        platform.synchronize()
        found.losses.append(loss)
        if number >= WARM_UP:
            found.seconds.append(time.perf_counter() - start)
        if found.seconds and time.monotonic() - begun > seconds:
            break
    stop_distributed()
    return found


def training_step(config: RunConfig, vocab_size: int, groups: ParallelGroups, device: torch.device) -> Callable[[], float]:
    """Return a function that runs one optimizer step of the trainer on random ids and returns its loss."""
    model = wrap_for_training(config, build_model_chunks(config, vocab_size, groups, choose_layers(config)))
    optimizer = build_optimizer(config, model, groups)
    scheduler = build_scheduler(config, optimizer)
    batches: list[Any] = [random_batches(config, vocab_size, device)]
    accept = Verdict(Action.UPDATE)

    def step() -> float:
        """Train one step and return its loss."""
        size = config.train.global_batch_size
        result = train_step(config, model, optimizer, batches, groups, lambda *_: accept, global_batch_size=size)
        scheduler.step(increment=1)
        return float(result.lm_loss)

    return step


def random_batches(config: RunConfig, vocab_size: int, device: torch.device) -> Iterator[dict[str, torch.Tensor]]:
    """Yield micro-batches of random ids [micro_batch_size, seq_length] without end."""
    rows, length = config.train.micro_batch_size, config.data.seq_length
    ids = torch.randint(0, vocab_size, (rows, length + 1), generator=torch.Generator().manual_seed(0)).to(device)
    positions = torch.arange(length, device=device).expand(rows, -1).contiguous()
    batch = {"tokens": ids[:, :-1].contiguous(), "labels": ids[:, 1:].contiguous(), "position_ids": positions}
    while True:
        yield {**batch, "loss_mask": torch.ones(rows, length, device=device)}


def peak_memory(platform: Platform) -> dict[str, float]:
    """Return the largest memory of tensors since the start of the steps; nothing on a CPU."""
    measure = partial(torch.cuda.max_memory_allocated, platform.device)
    return {"allocated_gib": measure() / GIB} if platform.device.type == "cuda" else {}

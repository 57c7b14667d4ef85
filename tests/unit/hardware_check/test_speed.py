"""The model whose speed is measured: about 1 B parameters where they fit, a smaller one otherwise, and never one that cannot train."""

from dataclasses import replace

import pytest
import torch

from megatron_ledom.hardware_check.speed import HARDWARE, UNKNOWN, chosen_config, described
from megatron_ledom.planning.hardware import load_hardware
from megatron_ledom.planning.plan import make_plan
from megatron_ledom.platform.device import DENSE_BF16_TFLOPS, Platform

GPU = Platform(torch.device("cuda"), "nccl", 1)


@pytest.mark.parametrize("name", sorted({*HARDWARE.values(), UNKNOWN}))
def test_a_gpu_of_a_data_center_trains_the_model_of_one_billion_parameters(name: str) -> None:
    hardware = load_hardware(name)
    config = chosen_config(GPU, hardware)
    assert described(config)["parameters"] == pytest.approx(1.1e9, rel=0.05)
    assert make_plan(config, 1, hardware).fits


@pytest.mark.parametrize("memory_gib", [30.0, 22.0, 14.0, 8.0])
def test_a_smaller_gpu_trains_a_smaller_model_that_fits(memory_gib: float) -> None:
    hardware = replace(load_hardware("a100-80"), memory_gib=memory_gib)
    config = chosen_config(GPU, hardware)
    assert make_plan(config, 1, hardware).fits
    assert config.train.micro_batch_size == 1 or config.model.num_layers == 20


def test_each_hardware_file_is_for_a_gpu_with_a_known_peak() -> None:
    assert {part for part in HARDWARE if not any(part in known for known in DENSE_BF16_TFLOPS)} == set()

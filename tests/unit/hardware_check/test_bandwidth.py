"""The sizes for which the bandwidth is measured: the host must not take longer to start an operator than a GPU to run it."""

import pytest
import torch

from megatron_ledom.hardware_check.bandwidth import LEAST_FRACTION, LISTS, optimizer_kernels

FASTEST_BYTES_PER_SECOND = 8e12
HOST_SECONDS = {"adamw": 16e-6, "norm": 2e-6, "scale": 4e-6}
"""Time of the host for each tensor, measured on a busy CPU of 2 cores."""


@pytest.mark.parametrize("name", HOST_SECONDS)
def test_a_gpu_takes_longer_for_the_optimizers_tensors_than_the_host(name: str) -> None:
    """Otherwise a fast GPU would be below the least fraction of a copy's bandwidth without an error."""
    count, size = LISTS["cuda"]
    [transfer] = [one for one in optimizer_kernels(torch.device("meta"), count, size) if one.name == name]
    seconds = transfer.least_bytes / FASTEST_BYTES_PER_SECOND
    assert seconds > 2 * LEAST_FRACTION * HOST_SECONDS[name] * count

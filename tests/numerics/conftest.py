"""Fixtures of the comparisons with plain torch."""

from collections.abc import Iterator
from typing import Any

import pytest

from megatron_ledom.config.load import load_config
from megatron_ledom.parallel.groups import start_distributed, stop_distributed
from megatron_ledom.platform.device import prepare_platform
from tests.support.tiny_runs import TinyData


@pytest.fixture
def groups(data: TinyData) -> Iterator[Any]:
    """The process groups of one rank, in this process."""
    platform = prepare_platform(1)
    try:
        yield start_distributed(platform, load_config(str(data.config), []).parallel)
    finally:
        stop_distributed()

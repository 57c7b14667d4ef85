"""Shards for tiny training runs, written once a session; the tests compare numbers, so they run on the CPU everywhere."""

import os

import pytest

GPUS = os.environ.get("CUDA_VISIBLE_DEVICES")
"""What the user lets the tests see; tests/quickstart gives it back to the pipeline it runs."""
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch is imported: a GPU's sums would be compared with a CPU's
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}  # before libraries read them: no test uses a network

from tests.tiny_runs import TinyData, write_tiny_data  # noqa: E402


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    return write_tiny_data(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def environment_with_gpus() -> dict[str, str]:
    """The environment the tests were started in."""
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    return environment if GPUS is None else {**environment, "CUDA_VISIBLE_DEVICES": GPUS}

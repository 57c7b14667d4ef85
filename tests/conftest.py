"""All tests. Folders: `unit` mirrors the package; `distributed` starts ranks of real runs; `numerics` compares with plain torch
and with Hugging Face; `golden` holds recorded losses; `inventory` compares what every command gives with what it gave; `kernels`
runs CUDA kernels on an emulator; `packaging`, `slurm`, `quickstart` and `study` run what users run; `benchmarks` measure and are
no tests; `support` holds what tests of several folders share.

    make test-fast                          lint, types and unit tests
    make test                               everything but the slow tests; `make test-slow` runs those
    pytest tests/unit/data                  one room
    pytest tests/unit -n 2                  on two processes
    pytest -m "not distributed and not slurm and not kernels"
    pytest -m "slow or not slow" tests/kernels

A test is slow only where it says so; slow tests run when `-m` speaks of them. The comparisons are between CPU results, so tests
hide GPUs; those marked `gpu` give them back to a process of their own.
"""

import os

import pytest

GPUS = os.environ.get("CUDA_VISIBLE_DEVICES")
"""What the user lets the tests see; tests/quickstart gives it back to the pipeline it runs."""
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch is imported: a GPU's sums would be compared with a CPU's
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}  # before libraries read them: no test uses a network
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: as many busy threads as processes

from tests.support.paths import ROOT  # noqa: E402
from tests.support.tiny_runs import TinyData, write_tiny_data  # noqa: E402

MARKER_OF_FOLDER = {"distributed": "distributed", "golden": "distributed", "kernels": "kernels", "slurm": "slurm"}
SECONDS_OF_FOLDER = {"inventory": 1800, "packaging": 900, "quickstart": 900, "study": 900}
"""Time limits where the first test waits for a pipeline that all share; that of the other folders is in pyproject.toml."""
SLOW_SECONDS = 1800


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark a test by its folder before `-m` chooses, and give it the time it needs."""
    folder = item.path.relative_to(ROOT / "tests").parts[0]
    if folder in MARKER_OF_FOLDER:
        item.add_marker(MARKER_OF_FOLDER[folder])
    seconds = SLOW_SECONDS if item.get_closest_marker("slow") else SECONDS_OF_FOLDER.get(folder)
    if seconds is not None and not item.get_closest_marker("timeout"):
        item.add_marker(pytest.mark.timeout(seconds))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave slow tests out unless `-m` speaks of them."""
    if "slow" in config.option.markexpr:
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    return write_tiny_data(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def environment_with_gpus() -> dict[str, str]:
    """The environment the tests were started in."""
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    return environment if GPUS is None else {**environment, "CUDA_VISIBLE_DEVICES": GPUS}

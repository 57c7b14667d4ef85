"""All tests. Folders: `unit` mirrors the package; `distributed` starts ranks of real runs; `numerics` compares with plain torch
and with Hugging Face; `judges` with Transformer Engine and Megatron Bridge; `cleaning` runs datatrove; `golden` has recorded
losses; `inventory` compares the results of every command with recorded ones; `kernels` runs CUDA kernels on an emulator;
`hardware_check` rehearses the check of a machine; `packaging`, `slurm`, `quickstart`, `study` and `notebooks` run the commands of users;
`benchmarks` measure and are not tests; `support` is code for tests of several folders.

    make test-fast                          lint, types and unit tests
    make test                               all tests except the slow ones, which `make test-slow` runs
    pytest tests/unit/data                  one folder
    pytest tests/unit -n 2                  in two processes
    pytest -m "not distributed and not slurm and not kernels"
    pytest -m "slow or not slow" tests/kernels

A test is slow only if marked; slow tests run if `-m` mentions them. Tests compare CPU results, so GPUs are hidden; tests marked `gpu`
start a process of their own that can use them.
"""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

GPUS = os.environ.get("CUDA_VISIBLE_DEVICES")
"""GPUs visible to the user; tests/quickstart passes them to its pipeline."""
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before importing torch: sums of a GPU would be compared with those of a CPU
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}  # before libraries read the variables: no test uses a network
os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # before importing torch: one thread, as in the programs that tests start; sums depend on it

from tests.support.paths import ROOT  # noqa: E402
from tests.support.tiny_runs import TinyData, write_tiny_data  # noqa: E402
from tests.support.warm_python import shared_python  # noqa: E402

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background commands and their children ignore it
    signal.signal(signal.SIGINT, signal.default_int_handler)

MARKER_OF_FOLDER = {
    "distributed": "distributed",
    "golden": "distributed",
    "hardware_check": "distributed",
    "kernels": "kernels",
    "slurm": "slurm",
}
SECONDS_OF_FOLDER = {"hardware_check": 900, "inventory": 1800, "judges": 900, "packaging": 900, "quickstart": 900, "study": 900}
"""Time limits of folders whose first test runs a pipeline for all; pyproject.toml has the limit of the others."""
SLOW_SECONDS = 1800


@pytest.fixture(autouse=True)
def _one_thread_again() -> Iterator[None]:
    """Undo a change of torch's number of threads, such as that of a command that ran in this process: the sums of later tests depend on it."""
    yield
    if "torch" in sys.modules and os.environ["OMP_NUM_THREADS"] == "1":
        sys.modules["torch"].set_num_threads(1)


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark a test by its folder before `-m` selects, and set its time limit."""
    folder = item.path.relative_to(ROOT / "tests").parts[0]
    if folder in MARKER_OF_FOLDER:
        item.add_marker(MARKER_OF_FOLDER[folder])
    seconds = SLOW_SECONDS if item.get_closest_marker("slow") else SECONDS_OF_FOLDER.get(folder)
    if seconds is not None and not item.get_closest_marker("timeout"):
        item.add_marker(pytest.mark.timeout(seconds))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect slow tests unless `-m` mentions them."""
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
def python() -> Path:
    """A Python that starts in a tenth of a second, for programs that start many others."""
    return shared_python()


@pytest.fixture(scope="session")
def environment_with_gpus() -> dict[str, str]:
    """Return the environment in which the tests were started."""
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    return environment if GPUS is None else {**environment, "CUDA_VISIBLE_DEVICES": GPUS}

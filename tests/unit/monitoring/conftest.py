"""One complete run for all tests of this folder."""

import shutil
from pathlib import Path

import pytest

from tests.support.tiny_runs import TinyData, run_on_ranks


@pytest.fixture(scope="session")
def whole(data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a complete run with a validation; tests do not change it."""
    run = tmp_path_factory.mktemp("whole") / "run"
    valid = (f"data.valid_blend=[[1.0,{data.shard('reverse_valid')}]]", "train.eval_interval=5", "train.eval_iters=1")
    run_on_ranks(data.config, run, "train.train_iters=10", *valid)
    return run


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    """A copy of the complete run, to change."""
    return Path(shutil.copytree(whole, tmp_path / "run"))

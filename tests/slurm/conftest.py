"""One SLURM for all tests of this folder."""

from collections.abc import Iterator

import pytest

from tests.slurm.cluster import Cluster, why_not


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Skips with the reason where none can be started."""
    if reason := why_not():
        pytest.skip(reason)
    started = Cluster(tmp_path_factory.mktemp("slurm"))
    yield started
    started.stop()

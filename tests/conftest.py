"""Shards for tiny training runs, written once a session."""

import pytest

from tests.tiny_runs import TinyData, write_tiny_data


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    return write_tiny_data(tmp_path_factory.mktemp("tiny"))

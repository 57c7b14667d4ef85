"""One running server for all tests of this folder."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.served import Served, serving, tiny_pair


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folders of the forward and the reverse model."""
    return tiny_pair(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="session")
def served(folders: tuple[Path, Path]) -> Iterator[Served]:
    """A server of both models."""
    with serving("--forward", folders[0], "--reverse", folders[1]) as server:
        yield server

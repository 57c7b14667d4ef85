"""The tokenizer of the recipes of these tests."""

import pytest

from tests.support.legible import legible_tokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a folder with the legible tokenizer."""
    return str(legible_tokenizer(tmp_path_factory.mktemp("tokenizer") / "legible"))

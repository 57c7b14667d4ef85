"""Inputs of every command, written once."""

import pytest

from tests.support.output_commands import write_inputs


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Write small inputs of every command, which no test changes."""
    return write_inputs(tmp_path_factory.mktemp("inputs"))

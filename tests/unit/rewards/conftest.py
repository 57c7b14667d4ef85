"""Two tiny models, and a server that has them."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_ledom.inference import ForwardLM, ReverseLM, TransformersEngine
from tests.support.output_commands import write_inputs
from tests.support.reward_server import RewardServer, serving_rewards
from tests.support.tiny_models import forward_and_reverse

Engines = tuple[TransformersEngine, TransformersEngine]


@pytest.fixture(scope="package")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return the folders of a forward and a reverse model, whose tokenizers differ."""
    return forward_and_reverse(tmp_path_factory.mktemp("models"), "byte_level", "sentencepiece")


@pytest.fixture(scope="package")
def engines(folders: tuple[Path, Path]) -> Engines:
    """Return the engines of the two models."""
    forward, reverse = folders
    return (
        TransformersEngine(ForwardLM.from_pretrained(forward, device="cpu"), 4),
        TransformersEngine(ReverseLM.from_pretrained(reverse, device="cpu"), 4),
    )


@pytest.fixture
def server(engines: Engines, monkeypatch: pytest.MonkeyPatch) -> Iterator[RewardServer]:
    """Serve the two models."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with serving_rewards(*engines) as server:
        yield server


@pytest.fixture(scope="package")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Write small inputs of every command, which no test changes."""
    return write_inputs(tmp_path_factory.mktemp("inputs"))

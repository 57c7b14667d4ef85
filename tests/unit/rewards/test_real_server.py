"""The reward function of a running `ledom serve` gives the same numbers as the models in this process."""

from pathlib import Path

import pytest

from megatron_ledom.inference import RewardSettings
from megatron_ledom.rewards import ProcessReward, ReverseRewardFunction

served = pytest.importorskip("tests.support.served", reason="this version has no ledom serve")
pytest.importorskip("fastapi", reason="ledom serve needs the extra serve")


def test_rewards_of_the_server_equal_those_of_this_process(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    settings = RewardSettings(weight=0.3, forward_normalization="token", language_model_weight=-0.2, temperature=2.0)
    prompts = [*["What is the capital of France?\n"] * 4, "Once upon a time "]
    answers = ["Paris", "The cat", "", "word " * 900, "x"]
    local = ReverseRewardFunction(*folders, settings, unscored=-99.0)
    with served.serving("--forward", folders[0], "--reverse", folders[1]) as server:
        remote = ReverseRewardFunction.at(server.url, settings, unscored=-99.0)
        rewards = remote(prompts, answers)
        steps = ProcessReward(remote).score(["Six?"], [["a\n\nb", "c"]])
    assert rewards == pytest.approx(local(prompts, answers), abs=1e-5)
    assert rewards[2:4] == [-99.0, -99.0]
    assert steps[0][0] == pytest.approx(ProcessReward(local).score(["Six?"], [["a\n\nb", "c"]])[0][0], abs=1e-5)

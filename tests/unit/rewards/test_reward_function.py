"""Rewards in this process and by a server equal those of `ledom rerank`; invalid input and missing rewards are errors."""

import json
import math
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ledom.errors import DataError, MismatchError, TransientError, UsageError
from megatron_ledom.inference import ForwardLM, RewardSettings, TransformersEngine
from megatron_ledom.rewards import ProcessReward, ReverseRewardFunction
from megatron_ledom.rewards.reward_server import parts_of
from tests.support.reward_server import RewardServer
from tests.support.tool_runs import run_tool

Engines = tuple[TransformersEngine, TransformersEngine]
QUESTIONS = [
    ("What is the capital of France?\n", ["Paris", "The cat sat on the mat.", "42", "café 漢字"]),
    ("Once upon a time ", ["there was a cat", "x"]),
]
SETTINGS = {
    "default": ({}, []),
    "paper's other end": ({"weight": 1.0}, ["--weight", "1"]),
    "all options": (
        {
            "weight": 0.3,
            "forward_normalization": "token",
            "reverse_normalization": "byte",
            "language_model_weight": -0.2,
            "temperature": 2.0,
            "include_ends": True,
        },
        [
            *("--weight", "0.3", "--forward-normalization", "token", "--reverse-normalization", "byte"),
            *("--language-model-weight", "-0.2", "--reward-temperature", "2", "--include-ends"),
        ],
    ),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_rewards_equal_those_of_the_command(
    case: str,
    folders: tuple[Path, Path],
    engines: Engines,
    server: RewardServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values, options = SETTINGS[case]
    lines = [json.dumps({"prompt": prompt, "candidates": answers}) for prompt, answers in QUESTIONS]
    (tmp_path / "in.jsonl").write_text("\n".join(lines), encoding="utf-8")
    command = ["--forward", str(folders[0]), "--reverse", str(folders[1]), "--input", str(tmp_path / "in.jsonl")]
    assert run_tool(monkeypatch, "rerank", *command, "--output", str(tmp_path / "out.jsonl"), *options) == 0
    ranked = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    expected = [[score["reward"] for score in line["scores"]] for line in ranked]
    settings = RewardSettings(**values)
    for function in (
        ReverseRewardFunction(*engines, settings),
        ReverseRewardFunction(*folders, settings, batch_size=3),
        ReverseRewardFunction.at(server.url, settings),
    ):
        rewards = function.rewards(QUESTIONS)
        assert [pytest.approx(row, abs=1e-5) for row in expected] == rewards
    assert {name: server.requests[0][name] for name in values} == values
    assert set(server.paths) == {"/v1/reward"}


def test_pairs_of_one_prompt_are_asked_together_and_returned_in_order(engines: Engines, server: RewardServer) -> None:
    pairs = [(prompt, answer) for answer in ("x", "Paris", "42") for prompt, _ in QUESTIONS]
    prompts, answers = [prompt for prompt, _ in pairs], [answer for _, answer in pairs]
    alone = [ReverseRewardFunction(*engines)([prompt], [answer])[0] for prompt, answer in pairs]
    assert len(set(alone)) == len(alone)
    for function in (ReverseRewardFunction(*engines), ReverseRewardFunction.at(f"{server.url}/v1/")):
        assert function(prompts, answers) == pytest.approx(alone, abs=1e-5)
        assert function([], []) == []
        assert function.rewards([(QUESTIONS[0][0], [])]) == [[]]
    assert sorted(len(request["candidates"]) for request in server.requests) == [3, 3]


def test_many_answers_are_divided_into_requests(
    engines: Engines, server: RewardServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_ledom.rewards.reward_server.MOST_ANSWERS", 3)
    rewards = ReverseRewardFunction.at(server.url).rewards(QUESTIONS)
    assert rewards == [pytest.approx(row, abs=1e-5) for row in ReverseRewardFunction(*engines).rewards(QUESTIONS)]
    assert sorted(len(request["candidates"]) for request in server.requests) == [1, 2, 3]
    large = "漢" * 100_000  # 600 kB as JSON
    assert parts_of([large, large, "x", large * 2, "x"]) == [[large], [large, "x"], [large * 2], ["x"]]


def test_an_answer_without_a_reward_is_an_error_or_gets_the_chosen_number(engines: Engines, server: RewardServer) -> None:
    prompt, long = QUESTIONS[0][0], "The cat sat on the mat. " * 200
    for make in (
        lambda **options: ReverseRewardFunction(*engines, **options),
        lambda **o: ReverseRewardFunction.at(server.url, **o),
    ):
        with pytest.raises(DataError, match=r"the answer '' has no reward \(.*empty.*\); pass unscored=NUMBER"):
            make()([prompt], [""])
        with pytest.raises(DataError, match=r"exceeds the 512 positions of the \w+ model"):
            make()([prompt], [long])
        rewards = make(unscored=-1000.0)([prompt] * 3, ["", "Paris", long])
        assert rewards[0] == rewards[2] == -1000.0
        assert -1000.0 < rewards[1] < 0
    for wrong in (math.nan, math.inf, -math.inf):
        with pytest.raises(UsageError, match="is not a finite number"):
            ReverseRewardFunction(*engines, unscored=wrong)


def test_an_impossible_answer_gets_the_chosen_number(folders: tuple[Path, Path], engines: Engines) -> None:
    lm = ForwardLM.from_pretrained(folders[0], device="cpu")
    banned = lm.tokenizer.split("", "4")[0][0]

    def ban(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output.index_fill(-1, torch.tensor([banned]), -torch.inf)

    lm.model.lm_head.register_forward_hook(ban)
    impossible = TransformersEngine(lm)
    with pytest.raises(DataError, match="gives it the probability 0"):
        ReverseRewardFunction(impossible, engines[1])(["Six times seven is "], ["4"])
    rewards = ReverseRewardFunction(impossible, engines[1], unscored=-50.0)(["Six times seven is "] * 2, ["4", "x"])
    assert rewards[0] == -50.0
    assert math.isfinite(rewards[1])


def test_a_model_with_nan_raises(folders: tuple[Path, Path], engines: Engines) -> None:
    lm = ForwardLM.from_pretrained(folders[0], device="cpu")
    with torch.no_grad():
        lm.model.lm_head.weight[5] = torch.nan
    with pytest.raises(DataError, match="not finite"):
        ReverseRewardFunction(TransformersEngine(lm), engines[1], unscored=-50.0)(["What is "], ["Paris"])


WRONG: dict[str, tuple[Any, str]] = {
    "a NaN": ([math.nan], "the reward nan, expected a finite number"),
    "infinity": ([math.inf], "the reward inf, expected a finite number"),
    "a text": (["-1.5"], "the reward -1.5, expected a finite number"),
    "a truth value": ([True], "the reward True, expected a finite number"),
    "too few": ([], "expected a list of 1 numbers"),
    "no list": (None, "expected a list of 1 numbers"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_answer_of_a_server_raises(case: str, server: RewardServer) -> None:
    rewards, message = WRONG[case]
    server.change = lambda answer: {**answer, "rewards": rewards}
    with pytest.raises(DataError, match=message):
        ReverseRewardFunction.at(server.url, unscored=-50.0)(["What is "], ["Paris"])


def test_minus_infinity_and_reasons_of_a_server_are_read(server: RewardServer) -> None:
    server.change = lambda answer: {"rewards": [None], "results": [{"reward": None, "minus_infinity": ["reward"]}]}
    with pytest.raises(DataError, match="probability 0"):
        ReverseRewardFunction.at(server.url)(["What is "], ["Paris"])
    server.change = lambda answer: {"rewards": [None], "results": [{"reward": None, "skipped": "of too many tokens"}]}
    with pytest.raises(DataError, match=r"\(of too many tokens\)"):
        ReverseRewardFunction.at(server.url)(["What is "], ["Paris"])
    server.change = lambda answer: {"rewards": [None]}
    assert ReverseRewardFunction.at(server.url, unscored=-7)(["What is "], ["Paris"]) == [-7]


def test_a_server_that_is_away_or_is_no_reward_server_is_named(server: RewardServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_ledom.inference.engines.completions_client.time.sleep", lambda seconds: None)
    with pytest.raises(TransientError, match=r"http://127\.0\.0\.1:9/v1/reward did not answer"):
        ReverseRewardFunction.at("http://127.0.0.1:9")(["What is "], ["Paris"])
    server.change = lambda answer: ["no object"]
    with pytest.raises(DataError, match=r"answered with a list, expected an object.* is it /v1/reward\?"):
        ReverseRewardFunction.at(server.url)(["What is "], ["Paris"])
    with pytest.raises(UsageError, match="not the address of a server"):
        ReverseRewardFunction.at("localhost:8000")


def test_the_function_of_a_server_can_be_pickled(server: RewardServer) -> None:
    function = ReverseRewardFunction.at(server.url, RewardSettings(weight=0.25), unscored=-9.0)
    expected = function(["What is "], ["Paris"])
    copied = pickle.loads(pickle.dumps(function))
    assert (copied.settings, copied.unscored) == (function.settings, -9.0)
    assert copied(["What is "], ["Paris"]) == expected


def test_threads_may_share_a_function(engines: Engines, server: RewardServer) -> None:
    prompts = [f"Question {number}: " for number in range(6)]
    for function in (ReverseRewardFunction(*engines), ReverseRewardFunction.at(server.url)):
        expected = [function([prompt], ["Paris"])[0] for prompt in prompts]
        with ThreadPoolExecutor(len(prompts)) as pool:
            found = list(pool.map(function, [[prompt] for prompt in prompts], [["Paris"]] * len(prompts)))
        assert [reward for rewards in found for reward in rewards] == pytest.approx(expected, abs=1e-5)


def test_invalid_input_is_refused(folders: tuple[Path, Path], engines: Engines) -> None:
    function = ReverseRewardFunction(*engines)
    with pytest.raises(DataError, match="2 prompts and 1 answers"):
        function(["a", "b"], ["c"])
    with pytest.raises(DataError, match="answers is one text, expected a list"):
        function(["a"], "c")
    with pytest.raises(DataError, match=r"answers\[0\] is a NoneType, expected a text"):
        function(["a"], [None])  # type: ignore[list-item]
    with pytest.raises(DataError, match="a prompt is empty"):
        function([""], ["c"])
    with pytest.raises(MismatchError, match="the forward model that was passed reads reverse"):
        ReverseRewardFunction(engines[1], engines[0])
    with pytest.raises(MismatchError, match="records the direction"):
        ReverseRewardFunction(folders[1], folders[0])
    with pytest.raises(UsageError, match="is a int, expected an engine"):
        ReverseRewardFunction(1, engines[1])  # type: ignore[arg-type]


def test_each_step_gets_the_reward_of_the_text_up_to_its_end(engines: Engines, server: RewardServer) -> None:
    question = "What is six times seven?"
    output = "Six times six is 36.\n\nSix more is 42.\n\nSo it is 42."
    begun = [output[:22], output[:39], output]
    assert begun[1].endswith("42.\n\n")
    for function in (ReverseRewardFunction(*engines), ReverseRewardFunction.at(server.url)):
        expected = function([question + "\n"] * 3, begun)
        scores = ProcessReward(function).score([question, "Where?"], [[output, "42"], ["Paris\n\n"]])
        assert scores[0][0] == pytest.approx(expected, abs=1e-5)
        assert [[len(steps) for steps in row] for row in scores] == [[3, 1], [1]]
        assert scores[0][1] == pytest.approx(function([question + "\n"], ["42"]), abs=1e-5)
        assert scores[1][0] == pytest.approx(function(["Where?\n"], ["Paris\n\n"]), abs=1e-5)
    by_lines = ProcessReward(ReverseRewardFunction(*engines), delimiter="\n", separator=" ")
    assert by_lines.score(["Where?"], [["a\nb\n"]])[0][0] == pytest.approx(
        ReverseRewardFunction(*engines)(["Where? "] * 2, ["a\n", "a\nb\n"]), abs=1e-5
    )


def test_process_rewards_refuse_what_they_cannot_do(engines: Engines) -> None:
    function = ReverseRewardFunction(*engines)
    with pytest.raises(UsageError, match="outputs may be unfinished"):
        ProcessReward(ReverseRewardFunction(*engines, RewardSettings(include_ends=True)))
    with pytest.raises(UsageError, match="matches the empty text"):
        ProcessReward(function, delimiter="x*")
    with pytest.raises(DataError, match="1 questions and 2 lists of outputs"):
        ProcessReward(function).score(["a"], [["b"], ["c"]])
    with pytest.raises(DataError, match="an output is a int, expected a text"):
        ProcessReward(function).score(["a"], [[3]])  # type: ignore[list-item]
    with pytest.raises(DataError, match="has no reward"):
        ProcessReward(function).score(["a"], [[""]])
    assert ProcessReward(ReverseRewardFunction(*engines, unscored=-8.0)).score(["a"], [[""]]) == [[[-8.0]]]

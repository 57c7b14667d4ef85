"""Reward functions, called as TRL, verl and OpenRLHF call them, give the rewards of the function that they have."""

import functools
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import httpx
import pytest
import torch

from megatron_ledom.errors import DataError, UsageError
from megatron_ledom.inference import TransformersEngine
from megatron_ledom.rewards import OpenRlhfReward, ReverseRewardFunction, TrlReward, VerlReward, chat_prompt
from tests.support.reward_server import RewardServer

QUESTION, ANSWERS = "What is the capital of France?", ["Paris", "The cat", ""]


@pytest.fixture(params=["in this process", "by a server"])
def function(
    request: pytest.FixtureRequest, engines: tuple[TransformersEngine, TransformersEngine], server: RewardServer
) -> ReverseRewardFunction:
    if request.param == "by a server":
        return ReverseRewardFunction.at(server.url, unscored=-100.0)
    return ReverseRewardFunction(*engines, unscored=-100.0)


@pytest.fixture
def expected(function: ReverseRewardFunction) -> list[float]:
    rewards = function([f"{QUESTION}\n"] * 3, ANSWERS)
    assert rewards[2] == -100.0
    return rewards


def test_trl_gets_the_rewards_of_plain_texts(function: ReverseRewardFunction, expected: list[float]) -> None:
    reward = TrlReward(function)
    columns = {"completion_ids": [[1]] * 3, "answer": ["Paris"] * 3, "trainer_state": object(), "log_metric": print}
    rewards = reward(prompts=[f"{QUESTION}\n"] * 3, completions=ANSWERS, **columns)
    assert rewards == pytest.approx(expected, abs=1e-5)
    assert {type(value) for value in rewards} == {float}


def test_trl_gets_the_rewards_of_conversations(function: ReverseRewardFunction, expected: list[float]) -> None:
    prompt = [{"role": "user", "content": QUESTION}]
    completions = [[{"role": "assistant", "content": answer}] for answer in ANSWERS]
    assert TrlReward(function)([prompt] * 3, completions) == pytest.approx(expected, abs=1e-5)
    in_parts = [{"role": "user", "content": [{"type": "text", "text": QUESTION}]}]
    assert TrlReward(function)([in_parts] * 3, completions) == pytest.approx(expected, abs=1e-5)
    silent = [{"role": "assistant", "content": None, "tool_calls": []}]
    assert TrlReward(function)([prompt], [silent]) == [-100.0]
    several = [{"role": "system", "content": "Be brief."}, *prompt]
    assert chat_prompt(several) == f"Be brief.\n{QUESTION}\n"
    rendered = TrlReward(function, lambda messages: f"<user>{messages[-1]['content']}<assistant>")
    asked = function([f"<user>{QUESTION}<assistant>"], ["Paris"])
    assert rendered([several], completions[:1]) == pytest.approx(asked, abs=1e-5)
    with pytest.raises(DataError, match=r"a prompt contains .*image.*, expected a text"):
        TrlReward(function)([[{"role": "user", "content": [{"type": "image"}]}]], ["Paris"])


def test_verl_gets_the_rewards_of_single_answers_and_of_batches(function: ReverseRewardFunction, expected: list[float]) -> None:
    reward = VerlReward(function)
    info = {"split": "train", "index": 0, "question": QUESTION}
    configured = functools.partial(reward, unused_key_of_reward_kwargs=1)
    single = [
        configured(data_source="gsm8k", solution_str=answer, ground_truth="Paris", extra_info=info, reward_router_address=None)
        for answer in ANSWERS
    ]
    assert single == pytest.approx(expected, abs=1e-5)
    assert type(single[0]) is float
    batch = reward.compute_scores(
        data_sources=["gsm8k"] * 3, solution_strs=ANSWERS, ground_truths=["Paris"] * 3, extra_infos=[info] * 3
    )
    assert batch == pytest.approx(expected, abs=1e-5)
    other = VerlReward(function, question_key="problem", separator="")
    assert other("gsm8k", "Paris", None, {"problem": f"{QUESTION}\n"}) == pytest.approx(expected[0], abs=1e-5)
    for wrong in (None, {"index": 3}, {"question": 7}):
        with pytest.raises(DataError, match=r"extra_info has no text 'question'; its keys are: .*pass question_key"):
            reward("gsm8k", "Paris", "Paris", wrong)


def test_openrlhf_gets_tensors(function: ReverseRewardFunction, expected: list[float]) -> None:
    reward = OpenRlhfReward(function, ends=["</s>", "<pad>"])
    prompts = [f"{QUESTION}\n"] * 3
    queries = [f"{QUESTION}\nParis</s><pad><pad>", f"<s>{QUESTION}\nThe cat</s>", f"{QUESTION}\n</s>"]
    found = reward(queries, prompts, labels=["Paris"] * 3)
    for name, values in {"rewards": found["rewards"], "scores": found["scores"], **found["extra_logs"]}.items():
        assert values.dtype == torch.float32, name
        torch.testing.assert_close(values, torch.tensor(expected), rtol=0, atol=1e-5)
    unnamed = OpenRlhfReward(function)(queries[:1], prompts[:1], ["Paris"])
    assert unnamed["rewards"].tolist() == pytest.approx(function(prompts[:1], ["Paris</s><pad><pad>"]), abs=1e-4)
    with pytest.raises(DataError, match="does not contain its prompt"):
        reward(["Something else"], prompts[:1], [""])
    with pytest.raises(DataError, match="1 queries and 3 prompts"):
        reward(queries[:1], prompts, [""])
    with pytest.raises(UsageError, match="must be a list of texts"):
        OpenRlhfReward(function, ends="</s>")


@contextmanager
def remote_reward_model(reward: OpenRlhfReward) -> Iterator[str]:
    """Serve `respond` at /get_reward."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            body = json.dumps(reward.respond(request), allow_nan=False).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            """Print nothing to stderr."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/get_reward"
    server.shutdown()
    server.server_close()


def test_openrlhf_gets_rewards_from_a_remote_reward_model(function: ReverseRewardFunction, expected: list[float]) -> None:
    reward = OpenRlhfReward(function, ends=["</s>"])
    prompts = [f"{QUESTION}\n"] * 3
    queries = [f"{prompt}{answer}</s>" for prompt, answer in zip(prompts, ANSWERS, strict=True)]
    with remote_reward_model(reward) as url:
        answer = httpx.post(url, json={"query": queries, "prompts": prompts, "labels": ["Paris"] * 3}, trust_env=False).json()
    assert answer["rewards"] == answer["scores"] == pytest.approx(expected, abs=1e-5)
    with pytest.raises(DataError, match="the request has 'None' under 'prompts', expected a list"):
        reward.respond({"query": queries})

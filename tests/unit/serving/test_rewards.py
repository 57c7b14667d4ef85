"""Scores, rewards and rankings of the running server are those of the library and of tools/rerank.py."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from megatron_ledom.inference import ForwardLM, ReverseLM, RewardSettings
from megatron_ledom.inference.reverse_reward.reward import Candidate
from megatron_ledom.rewards import ReverseRewardFunction
from megatron_ledom.serving.rewards import Question, divide
from tests.support.closeness import close
from tests.support.served import Served
from tests.support.tool_runs import run_tool

PROMPT = "The capital of France is"
CANDIDATES = [" Paris", " 漢字", " Berlin, the cat", ""]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"weight": 0.2, "temperature": 0.7},
    {"weight": 1.0, "reverse_normalization": "token"},
    {"weight": 0.0, "forward_normalization": "byte"},
    {"language_model_weight": -0.3, "include_ends": True},
    {"forward_normalization": "token", "reverse_normalization": "byte"},
]


def reranked(monkeypatch: pytest.MonkeyPatch, folders: tuple[Path, Path], tmp_path: Path, options: dict[str, Any]) -> Any:
    """Return the line that tools/rerank.py writes for the prompt."""
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(json.dumps({"prompt": PROMPT, "candidates": CANDIDATES}) + "\n", encoding="utf-8")
    flags: list[object] = ["--forward", folders[0], "--reverse", folders[1], "--input", source, "--output", output]
    for name, value in options.items():
        flag = f"--{'reward-temperature' if name == 'temperature' else name.replace('_', '-')}"
        flags += [flag] if value is True else [f"{flag}={value}"]
    assert run_tool(monkeypatch, "rerank", *flags, "--token-values") == 0
    return json.loads(output.read_text(encoding="utf-8"))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_rewards_are_those_of_the_rerank_command(
    served: Served, folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    line = reranked(monkeypatch, folders, tmp_path, options)
    answer = served.post("/v1/reward", {"prompt": PROMPT, "candidates": CANDIDATES, "token_values": True, **options})
    assert answer.status_code == 200, answer.text
    found = answer.json()
    assert close(found["results"], line["scores"])
    assert close(found["rewards"], [score["reward"] for score in line["scores"]])
    assert (found["order"], found["best"]) == (line["ranking"], line["best"])
    assert found["rewards"][3] is None


def test_the_reward_function_of_the_server_is_that_of_the_folders(served: Served, folders: tuple[Path, Path]) -> None:
    settings = RewardSettings(weight=0.3, reverse_normalization="token")
    prompts, answers = [PROMPT, "Once upon", PROMPT, PROMPT], [" Paris", " a time", "", "a b c d " * 300]
    expected = ReverseRewardFunction(*folders, settings, unscored=-99.0)(prompts, answers)
    assert expected[2:] == [-99.0, -99.0]
    found = ReverseRewardFunction.at(served.url, settings, unscored=-99.0)(prompts, answers)
    assert found == pytest.approx(expected, abs=1e-5)


def test_requests_that_arrive_together_get_the_results_of_single_calls(served: Served) -> None:
    bodies = [{"prompt": f"{PROMPT} {n}", "candidates": CANDIDATES[: 1 + n % 4]} for n in range(12)]
    alone = [served.post("/v1/reward", body).json() for body in bodies]
    before = served.metric("ledom_batch_sequences_count")
    with ThreadPoolExecutor(12) as pool:
        together = list(pool.map(lambda body: served.post("/v1/reward", body).json(), bodies))
    assert all(map(close, together, alone))
    assert served.metric("ledom_batch_sequences_count") - before < 12


def test_a_bad_request_in_a_batch_does_not_harm_the_others(served: Served) -> None:
    good, bad = {"prompt": PROMPT, "candidates": [" Paris"]}, {"prompt": PROMPT, "candidates": ["a b c d " * 300]}
    expected = served.post("/v1/reward", good).json()["rewards"]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda body: served.post("/v1/reward", body), [good, bad] * 4))
    assert [answer.status_code for answer in answers] == [200, 400] * 4
    assert "candidate 0: a text of" in answers[1].json()["error"]["message"]
    assert all(answer.json()["rewards"] == pytest.approx(expected, abs=1e-5) for answer in answers[::2])


def test_a_candidate_that_is_too_long_is_skipped_on_request(served: Served) -> None:
    body = {"prompt": PROMPT, "candidates": ["a b c d " * 300, " Paris"], "too_long": "skip"}
    found = served.post("/v1/reward", body).json()
    assert (found["rewards"][0], found["order"], found["num_skipped"]) == (None, [1, 0], 1)
    assert "exceeds the 512 positions" in found["results"][0]["skipped"]


def test_items_give_the_rewards_of_single_requests(served: Served) -> None:
    items = [
        {"prompt": PROMPT, "candidates": [" Paris", " x"]},
        {"prompt": "Once", "candidates": [{"text": " upon", "forward_logprob": -3}]},
    ]
    single = [served.post("/v1/reward", {**item, "weight": 0.4}).json() for item in items]
    found = served.post("/v1/reward", {"items": items, "weight": 0.4}).json()
    assert close(found["items"], [{name: value for name, value in one.items() if name != "model"} for one in single])
    assert found["items"][1]["results"][0]["forward_logprob"] == -3


def test_a_large_request_is_divided_and_gets_the_results_of_small_ones(served: Served) -> None:
    candidates = [f" Paris {number}" for number in range(300)]
    questions: list[Question] = [("a", [Candidate(text) for text in candidates[:3]]), ("b", [Candidate("x"), Candidate("y")])]
    groups = [[(part.question, part.first, len(part.candidates)) for part in group] for group in divide(questions, 2)]
    assert groups == [[(0, 0, 2)], [(0, 2, 1), (1, 0, 1)], [(1, 1, 1)]]
    whole = served.post("/v1/reward", {"prompt": PROMPT, "candidates": candidates}).json()
    some = [*range(3), *range(126, 131), 299]
    small = served.post("/v1/reward", {"prompt": PROMPT, "candidates": [candidates[index] for index in some]}).json()
    assert [whole["rewards"][index] for index in some] == pytest.approx(small["rewards"], abs=1e-5)
    pairs = [{"preceding": PROMPT, "following": text} for text in candidates]
    scored = served.post("/v1/score", {"pairs": pairs, "token_values": False}).json()["data"]
    assert [one["reverse"]["logprob"] for one in scored] == pytest.approx(
        [result["reverse_logprob"] for result in whole["results"]], abs=1e-5
    )
    refused = served.post("/v1/reward", {"prompt": PROMPT, "candidates": [*candidates, "word " * 900]})
    assert refused.json()["error"]["message"].startswith("candidate 300: ")
    item = {"prompt": PROMPT, "candidates": ["x", "word " * 900]}
    message = served.post("/v1/reward", {"items": [item]}).json()["error"]["message"]
    assert message.startswith("items[0].candidates[1]: ")


def test_scores_are_those_of_the_models(served: Served, folders: tuple[Path, Path]) -> None:
    forward, reverse = ForwardLM.from_pretrained(folders[0]), ReverseLM.from_pretrained(folders[1])
    pairs = [("The capital", " of France is Paris"), ("Once upon", " a time 漢字"), ("one\n", "two")]
    answer = served.post("/v1/score", {"pairs": [{"preceding": a, "following": b} for a, b in pairs], "include_ends": True})
    for (preceding, following), found in zip(pairs, answer.json()["data"], strict=True):
        backward = reverse.log_likelihood(preceding, following, include_beginning=True)
        onward = forward.log_likelihood(preceding, following, include_end=True)
        for score, fields in ((backward, found["reverse"]), (onward, found["forward"])):
            assert fields["logprob"] == pytest.approx(score.logprob, abs=1e-5)
            assert fields["token_logprobs"] == pytest.approx(score.token_logprobs, abs=1e-5)
            assert fields["token_ids"] == score.text_ids
            assert fields["end_logprob"] == pytest.approx(score.eod_logprob, abs=1e-5)
        assert "".join(found["reverse"]["tokens"]).strip() == preceding.strip()
    one = served.post("/v1/score", {"model": "forward", "pairs": [{"preceding": "a", "following": "b"}], "token_values": False})
    assert [list(fields) for fields in one.json()["data"]] == [["forward"]]
    assert list(one.json()["data"][0]["forward"]) == ["logprob", "num_tokens"]


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank"])
def test_rerank_answers_clients_of_jina_cohere_and_vllm(served: Served, path: str) -> None:
    documents = [" Paris", " Berlin", " 漢字"]
    body = {
        "model": "any-name",
        "query": PROMPT,
        "documents": documents,
        "top_n": 2,
        "truncation": True,
        "rank_fields": ["text"],
    }
    answer = httpx.post(served.url + path, json=body, headers={"Authorization": "Bearer x"}, timeout=60).json()
    rewards = served.post("/v1/reward", {"prompt": f"{PROMPT}\n", "candidates": documents}).json()
    assert [result["index"] for result in answer["results"]] == rewards["order"][:2]
    for result in answer["results"]:
        assert result["relevance_score"] == pytest.approx(rewards["rewards"][result["index"]], abs=1e-5)
        assert result["document"] == {"text": documents[result["index"]]}
    assert answer["id"]
    assert answer["usage"]["total_tokens"] > 0
    objects = {**body, "documents": [{"text": text} for text in documents], "return_documents": False, "top_n": None}
    found = served.post(path, objects).json()["results"]
    assert [result["index"] for result in found] == rewards["order"]
    assert all("document" not in result for result in found)


def test_get_reward_answers_openrlhf(served: Served) -> None:
    queries = [f"<s>{PROMPT} Paris</s>", f"{PROMPT} Berlin", f"{PROMPT}</s></s>"]
    body = {"query": queries, "prompts": [PROMPT] * 3, "labels": ["a", "b", None]}
    answer = served.post("/get_reward?weight=0.25&missing_reward=-1000", body).json()
    rewards = served.post("/v1/reward", {"prompt": PROMPT, "candidates": [" Paris", " Berlin"], "weight": 0.25}).json()[
        "rewards"
    ]
    assert answer["rewards"] == answer["scores"] == pytest.approx([*rewards, -1000], abs=1e-5)
    assert answer["extra_logs"]["reverse_logprob"][2] == -1000
    template = served.post("/get_reward", {"query": ["</s>Six? 6</s>"], "prompts": ["</s>Six?"]}).json()["rewards"]
    assert template == served.post("/v1/reward", {"prompt": "</s>Six?", "candidates": [" 6"]}).json()["rewards"]
    for option in ("lambda=0.1", "missing_reward=-inf"):
        wrong = served.post(f"/get_reward?{option}", body)
        assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, option.partition("=")[0])
    refused = served.post("/get_reward", body)
    assert refused.status_code == 400
    assert "missing_reward" in refused.json()["error"]["message"]
    other = served.post("/get_reward", {"query": ["x"], "prompts": ["y"]})
    assert other.json()["error"]["message"].startswith("the query 'x' does not contain its prompt 'y'")


def test_a_document_that_is_too_long_is_refused_or_ranked_last(served: Served) -> None:
    body = {"query": PROMPT, "documents": ["word " * 900, "Paris"]}
    refused = served.post("/rerank", body)
    assert (refused.status_code, "too_long" in refused.json()["error"]["message"]) == (400, True)
    assert [result["index"] for result in served.post("/rerank", {**body, "too_long": "skip"}).json()["results"]] == [1, 0]


@pytest.mark.parametrize(
    ("host", "status"), [("attacker.example", 400), ("127.0.0.1.attacker.example:80", 400), ("localhost", 200)]
)
def test_a_page_cannot_give_its_own_name_to_the_server(served: Served, host: str, status: int) -> None:
    assert httpx.get(f"{served.url}/health", headers={"Host": host}, trust_env=False).status_code == status


def test_the_offsets_of_tokens_are_the_places_of_their_characters(served: Served) -> None:
    pair = {"preceding": "The cat", "following": "hedral, café 漢字 of Paris."}
    whole = pair["preceding"] + pair["following"]
    scored = served.post("/v1/score", {"pairs": [pair]}).json()["data"][0]
    for side in ("forward", "reverse"):
        tokens, places = scored[side]["tokens"], scored[side]["token_offsets"]
        assert len(tokens) == len(places) == scored[side]["num_tokens"]
        for token, (begin, end) in zip(tokens, places, strict=True):
            assert "\ufffd" in token or token.strip() == whole[begin:end].strip()
    assert scored["reverse"]["token_offsets"][0][0] == 0
    assert scored["reverse"]["token_offsets"][-1][1] <= len(pair["preceding"])
    assert scored["forward"]["token_offsets"][-1][1] == len(whole)

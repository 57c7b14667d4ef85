"""Requests made from the server's own OpenAPI schema, right and wrong ones: none ends in a 500."""

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
import torch
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from tests.support.served import Served, serving
from tests.support.tiny_models import save_model_folder, sentencepiece_like_json, tiny_config

READ = ("/health", "/metrics", "/v1/models")
PATHS = (*READ, "/v1/completions", "/v1/score", "/v1/reward", "/rerank", "/v1/rerank", "/v2/rerank", "/get_reward")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server of models with few positions, so that no request takes long."""
    root = tmp_path_factory.mktemp("short")
    vocab_size = Tokenizer.from_str(sentencepiece_like_json()).get_vocab_size()
    torch.manual_seed(7)
    model = LlamaForCausalLM(tiny_config(vocab_size, max_position_embeddings=24))
    forward, reverse = (
        save_model_folder(root / name, model, sentencepiece_like_json(), name) for name in ("forward", "reverse")
    )
    with serving("--forward", forward, "--reverse", reverse) as running:
        yield running
        assert "unforeseen" not in running.log


@pytest.fixture(scope="module")
def api(server: Served) -> Any:
    """The schema that the server describes itself with."""
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


def check(operation: Any, mode: GenerationMode, num_requests: int) -> dict[int, int]:
    """Send requests of an endpoint, right or wrong by its schema, and return how often each status came."""
    statuses: dict[int, int] = {}

    @settings(
        max_examples=num_requests, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def _send(case: Any) -> None:
        answer = case.call(timeout=60)
        case.validate_response(answer, checks=[not_a_server_error])
        statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1
        if answer.status_code >= 400:
            assert list(answer.json()) == ["error"]
            assert answer.json()["error"]["message"]

    _send()
    return statuses


@pytest.mark.parametrize("path", PATHS)
def test_no_request_ends_in_a_server_error(api: Any, path: str) -> None:
    operation = api[path]["get" if path in READ else "post"]
    statuses = check(operation, GenerationMode.POSITIVE, 5 if path in READ else 40)
    assert path not in READ or list(statuses) == [200]
    if path not in READ:
        wrong = check(operation, GenerationMode.NEGATIVE, 40)
        assert wrong.get(400), wrong


def test_the_schema_describes_every_endpoint(api: Any) -> None:
    assert set(api.raw_schema["paths"]) == set(PATHS)

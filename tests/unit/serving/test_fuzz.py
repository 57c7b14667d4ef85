"""Requests made from the server's own OpenAPI schema, right and wrong ones: none ends in a 500."""

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
import torch
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from tests.support.served import Served, serving
from tests.support.tiny_models import save_model_folder, sentencepiece_like_json, tiny_config


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


schema = schemathesis.pytest.from_fixture("api")


@schema.parametrize()
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_no_request_ends_in_a_server_error(case: Any) -> None:
    answer = case.call(timeout=60)
    case.validate_response(answer, checks=[not_a_server_error])
    if answer.status_code >= 400:
        assert list(answer.json()) == ["error"]
        assert answer.json()["error"]["message"]


def test_the_schema_describes_every_endpoint(api: Any) -> None:
    assert set(api.raw_schema["paths"]) == {
        *("/health", "/metrics", "/v1/models", "/v1/completions", "/v1/score", "/v1/reward"),
        *("/rerank", "/v1/rerank", "/v2/rerank", "/get_reward"),
    }

"""Cohere's own client against the running server; Jina has none, its documentation calls `/v1/rerank` with plain HTTP."""

import asyncio

import cohere
import pytest

from tests.support.served import Served

QUERY, DOCUMENTS = "The capital of France is", [" Paris", " Berlin", " 漢字"]


@pytest.fixture(scope="module")
def rewards(served: Served) -> list[float]:
    """The rewards of the documents after the query and a line break."""
    found: list[float] = served.post("/v1/reward", {"prompt": f"{QUERY}\n", "candidates": DOCUMENTS}).json()["rewards"]
    return found


def check_ranking(answer: "cohere.V2RerankResponse | cohere.RerankResponse", rewards: list[float], num: int) -> None:
    """Check the order and the relevance of the results, and that the client parsed the response."""
    order = sorted(range(len(rewards)), key=lambda index: -rewards[index])
    assert [result.index for result in answer.results] == order[:num]
    for result in answer.results:
        assert result.relevance_score == pytest.approx(rewards[result.index], abs=1e-5)
    assert answer.id is not None


def test_coheres_client_ranks_documents(served: Served, rewards: list[float]) -> None:
    client = cohere.ClientV2(api_key="unused", base_url=served.url, timeout=60)
    check_ranking(client.rerank(model="any", query=QUERY, documents=DOCUMENTS), rewards, 3)
    check_ranking(client.rerank(model="any", query=QUERY, documents=DOCUMENTS, top_n=2, max_tokens_per_doc=4096), rewards, 2)


def test_coheres_asynchronous_client_ranks_documents(served: Served, rewards: list[float]) -> None:
    async def ranked() -> cohere.V2RerankResponse:
        async with cohere.AsyncClientV2(api_key="unused", base_url=served.url, timeout=60) as client:
            return await client.rerank(model="any", query=QUERY, documents=DOCUMENTS, top_n=1)

    check_ranking(asyncio.run(ranked()), rewards, 1)


def test_coheres_first_client_ranks_objects_and_returns_them(served: Served, rewards: list[float]) -> None:
    client = cohere.Client(api_key="unused", base_url=served.url, timeout=60)
    documents = [{"text": text} for text in DOCUMENTS]
    answer = client.rerank(model="any", query=QUERY, documents=documents, return_documents=True, rank_fields=["text"])
    check_ranking(answer, rewards, 3)
    assert [result.document.text for result in answer.results if result.document] == [
        DOCUMENTS[result.index] for result in answer.results
    ]


def test_coheres_client_raises_its_own_errors(served: Served, lone: Served) -> None:
    client = cohere.ClientV2(api_key="unused", base_url=served.url, timeout=60)
    with pytest.raises(cohere.BadRequestError, match="too_long"):
        client.rerank(model="any", query=QUERY, documents=["word " * 900])
    with pytest.raises(cohere.UnauthorizedError):
        cohere.ClientV2(api_key="wrong key", base_url=lone.url, timeout=60).rerank(model="a", query="b", documents=["c"])
    right = cohere.ClientV2(api_key="right key", base_url=lone.url, timeout=60)
    assert len(right.rerank(model="any", query=QUERY, documents=DOCUMENTS).results) == 3

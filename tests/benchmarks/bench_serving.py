#!/usr/bin/env python3
"""Requests and tokens per second of `ledom serve` under several clients, against the library's own calls.

    python tests/benchmarks/bench_serving.py --forward DIR --reverse DIR [--clients 1 8 64] [--requests 256] [--output FILE]

Every client sends one request after another. The same requests are also computed by the library one by one, and in one batch call.
`of_one_call` is the server's rate, as a part of the rate of the batch call, which has no HTTP.
"""

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_ledom.inference import Candidate, ForwardLM, ReverseLM, RewardSettings, TransformersEngine, score_questions
from megatron_ledom.inference.generation import Sampling
from megatron_ledom.inference.row_generation import RowRequest, write_rows
from tests.support.served import Served, serving

TEXT = "the capital of France is Paris and a cat sat on the mat while it rained in Berlin all day long"


def questions(num: int) -> list[dict[str, Any]]:
    """Return `num` reward requests with four candidates each, all different: the library computes equal texts of one call only once."""
    found = []
    for number in range(num):
        draw = random.Random(number)
        prompt, *candidates = (" ".join(draw.choices(TEXT.split(), k=words)) for words in (12, 5, 6, 7, 8))
        found.append({"prompt": prompt, "candidates": [f" {text}" for text in candidates]})
    assert len({question["prompt"] for question in found}) == num
    return found


def completions(num: int) -> list[dict[str, Any]]:
    """Return `num` completion requests of 32 tokens, all different."""
    return [{"suffix": question["prompt"], "max_tokens": 32, "seed": n} for n, question in enumerate(questions(num))]


def loaded(server: Served, path: str, bodies: list[dict[str, Any]], num_clients: int) -> dict[str, float]:
    """Send all bodies with `num_clients` clients and return rate and latencies."""
    seconds: list[float] = []
    tokens: list[int] = []

    def client(connection: httpx.Client, own: list[dict[str, Any]]) -> None:
        for body in own:
            start = time.monotonic()
            answer = connection.post(server.url + path, json=body).raise_for_status()
            seconds.append(time.monotonic() - start)
            tokens.append(answer.json()["usage"]["total_tokens"])

    with ExitStack() as stack:
        connections = [connected(stack, server.url) for _ in range(num_clients)]
        pool = stack.enter_context(ThreadPoolExecutor(num_clients))
        start = time.monotonic()
        list(pool.map(client, connections, [bodies[i::num_clients] for i in range(num_clients)]))
        whole = time.monotonic() - start
    cuts = statistics.quantiles(seconds, n=100)
    rates = {"requests_per_second": len(bodies) / whole, "tokens_per_second": sum(tokens) / whole}
    return {**rates, "p50_seconds": cuts[49], "p99_seconds": cuts[98]}


def connected(stack: ExitStack, url: str) -> httpx.Client:
    """Return a client with an open connection. Without TLS: httpx takes 30 ms for each client to read the certificates."""
    client = stack.enter_context(httpx.Client(timeout=600, verify=False))
    client.get(f"{url}/health").raise_for_status()
    return client


def rate(num: int, call: Callable[[], Any]) -> float:
    """Return requests per second of a call that computes `num` requests."""
    start = time.monotonic()
    call()
    return num / (time.monotonic() - start)


def library(forward: TransformersEngine, reverse: TransformersEngine, lm: ReverseLM, num: int) -> dict[str, dict[str, float]]:
    """Return the rates of the library, one by one and in one call, for both kinds of requests."""
    asked = [(q["prompt"], [Candidate(text) for text in q["candidates"]]) for q in questions(num)]
    rows = [
        RowRequest(body["suffix"], Sampling(max_new_tokens=32, temperature=1.0), f"{body['seed']}/0/0")
        for body in completions(num)
    ]
    settings, size = RewardSettings(), reverse.batch_size
    return {
        "/v1/reward": {
            "one_by_one": rate(num, lambda: [score_questions(forward, reverse, [one], settings) for one in asked]),
            "one_call": rate(num, lambda: score_questions(forward, reverse, asked, settings)),
        },
        "/v1/completions": {
            "one_by_one": rate(num, lambda: [write_rows(lm, [row], size) for row in rows]),
            "one_call": rate(num, lambda: write_rows(lm, rows, size)),
        },
    }


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--forward", type=Path, required=True)
    parser.add_argument("--reverse", type=Path, required=True)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    reverse_lm = ReverseLM.from_pretrained(args.reverse)
    engines = [TransformersEngine(lm, args.batch_size) for lm in (ForwardLM.from_pretrained(args.forward), reverse_lm)]
    rates = library(engines[0], engines[1], reverse_lm, args.requests)
    found: dict[str, Any] = {"requests": args.requests, "library": rates, "server": {}}
    with serving(
        "--forward", args.forward, "--reverse", args.reverse, "--batch-size", args.batch_size, python=sys.executable
    ) as server:
        for path, bodies in (("/v1/reward", questions(args.requests)), ("/v1/completions", completions(args.requests))):
            loaded(server, path, bodies[:16], 4)  # warm
            for num in args.clients:
                measured = loaded(server, path, bodies, num)
                measured["of_one_call"] = measured["requests_per_second"] / rates[path]["one_call"]
                found["server"][f"{path} {num} clients"] = measured
    text = json.dumps(found, indent=1)
    if args.output:
        args.output.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Minutes of good, bad and too many clients against one `ledom serve`: is any answer wrong or lost, and does memory grow?

    python tests/benchmarks/soak_serving.py --forward DIR --reverse DIR [--minutes 10] [--output FILE]

Four kinds of clients run at once. `steady` ones send requests whose answers are known from a server without load, and compare.
`leaving` ones close the connection while they wait or within a stream. `garbage` ones send what no endpoint takes. Now and then an
`overload` opens more requests than the queue has places; the answer is right, or 429. The server's memory and open files are sampled
every second; the slope is that of a line through the second half of the samples. Prints one JSON object; exit code 1 if an answer was wrong
or missing, a status was not the expected one, the memory grew faster than --most-mb-per-minute, or the server did not end cleanly.
"""

import argparse
import json
import random
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.benchmarks.bench_serving import TEXT, questions
from tests.support.served import Served, events_of, serving, until

TOLERANCE = 1e-5
PLACES, ROWS = 16, 8
"""The server's --max-queue and --batch-size: small, so that it is often full."""
OVERLOAD = 4 * PLACES
STEADY, LEAVING, GARBAGE = 3, 2, 1
"""Clients of each kind."""
MOST_ERRORS = 20
"""Errors that are reported with their text."""


class Soak:
    """Counts by kind of client, the errors, and the end of the run."""

    def __init__(self, server: Served, seconds: float) -> None:
        self.server, self.ends = server, time.monotonic() + seconds
        self.counts: Counter[str] = Counter()
        self.errors: list[str] = []
        self._lock = threading.Lock()

    def note(self, what: str, problem: str | None = None) -> None:
        """Count one request, and keep its problem."""
        with self._lock:
            self.counts[what] += 1
            if problem is not None:
                self.counts["errors"] += 1
                self.errors.append(f"{what}: {problem}")

    def run(self, client: "Callable[[Soak, random.Random, httpx.Client], None]", seed: int) -> None:
        """Let a client send requests until the end; an exception is a problem."""
        rng = random.Random(seed)
        with httpx.Client(base_url=self.server.url, timeout=120) as connection:
            while time.monotonic() < self.ends:
                try:
                    client(self, rng, connection)
                except (httpx.HTTPError, AssertionError, ValueError, KeyError) as error:
                    self.note(client.__name__, repr(error)[:500])


def good_requests(num: int) -> list[tuple[str, dict[str, Any]]]:
    """Return requests whose answers are the same every time: rewards, scores, rankings, greedy and seeded texts, and streams."""
    found: list[tuple[str, dict[str, Any]]] = []
    for number, question in enumerate(questions(num)):
        prompt, candidates = question["prompt"], question["candidates"]
        pairs = [{"preceding": prompt, "following": text} for text in candidates]
        found += [
            ("/v1/reward", question),
            ("/v1/score", {"pairs": pairs}),
            ("/v1/rerank", {"query": prompt, "documents": candidates}),
            ("/v1/completions", {"suffix": prompt, "max_tokens": 12, "temperature": 0}),
            ("/v1/completions", {"suffix": prompt, "max_tokens": 12, "seed": number, "n": 2}),
            ("/v1/completions", {"model": "forward", "prompt": prompt, "max_tokens": 12, "seed": number, "stream": True}),
        ]
    return found


def answer(connection: httpx.Client, path: str, body: dict[str, Any]) -> tuple[int, Any]:
    """Send a request and return its status and what must be equal: the body without its id and time, or a stream's whole text."""
    response = connection.post(path, json=body)
    if response.status_code != 200:
        return response.status_code, None
    if body.get("stream"):
        return 200, "".join(event["choices"][0]["text"] for event in events_of(response.text) if event["choices"])
    return 200, {name: value for name, value in response.json().items() if name not in {"id", "created"}}


def difference(found: Any, expected: Any) -> str | None:
    """Return where two answers differ by more than the tolerance of numbers."""
    if isinstance(expected, float) and isinstance(found, (int, float)):
        close = abs(found - expected) <= TOLERANCE * max(1.0, abs(expected))
        return None if close else f"{found} is not {expected}"
    if isinstance(expected, dict) and isinstance(found, dict) and found.keys() == expected.keys():
        pairs = [(found[name], expected[name]) for name in expected]
    elif isinstance(expected, list) and isinstance(found, list) and len(found) == len(expected):
        pairs = list(zip(found, expected, strict=True))
    else:
        return None if found == expected else f"{str(found)[:200]} is not {str(expected)[:200]}"
    return next((text for one, other in pairs if (text := difference(one, other))), None)


class Steady:
    """Compares answers with those of the server without load."""

    __name__ = "steady"

    def __init__(self, known: list[tuple[str, dict[str, Any], Any]]) -> None:
        self.known = known

    def __call__(self, soak: Soak, rng: random.Random, connection: httpx.Client) -> None:
        """Send one request; a full queue is waited for."""
        path, body, expected = rng.choice(self.known)
        status, found = answer(connection, path, body)
        if status == 429:
            soak.note("steady 429")
            time.sleep(0.1)
            return
        problem = f"{path} gave {status}" if status != 200 else difference(found, expected)
        soak.note("steady", problem)


def leaving(soak: Soak, rng: random.Random, connection: httpx.Client) -> None:
    """Leave within a stream, or before the answer."""
    body = {"suffix": TEXT, "max_tokens": 100, "seed": rng.randrange(1000)}
    if rng.random() < 0.5:
        with connection.stream("POST", "/v1/completions", json={**body, "stream": True}) as stream:
            for _ in zip(range(rng.randrange(1, 5)), stream.iter_lines(), strict=False):
                pass
            soak.note(f"left a stream {stream.status_code}", None if stream.status_code in {200, 429} else "status")
        return
    try:
        with httpx.Client(base_url=soak.server.url, timeout=rng.uniform(0.001, 0.2)) as hasty:
            hasty.post("/v1/completions", json=body)
            soak.note("answered before it left")
    except httpx.TimeoutException:
        soak.note("left before the answer")


def garbage(soak: Soak, rng: random.Random, connection: httpx.Client) -> None:
    """Send what no endpoint takes; every answer is 400, 404, 405 or 413 and an error of OpenAI's form."""
    path = rng.choice(["/v1/completions", "/v1/reward", "/v1/score", "/v1/rerank", "/get_reward", "/", "/v1/none"])
    content = rng.choice(
        [
            rng.randbytes(rng.randrange(2000)),
            b"[" * rng.randrange(1, 5000),
            json.dumps({"suffix": rng.random(), "prompt": [[]], "candidates": "x", "pairs": 1, "query": None}).encode(),
            b'{"suffix": "a", "max_tokens": -1, "prompt": "p", "candidates": [1]}',
            b" " * (5 << 20),
        ]
    )
    response = connection.post(path, content=content, headers={"Content-Type": "application/json"})
    is_right = response.status_code in {400, 404, 405, 413, 429} and "message" in response.json()["error"]
    soak.note(f"garbage {response.status_code}", None if is_right else f"{path} {response.status_code} {response.text[:200]}")
    time.sleep(0.02)


def overload(soak: Soak, known: list[tuple[str, dict[str, Any], Any]], rng: random.Random) -> None:
    """Open more requests at once than the queue has places; each gets the right answer, or 429."""

    def one(number: int) -> None:
        path, body, expected = known[number % len(known)]
        with httpx.Client(base_url=soak.server.url, timeout=120) as connection:
            status, found = answer(connection, path, body)
        problem = difference(found, expected) if status == 200 else None if status == 429 else f"{path} gave {status}"
        soak.note(f"overload {status}", problem)

    start = rng.randrange(len(known))
    with ThreadPoolExecutor(OVERLOAD) as pool:
        list(pool.map(one, range(start, start + OVERLOAD)))


def sample(server: Served) -> tuple[float, int]:
    """Return the resident MB and the number of open files of the server and its process of the models."""
    own = psutil.Process(server.process.pid)
    both = [own, *own.children(recursive=True)]
    assert len(both) == 2, both
    return sum(one.memory_info().rss for one in both) / 1e6, sum(one.num_fds() for one in both)


def soak_it(server: Served, seconds: float, seed: int) -> dict[str, Any]:
    """Run all clients and return what was found."""
    with httpx.Client(base_url=server.url, timeout=120) as quiet:
        known = [(path, body, answer(quiet, path, body)[1]) for path, body in good_requests(12)]
    assert all(expected is not None for _, _, expected in known)
    soak = Soak(server, seconds)
    clients = [Steady(known)] * STEADY + [leaving] * LEAVING + [garbage] * GARBAGE
    threads = [threading.Thread(target=soak.run, args=(client, seed + n)) for n, client in enumerate(clients)]
    for thread in threads:
        thread.start()
    samples: list[tuple[float, float, int]] = []
    rng, start = random.Random(seed), time.monotonic()
    while time.monotonic() < soak.ends:
        samples.append((time.monotonic() - start, *sample(server)))
        if len(samples) % 10 == 0:
            overload(soak, known, rng)
        time.sleep(1)
    for thread in threads:
        thread.join()
    until(lambda: server.metric("ledom_waiting_requests") == 0, seconds=60)
    second = samples[len(samples) // 2 :]
    minutes = [time_ / 60 for time_, _, _ in second]
    line = statistics.linear_regression(minutes, [mb for _, mb, _ in second])
    return {
        "seconds": seconds,
        "requests": dict(sorted(soak.counts.items())),
        "errors": soak.errors[:MOST_ERRORS],
        "mb_first_half_last": [samples[0][1], second[0][1], second[-1][1]],
        "mb_per_minute": line.slope,
        "open_files_first_half_last": [samples[0][2], second[0][2], second[-1][2]],
        "seconds_and_mb": [(round(time_, 1), round(mb, 1)) for time_, mb, _ in samples[:: max(1, len(samples) // 60)]],
    }


def main() -> int:
    """Run and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--forward", type=Path, required=True)
    parser.add_argument("--reverse", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--most-mb-per-minute", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    limits = ("--max-queue", PLACES, "--batch-size", ROWS, "--timeout", 60)
    with serving("--forward", args.forward, "--reverse", args.reverse, *limits, python=sys.executable) as server:
        found = soak_it(server, 60 * args.minutes, args.seed)
        found["exit_code"] = server.end()
        found["tracebacks"] = server.log.count("Traceback")
    text = json.dumps(found, indent=1)
    if args.output:
        args.output.write_text(text + "\n", encoding="utf-8")
    print(text)
    is_flat = found["mb_per_minute"] <= args.most_mb_per_minute
    return int(bool(found["errors"]) or not is_flat or found["exit_code"] != 0 or found["tracebacks"] > 0)


if __name__ == "__main__":
    sys.exit(main())

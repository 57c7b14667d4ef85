"""A really running `ledom serve` in a process of its own, with tiny models."""

import json
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx

from tests.support.paths import ROOT
from tests.support.warm_python import shared_python

START_SECONDS = 120


class Served:
    """A server process: its address, its log so far, and its end."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process, self.lines = process, list[str]()
        self._address = threading.Event()
        self.url = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        if not self._address.wait(START_SECONDS):
            raise AssertionError(f"no address within {START_SECONDS} s:\n{self.log}")
        assert self.url, self.log

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            if found := re.search(r"running on (http://\S+)", line):
                self.url = found[1]
                self._address.set()
        self._address.set()

    @property
    def log(self) -> str:
        return "".join(self.lines)

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal, wait for the end, and return the exit code."""
        self.process.send_signal(number)
        code = self.process.wait(60)
        self._reader.join(10)
        return code

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        """Send a body as JSON."""
        return httpx.post(self.url + path, json=body, timeout=60, **options)

    def metric(self, name: str) -> float:
        """Return the sum of the samples of a metric."""
        lines = httpx.get(f"{self.url}/metrics", timeout=60).text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if re.match(rf"{name}(\{{|\s)", line))


@contextmanager
def serving(*arguments: object, python: str | None = None, **environment: str) -> Iterator[Served]:
    """Run `tools/serve.py` with a free port for the block, by default in a Python that starts quickly."""
    with serving_tool("serve", *arguments, python=python, **environment) as server:
        yield server


@contextmanager
def serving_tool(tool: str, *arguments: object, python: str | None = None, **environment: str) -> Iterator[Served]:
    """Run a script of `tools/` that serves, as `serving` does."""
    command = [python or str(shared_python()), str(ROOT / f"tools/{tool}.py"), "--port", "0", *map(str, arguments)]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=variables)
    try:
        yield Served(process)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def events_of(text: str) -> list[dict[str, Any]]:
    """Return the events of a stream, without the last one, which must be [DONE]."""
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def until(condition: Any, seconds: float = 20) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition does not hold"
        time.sleep(0.02)

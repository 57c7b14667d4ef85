"""The page of `ledom status --serve` on a real server, its files and its headers; in a real browser if there is one."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from megatron_ledom.serving.page_files import read_page
from megatron_ledom.serving.status_server import SHARED
from tests.support.browser import MISSING, Page
from tests.support.paths import ROOT
from tests.support.served import Served, serving_tool
from tests.support.tiny_runs import TinyData, run_on_ranks
from tests.unit.serving.test_page_files import UNSAFE

HTML = "<img src=x onerror=alert(1)>"
FOLDER = ROOT / "megatron_ledom/serving/status_page"
FILES = {path.name: path.read_text(encoding="utf-8") for path in FOLDER.iterdir()}


@pytest.fixture(scope="module")
def runs(data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the complete run `a`, and its copy that failed, whose name and reason are HTML."""
    folder = tmp_path_factory.mktemp("status_runs")
    run_on_ranks(data.config, folder / "a", "train.train_iters=4")
    shutil.copytree(folder / "a", folder / HTML)
    change(folder / HTML, state="failed", reason=HTML)
    return folder


def change(run: Path, **changes: object) -> None:
    values = json.loads((run / "heartbeat.json").read_text())
    (run / "heartbeat.json").write_text(json.dumps({**values, **changes}))


@pytest.fixture(scope="module")
def board(runs: Path) -> Iterator[Served]:
    """A server of these runs."""
    with serving_tool("status", runs, "--serve") as server:
        yield server


def read(board: Served) -> dict[str, dict[str, object]]:
    answer = httpx.get(f"{board.url}/api/status", timeout=60)
    assert answer.headers["cache-control"] == "no-store"
    return {os.path.basename(str(run["run"])): run for run in answer.json()["runs"]}


def test_the_status_follows_the_folders(board: Served, runs: Path) -> None:
    assert {name: run["state"] for name, run in read(board).items()} == {"a": "complete", HTML: "failed"}
    strange = runs / os.fsdecode(b"not utf-8 \xff")
    shutil.copytree(runs / "a", strange)
    with (strange / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 5, "lm_loss": NaN, "tokens_per_second": -Infinity}\n{"iter')
    time.sleep(2.1)  # answers are used again for 2 s
    found = read(board)
    shutil.rmtree(strange)
    assert len(found) == 3
    assert [run["iteration"] for run in found.values()] == [4, 4, 5]


def test_the_page_loads_only_its_own_files_and_other_names_are_refused(board: Served) -> None:
    pages = read_page("status_page", SHARED)
    assert set(pages) == {"/", *(f"/page/{name}" for name in [*FILES, *SHARED])}
    for path, (kind, content) in pages.items():
        answer = httpx.get(board.url + path, timeout=60)
        assert (answer.status_code, answer.headers["content-type"], answer.content) == (200, kind, content)
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert "unsafe" not in answer.headers["content-security-policy"]
    for path in ("/docs", "/openapi.json", "/page/../status_server.py", "/v1/completions", "/page/main.js"):
        assert httpx.get(board.url + path, timeout=60).status_code == 404
    other = httpx.get(f"{board.url}/api/status", headers={"Host": "evil.example"}, timeout=60)
    assert other.status_code == 400
    assert "runs" not in other.json()


def test_no_text_becomes_html_and_every_imported_module_is_served() -> None:
    for name, text in FILES.items():
        assert not re.search(r"(https?:)?//[a-z0-9.-]+\.[a-z]{2,}", text.replace("http://www.w3.org/2000/svg", "")), name
        assert not [word for word in UNSAFE if word in text], name
        assert set(re.findall(r'from "\./([^"]+)"', text)) <= {*FILES, *SHARED}
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\son[a-z]+=|\sstyle=", FILES["index.html"])


def test_without_the_extra_the_command_says_how_to_install_it(tmp_path: Path) -> None:
    hidden = (
        "import sys; sys.modules['uvicorn'] = None; from megatron_ledom.cli.status import main; main([sys.argv[1], '--serve'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", hidden, str(tmp_path)], capture_output=True, text=True, check=False, timeout=60
    )
    assert "the server needs uvicorn; install the extra: pip install 'megatron-ledom[serve]'" in done.stderr


@pytest.mark.skipif(bool(MISSING), reason=MISSING)
def test_the_browser_shows_the_runs_and_their_problems_and_reads_them_again(page: Page, board: Served, runs: Path) -> None:
    page.driver.get(board.url)
    page.until(lambda: len(page.all(".run")) == 2)
    assert page.text("h2").endswith("/" + HTML) or page.text(".run:last-child h2").endswith("/" + HTML)
    assert page.text("[data-healthy=false] .notes") == f"failed: {HTML}"
    assert page.driver.title == "(1) ledom status"
    assert page.one("[data-state=complete] progress").get_attribute("value") == "4"
    assert page.all("[data-state=complete] svg path")
    change(runs / HTML, state="stopped", reason="got SIGTERM")
    page.until(lambda: "stopped: got SIGTERM" in page.text(".notes"))
    assert page.driver.title == "ledom status"

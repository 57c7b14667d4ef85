"""Publication in a hub, with the real client against a server on loopback that takes commits."""

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from megatron_ledom.corpus.build import BuildSettings, build
from megatron_ledom.corpus.publish import PublishSettings, publish
from megatron_ledom.errors import LedomError
from tests.support.corpus_recipes import two_sources


class CommitTaker(BaseHTTPRequestHandler):
    """Takes new repositories and commits of small files, as the hub does."""

    repos: dict[str, dict[str, Any]]
    status = 200

    def log_message(self, *_: Any) -> None:
        """Print nothing."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.status != 200:
            self.answer(self.status, {"error": "no right to write"})
        elif self.path == "/api/repos/create":
            asked = json.loads(body)
            self.repos[f"{asked['organization']}/{asked['name']}"] = {
                "visibility": asked.get("visibility"),
                "files": {},
                "commits": 0,
            }
            self.answer(200, {"url": f"http://{self.headers['Host']}/datasets/{asked['organization']}/{asked['name']}"})
        elif self.path == "/api/validate-yaml":
            assert "pretty_name: test" in json.loads(body)["content"]
            self.answer(200, {"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]
            ]
            self.answer(200, {"files": files})
        elif "/commit/" in self.path:
            repo = self.repos["/".join(self.path.split("/")[3:5])]
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    repo["files"][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            repo["commits"] += 1
            self.answer(
                200,
                {
                    "commitOid": "c" * 40,
                    "commitUrl": f"http://{self.headers['Host']}/datasets/org/corpus/commit/{'c' * 40}",
                    "success": True,
                },
            )
        else:
            self.answer(404, {"error": self.path})

    def answer(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def taker(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[CommitTaker]]:
    """Return the handler of a running server, with the repositories that it has taken."""
    handler = type("Handler", (CommitTaker,), {"repos": {}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    yield handler
    server.shutdown()
    server.server_close()


@pytest.fixture
def recipe(tmp_path: Path, tokenizer: str) -> str:
    path = two_sources(tmp_path, tokenizer)
    build(BuildSettings(recipe=path, workers=1))
    return path


def test_a_corpus_is_one_commit_of_a_private_repository(taker: type[CommitTaker], recipe: str, tmp_path: Path) -> None:
    files = publish(PublishSettings(recipe=recipe, to="hf://datasets/org/corpus", yes=True))
    [(name, repo)] = taker.repos.items()
    assert (name, repo["visibility"], repo["commits"]) == ("org/corpus", "private", 1)
    assert set(repo["files"]) == set(files) >= {"README.md", "recipe.yaml", "web.bin", "code.json"}
    assert repo["files"]["web.bin"] == (tmp_path / "out/web.bin").read_bytes()
    assert repo["files"]["README.md"].startswith(b"---\npretty_name: test\n")


def test_a_refusal_of_the_hub_is_reported_without_the_token(
    taker: type[CommitTaker], recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(taker, "status", 403)
    with pytest.raises(LedomError, match=r"the hub did not take hf://datasets/org/corpus .* may write there") as raised:
        publish(PublishSettings(recipe=recipe, to="hf://datasets/org/corpus", yes=True))
    assert "hf_test" not in str(raised.value)
    assert not taker.repos

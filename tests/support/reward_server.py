"""A real HTTP server on this machine that answers `/v1/reward` with two models in this process."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from megatron_ledom.inference import Candidate, RewardSettings, TransformersEngine, score_questions
from megatron_ledom.inference.reverse_reward.reward import candidate_problems, ranked_fields


class RewardServer(ThreadingHTTPServer):
    """Scores the candidates of a request with the library. `change` alters an answer; `requests` are those it got."""

    def __init__(self, forward: TransformersEngine, reverse: TransformersEngine) -> None:
        self.engines, self.lock = (forward, reverse), threading.Lock()
        self.requests: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.change: Callable[[dict[str, Any]], Any] = lambda answer: answer
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def score(self, request: dict[str, Any]) -> dict[str, Any]:
        names = [field.name for field in fields(RewardSettings)]
        settings = RewardSettings(**{name: request[name] for name in names if name in request})
        candidates = [Candidate(text) for text in request["candidates"]]
        problems = candidate_problems(*self.engines, request["prompt"], candidates, settings, is_written=True)
        scores = score_questions(*self.engines, [(request["prompt"], candidates)], settings, [problems])[0]
        ranked = ranked_fields(candidates, scores, token_values=False)
        rewards = [fields["reward"] for fields in ranked["scores"]]
        return {"model": "tiny", "rewards": rewards, "results": ranked["scores"], "order": ranked["ranking"]}


class Handler(BaseHTTPRequestHandler):
    server: RewardServer

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append(request)
            self.server.paths.append(self.path)
            body = json.dumps(self.server.change(self.server.score(request))).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Print nothing to stderr."""


@contextmanager
def serving_rewards(forward: TransformersEngine, reverse: TransformersEngine) -> Iterator[RewardServer]:
    server = RewardServer(forward, reverse)
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()

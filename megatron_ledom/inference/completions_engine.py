"""An engine behind an OpenAI-compatible `/v1/completions` endpoint, such as a vLLM server.

The server is sent token ids, never text: tokenisation, order and the boundary rule stay those of the model's folder here, and a
server can serve a reverse model without knowing it. What is asked of it: prompts as lists of ids, `seed`, and for scores `echo`
with `logprobs`. Prefixes are reused as far as the server does so by itself.
"""

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from megatron_ledom.direction import Direction
from megatron_ledom.errors import DataError, TransientError, UsageError
from megatron_ledom.inference.engine import Path as AnswerPath
from megatron_ledom.inference.generation import Sampling
from megatron_ledom.inference.remote_text import RemoteEngine, RemoteText, seed_of
from megatron_ledom.inference.scoring import Span, check_batch_size

ATTEMPTS = 4
"""How often a request is tried while the server is busy or away; pauses of 1, 2 and 4 seconds lie between."""
PASSING = (408, 429, 500, 502, 503, 504)
Task = TypeVar("Task")
Result = TypeVar("Result")


class CompletionsEngine(RemoteEngine):
    """Samples, scores and expands through HTTP, with `batch_size` requests under way at once.

    url: up to and without `/completions`, as in `http://localhost:8000/v1`. model: its name on the server. folder: the served
    model's folder, for tokenizer and direction; its weights are not read. The key of the API, if any, is in the environment
    variable OPENAI_API_KEY. An answer that is written in steps differs from one that is written at once with the same seed,
    because the server begins its random numbers anew with each request; each is repeatable if the server keeps to `seed`.
    """

    def __init__(
        self, url: str, model: str, folder: str | Path, direction: Direction, *, batch_size: int = 16, timeout: float = 600.0
    ) -> None:
        check_batch_size(batch_size)
        if not url.startswith(("http://", "https://")):
            raise UsageError(f"{url!r} is no address of a server; expected one such as http://localhost:8000/v1")
        self._url, self._model, self._timeout = f"{url.rstrip('/')}/completions", model, timeout
        self._batch_size = batch_size
        super().__init__(RemoteText.from_pretrained(folder, direction))

    def _logprobs(self, spans: list[Span]) -> list[list[float]]:
        return self._at_once(self._logprobs_of, spans)

    def _written(self, paths: list[AnswerPath], sampling: Sampling) -> list[tuple[str, int]]:
        return self._at_once(lambda path: self._written_behind(path, sampling), paths)

    def _written_behind(self, path: AnswerPath, sampling: Sampling) -> tuple[str, int]:
        answer = self._ask(
            prompt=self._text.prompt_ids(path),
            max_tokens=sampling.max_new_tokens - path.num_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=seed_of(path),
            **({"top_k": sampling.top_k} if sampling.top_k else {}),
        )
        return answer["choices"][0]["text"], answer["usage"]["completion_tokens"]

    def _logprobs_of(self, span: Span) -> list[float]:
        if len(span.tokens) == span.num_context:
            return []
        answer = self._ask(prompt=span.tokens, max_tokens=0, echo=True, logprobs=1, temperature=0)
        found = (answer["choices"][0].get("logprobs") or {}).get("token_logprobs") or []
        if len(found) < len(span.tokens) or None in found[span.num_context : len(span.tokens)]:
            raise DataError(
                f"{self._url} gave log-probabilities of {len(found)} tokens for a prompt of {len(span.tokens)}; scores need a"
                " server that supports echo with logprobs"
            )
        return [float(value) for value in found[span.num_context : len(span.tokens)]]

    def _at_once(self, work: Callable[[Task], Result], tasks: Iterable[Task]) -> list[Result]:
        start = time.monotonic()
        with ThreadPoolExecutor(self._batch_size) as pool:
            results = list(pool.map(work, tasks))
        self.spent.seconds += time.monotonic() - start
        return results

    def _ask(self, **fields: Any) -> dict[str, Any]:
        """One request; the tokens of prompt and completion are added to what was spent."""
        body = json.dumps({"model": self._model, "n": 1, **fields}).encode()
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        answer = self._answered(urllib.request.Request(self._url, body, headers))
        used = answer.get("usage")
        if not answer.get("choices") or not isinstance(used, dict):
            raise DataError(
                f"{self._url} answered without choices and usage: {json.dumps(answer)[:200]}; is it /v1/completions?"
            )
        self.spent.tokens += used["prompt_tokens"] + (used.get("completion_tokens") or 0)
        return answer

    def _answered(self, request: urllib.request.Request) -> dict[str, Any]:
        for attempt in range(ATTEMPTS):
            try:
                with urllib.request.urlopen(request, timeout=self._timeout) as response:
                    return dict(json.load(response))
            except urllib.error.HTTPError as error:
                reason = f"{error.code} {error.read()[:300].decode('utf-8', 'replace')}"
                if error.code not in PASSING:
                    raise DataError(f"{self._url} refuses the request: {reason}") from error
            except OSError as error:
                reason = str(error)
            if attempt + 1 < ATTEMPTS:
                time.sleep(2**attempt)
        raise TransientError(
            f"{self._url} did not answer {ATTEMPTS} times ({reason}); see that the server runs, then start again"
        )

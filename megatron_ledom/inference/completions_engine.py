"""An engine behind an OpenAI-compatible `/v1/completions` endpoint, such as a vLLM server.

The server is sent token ids, never text: tokenisation, order and the boundary rule stay those of the model's folder here, and a
server can serve a reverse model without knowing it. What is asked of it: prompts as lists of ids, `seed`, and for scores `echo`
with `logprobs`. Prefixes are reused as far as the server does so by itself.
"""

import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

from megatron_ledom.direction import Direction
from megatron_ledom.errors import DataError
from megatron_ledom.inference.completions_answer import AnswerChecks, Completion
from megatron_ledom.inference.completions_client import CompletionsClient
from megatron_ledom.inference.engine import Path as AnswerPath
from megatron_ledom.inference.generation import Sampling
from megatron_ledom.inference.remote_text import RemoteEngine, RemoteText, seed_of
from megatron_ledom.inference.scoring import Span, check_batch_size

IDS_AS_TOKENS = "return_tokens_as_token_ids"
"""vLLM's field to name tokens by their ids; not sent again to a server that refuses it."""
Task = TypeVar("Task")
Result = TypeVar("Result")


class CompletionsEngine(RemoteEngine):
    """Samples, scores and expands through HTTP, with `batch_size` requests under way at once.

    url: up to and without `/completions`, as in `http://localhost:8000/v1`. model: its name on the server. folder: the served
    model's folder, for tokenizer and direction; its weights are not read. The key of the API, if any, is in the environment
    variable OPENAI_API_KEY; key_over_http allows it on plain http to another machine. trust_token_counts accepts scores of a
    server that does not name the tokens which it scored: only their number can be checked then. An answer that is written in
    steps differs from one that is written at once with the same seed, because the server begins its random numbers anew with
    each request; each is repeatable if the server keeps to `seed`.
    """

    def __init__(
        self,
        url: str,
        model: str,
        folder: str | Path,
        direction: Direction,
        *,
        batch_size: int = 16,
        timeout: float = 600.0,
        key_over_http: bool = False,
        trust_token_counts: bool = False,
    ) -> None:
        check_batch_size(batch_size)
        self._client = CompletionsClient(url, timeout=timeout, key_over_http=key_over_http)
        self._model, self._batch_size, self._trusts_counts = model, batch_size, trust_token_counts
        super().__init__(RemoteText.from_pretrained(folder, direction))
        self._checks = AnswerChecks(self._client, model, self._text.tokenizer, self._text.stop_ids)
        self._lock, self._takes_ids_field, self._has_warned = Lock(), True, False

    def _logprobs(self, spans: list[Span]) -> list[list[float]]:
        return self._at_once(self._logprobs_of, spans)

    def _written(self, paths: list[AnswerPath], sampling: Sampling) -> list[tuple[str, int]]:
        return self._at_once(lambda path: self._written_behind(path, sampling), paths)

    def _written_behind(self, path: AnswerPath, sampling: Sampling) -> tuple[str, int]:
        max_tokens = sampling.max_new_tokens - path.num_tokens
        answer = self._ask(
            self._text.prompt_ids(path),
            max_tokens=max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=seed_of(path),
            **({"top_k": sampling.top_k} if sampling.top_k else {}),
        )
        return self._checks.text(answer, path.prompt + path.text, max_tokens), answer.completion_tokens

    def _logprobs_of(self, span: Span) -> list[float]:
        if len(span.tokens) == span.num_context:
            return []
        asked = {"max_tokens": 0, "echo": True, "logprobs": 1, "temperature": 0}
        try:
            answer = self._ask(span.tokens, **asked, **({IDS_AS_TOKENS: True} if self._takes_ids_field else {}))
        except DataError as error:
            if IDS_AS_TOKENS not in str(error):
                raise
            self._takes_ids_field = False
            answer = self._ask(span.tokens, **asked)
        values, is_told = self._checks.prompt_logprobs(answer, span.tokens)
        if not is_told and not self._trusts_counts:
            raise self._checks.unnamed()
        if not is_told:
            self._warn_once()
        return values[span.num_context - 1 :]

    def _warn_once(self) -> None:
        with self._lock:
            if not self._has_warned:
                print(
                    f"{self._client.url} does not name the tokens of the prompts: their number was checked, not their ids",
                    file=sys.stderr,
                )
            self._has_warned = True

    def _at_once(self, work: Callable[[Task], Result], tasks: Iterable[Task]) -> list[Result]:
        start = time.monotonic()
        with ThreadPoolExecutor(self._batch_size) as pool:
            try:
                results = list(pool.map(work, tasks))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)  # the others would fail likewise, after as many pauses
                raise
        self.spent.seconds += time.monotonic() - start
        return results

    def _ask(self, prompt: list[int], *, max_tokens: int, **fields: Any) -> Completion:
        """One request; the tokens of prompt and completion are added to what was spent."""
        answer = self._client.ask({"model": self._model, "n": 1, "prompt": prompt, "max_tokens": max_tokens, **fields})
        completion = self._checks.completion(answer, prompt, max_tokens)
        with self._lock:
            self.spent.tokens += completion.prompt_tokens + completion.completion_tokens
        return completion

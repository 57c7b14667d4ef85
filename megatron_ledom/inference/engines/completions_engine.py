"""An inference engine that uses an OpenAI-compatible `/v1/completions` endpoint, such as a vLLM server.

The server gets token ids, never text. This package decides tokenization and order, so any server can serve a reverse
model. The server must accept prompts as lists of ids and `seed`, and for scores `echo` with `logprobs`.

A response that does not belong exactly to the prompt is refused. A server that adds a BOS, cuts the prompt, tokenizes it again,
ignores `echo` or serves another model returns log-probabilities that look right. The counts, the first value and the names of
the tokens reveal this. If a server adds a BOS and cuts the end, only the names reveal it; a server that names no tokens is
refused unless the user trusts its counts.
"""

import math
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

from megatron_ledom.direction import Direction
from megatron_ledom.errors import DataError, RemoteAnswerError
from megatron_ledom.inference.engines.completions_client import KEY, CompletionsClient
from megatron_ledom.inference.engines.engine import PartialAnswer
from megatron_ledom.inference.engines.remote_engine import RECORDED, RemoteEngine, UnrecordedReverse, seed_of
from megatron_ledom.inference.generation import Sampling
from megatron_ledom.inference.joint_tokenizer import JointTokenizer
from megatron_ledom.inference.scoring import Span, check_batch_size
from megatron_ledom.tokenizers.surfaces import WORD_MARK

ROUNDING = 1e-5
"""A log-probability may exceed 0 by this much, because of float32 rounding."""
FAILED = ("abort", "cancelled", "content_filter", "error", "timeout")
"""Values of finish_reason for a failure of the server, neither the model's eod nor the token limit."""
STANDS_FOR_MINUS_INFINITY = -9999.0
"""The value that the completions API, and vLLM, write for minus infinity, which JSON lacks."""
IDS_AS_TOKENS = "return_tokens_as_token_ids"
"""vLLM's field that names tokens by their ids; not sent again to a server that refuses it."""
Task = TypeVar("Task")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class CallerNames:
    """Names of the environment variable with the server's key, and of the caller's options: for messages."""

    key_variable: str = KEY
    model_option: str = "--forward-served-as or --reverse-served-as"
    trust_advice: str = ", or pass --trust-token-counts if you know that it uses the ids as sent"


RERANK_NAMES = CallerNames()


@dataclass(frozen=True, slots=True)
class Completion:
    """One checked response: its only choice, and the numbers of tokens that the server read and wrote."""

    choice: dict[str, Any]
    prompt_tokens: int
    completion_tokens: int


class CompletionsEngine(RemoteEngine):
    """Samples, scores and expands over HTTP, with up to `batch_size` requests at the same time.

    url: the address without `/completions`, such as `http://localhost:8000/v1`. model: its name on the server. folder: the folder
    of the served model, for tokenizer and direction; its weights are not read. key_over_http: allow the API key, from the
    environment variable OPENAI_API_KEY, on plain http to another machine. trust_token_counts: accept scores of a server that does
    not name the tokens it scored, so only their number can be checked. unrecorded: see `RemoteEngine`. names: of the variable of
    the key, and of the caller's options in messages.

    An answer that is written in steps differs from one that is written at once with the same seed, because each request restarts
    the server's random numbers. Both are repeatable if the server respects `seed`.
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
        unrecorded: UnrecordedReverse = RECORDED,
        names: CallerNames = RERANK_NAMES,
    ) -> None:
        check_batch_size(batch_size)
        self.client = CompletionsClient(url, timeout=timeout, key_over_http=key_over_http, key_variable=names.key_variable)
        self.served_as, self._trusts_counts = model, trust_token_counts
        super().__init__(folder, direction, unrecorded)
        self.checks = CompletionChecks(self.client, model, self.tokenizer, self.stop_ids, names)
        self._pool = ThreadPoolExecutor(batch_size, thread_name_prefix="completions")
        self._lock, self._takes_ids_field, self._has_warned = Lock(), True, False

    def _logprobs(self, spans: list[Span]) -> list[list[float]]:
        return self._at_once(self._logprobs_of, spans)

    def _written(self, answers: list[PartialAnswer], sampling: Sampling) -> list[tuple[str, int]]:
        return self._at_once(lambda answer: self._written_after(answer, sampling), answers)

    def _written_after(self, answer: PartialAnswer, sampling: Sampling) -> tuple[str, int]:
        max_tokens = sampling.max_new_tokens - answer.num_tokens
        completion = self._request(
            self.prompt_ids(answer),
            max_tokens=max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=seed_of(answer),
            **({"top_k": sampling.top_k} if sampling.top_k else {}),
        )
        return self.checks.text(completion, answer.prompt + answer.text, max_tokens), completion.completion_tokens

    def _logprobs_of(self, span: Span) -> list[float]:
        if len(span.tokens) == span.num_context:
            return []
        fields = {"max_tokens": 0, "echo": True, "logprobs": 1, "temperature": 0}
        try:
            completion = self._request(span.tokens, **fields, **({IDS_AS_TOKENS: True} if self._takes_ids_field else {}))
        except DataError as error:
            if IDS_AS_TOKENS not in str(error):
                raise
            self._takes_ids_field = False
            completion = self._request(span.tokens, **fields)
        values, is_named = self.checks.prompt_logprobs(completion, span.tokens)
        if not is_named and not self._trusts_counts:
            raise self.checks.unnamed()
        if not is_named:
            self._warn_once()
        return values[span.num_context - 1 :]

    def _warn_once(self) -> None:
        with self._lock:
            if not self._has_warned:
                print(
                    f"{self.client.url} does not name the tokens of the prompts; their number was checked, but not their ids",
                    file=sys.stderr,
                )
            self._has_warned = True

    def _at_once(self, work: Callable[[Task], Result], tasks: Iterable[Task]) -> list[Result]:
        start = time.monotonic()
        running = [self._pool.submit(work, task) for task in tasks]
        try:
            results = [future.result() for future in running]
        finally:
            for future in running:  # after an error the others would also fail, after the same pauses
                future.cancel()
        with self._lock:
            self.usage.seconds += time.monotonic() - start
        return results

    def _request(self, prompt: list[int], *, max_tokens: int, **fields: Any) -> Completion:
        """Send one request; add the tokens of prompt and completion to the usage."""
        response = self.client.request({"model": self.served_as, "n": 1, "prompt": prompt, "max_tokens": max_tokens, **fields})
        completion = self.checks.completion(response, prompt, max_tokens)
        with self._lock:
            self.usage.tokens += completion.prompt_tokens + completion.completion_tokens
        return completion


class CompletionChecks:
    """Checks that responses belong to their requests; every error names the server.

    client: gives the server's address, and masks the API key in texts of the server. tokenizer, stop_ids: of the local folder.
    """

    def __init__(
        self,
        client: CompletionsClient,
        model: str,
        tokenizer: JointTokenizer,
        stop_ids: list[int],
        names: CallerNames = RERANK_NAMES,
    ) -> None:
        self._client, self._model, self._tokenizer, self._names_of_caller = client, model, tokenizer, names
        self._pieces = {id_: piece for piece, id_ in tokenizer.vocab.items()}
        self._ends = [self._pieces[id_] for id_ in stop_ids if id_ in self._pieces]

    def completion(self, response: dict[str, Any], prompt: list[int], max_tokens: int) -> Completion:
        """Return the only choice of a response to `prompt` (ids); refuse another model, other counts and several choices."""
        self.model(response)
        choices, used = response.get("choices"), response.get("usage")
        if not choices or not isinstance(choices, list) or not isinstance(used, dict):
            raise self.refusal(f"without choices and usage ({self._quoted(str(response), 200)})", "is it /v1/completions?")
        if len(choices) != 1 or not isinstance(choices[0], dict) or choices[0].get("index") not in (None, 0):
            indices = [choice.get("index") if isinstance(choice, dict) else choice for choice in choices]
            raise self.refusal(f"with the choices {self._shown(indices, 200)}, expected one, of index 0", "use another server")
        num_read, num_written = used.get("prompt_tokens"), used.get("completion_tokens")
        if type(num_read) is not int or num_read != len(prompt):
            raise self.refusal(
                f"with usage.prompt_tokens={self._shown(num_read)} for a prompt of {len(prompt)} ids",
                "the server adds a BOS, cuts prompts or tokenizes them again, so its probabilities differ: turn that off there",
            )
        if not max_tokens:  # some servers write a token anyway; it is discarded
            num_written = num_written if type(num_written) is int else 0
        elif type(num_written) is not int or not 0 <= num_written <= max_tokens:
            raise self.refusal(
                f"with usage.completion_tokens={self._shown(num_written)}, expected at most {max_tokens}",
                "use another server",
            )
        self.prompt_ids(choices[0], prompt)
        return Completion(choices[0], num_read, num_written)

    def model(self, response: dict[str, Any]) -> None:
        """Refuse a response of another model."""
        model = response.get("model")
        if isinstance(model, str) and model and model != self._model:
            raise self.refusal(
                f"for the model {self._quoted(model, 200)}, expected {self._model!r}",
                f"if it is the right model, name it with {self._names_of_caller.model_option}",
            )

    def prompt_ids(self, choice: dict[str, Any], prompt: list[int]) -> None:
        """Refuse a choice whose `prompt_token_ids`, if it has them, are others than `prompt`."""
        ids = choice.get("prompt_token_ids")
        if ids and ids != prompt:
            raise self.refusal(f"for the prompt ids {self._shown(ids)}, sent were {str(prompt)[:80]}", "use another server")

    def text(self, completion: Completion, given: str, max_tokens: int) -> str:
        """Return the text that was written after `given`; refuse a missing or cut text, and one that begins with `given`."""
        choice = completion.choice
        text, reason = choice.get("text"), choice.get("finish_reason")
        if not isinstance(text, str):
            raise self.refusal(
                f"with the text {self._shown(text)}, expected a text", "is it /v1/completions, not a chat endpoint?"
            )
        if reason in FAILED or (reason == "length" and completion.completion_tokens < max_tokens):
            raise self.refusal(
                f"that ended by {self._shown(reason)} after {completion.completion_tokens} of {max_tokens} tokens",
                "raise the server's own limit, or lower --max-new-tokens",
            )
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise self.refusal(f"with half of a surrogate pair in the text {self._quoted(text)}", "use another server")
        num_shown = len(self._tokenizer.encode(text)) if given and text.startswith(given) else 0
        if num_shown > completion.completion_tokens + 1:
            raise self.refusal("that repeats the prompt before the written text", "turn echo off there")
        if end := next((end for end in self._ends if text.endswith(end)), None):
            raise self.refusal(f"that writes the token {end!r} as text", "let the server omit special tokens from its texts")
        if self._client.mask.is_contained_in(text):
            raise self.refusal("whose text contains the API key", "use another server, and replace the key")
        return text

    def prompt_logprobs(self, completion: Completion, prompt: list[int]) -> tuple[list[float], bool]:
        """Return the log-probabilities of the ids after the first, and True if the server named the tokens they belong to."""
        logprobs = completion.choice.get("logprobs")
        found = logprobs.get("token_logprobs") if isinstance(logprobs, dict) else None
        if not isinstance(logprobs, dict) or not isinstance(found, list) or not found:
            raise self.refusal("without logprobs.token_logprobs", "scores need a server that supports echo with logprobs")
        if len(found) != len(prompt) or found[0] is not None:
            raise self.refusal(
                f"with {len(found)} log-probabilities, the first {self._shown(found[0])}, for a prompt of {len(prompt)} ids, expected"
                f" {len(prompt)}, the first null",
                "scores need a server that supports echo with logprobs and max_tokens=0, and adds no BOS",
            )
        values = [self.logprob(value, f"token {position} of the prompt") for position, value in enumerate(found[1:], 1)]
        return values, self._names_all_tokens(
            completion.choice.get("prompt_token_ids") == prompt, logprobs.get("tokens"), prompt
        )

    def unnamed(self) -> RemoteAnswerError:
        """Return the error for a server that does not name the tokens it scored."""
        return self.refusal(
            "that does not name the tokens of the prompt, so an added BOS with a cut end would shift every score unnoticed",
            f"let it return logprobs.tokens or prompt_token_ids{self._names_of_caller.trust_advice}",
        )

    def logprob(self, value: Any, place: str) -> float:
        """Return a checked log-probability, with minus infinity for its placeholder; refuse other placeholders. place: its token."""
        if value == STANDS_FOR_MINUS_INFINITY:
            return -math.inf
        if type(value) not in (int, float) or not STANDS_FOR_MINUS_INFINITY < value <= ROUNDING:
            raise self.refusal(
                f"with the log-probability {self._client.shown(str(value), 40)} for {place}, expected a number up to 0"
                f" and above {STANDS_FOR_MINUS_INFINITY:g}, which stands for minus infinity",
                "check that the server's weights are complete and that it returns natural logarithms",
            )
        return min(0.0, float(value))

    def _names_all_tokens(self, has_ids: bool, names: Any, prompt: list[int]) -> bool:
        """Refuse tokens of the prompt other than those that were sent; return False if the server does not name all of them.

        Names that are all equal for different ids count as missing. The name of a special token, of white space and of a part of
        a character may be empty.
        """
        if not isinstance(names, list) or len({str(name) for name in names}) < min(2, len(set(prompt))):
            return has_ids
        if len(names) != len(prompt):
            raise self.refusal(f"with {len(names)} tokens for a prompt of {len(prompt)} ids", "use another server")
        num_compared, num_unnamed = 0, 0
        for position, (name, id_) in enumerate(zip(names, prompt, strict=True)):
            if not isinstance(name, str) or not _is_whole(name):
                num_unnamed += not isinstance(name, str) or self._has_whole_text(id_)
                continue
            num_compared += 1
            if not self._names(name, id_):
                raise self.refusal(
                    f"whose token {position} of the prompt is {self._quoted(name, 40)}; sent was id {id_}, {self._pieces.get(id_)!r}",
                    "the server adds tokens before the prompt or has another tokenizer, so its probabilities differ: turn that off there",
                )
        return has_ids or (num_compared > 0 and not num_unnamed)

    def _has_whole_text(self, id_: int) -> bool:
        """Return True for an id that a server can name by its text: no special token, white space, or part of a character."""
        return id_ not in self._tokenizer.special_ids and _is_whole(self._text_of(id_))

    def _text_of(self, id_: int) -> str:
        surface = (self._tokenizer.surfaces or {}).get(id_)
        return self._tokenizer.decode([id_]) if surface is None else surface.decode("utf-8", "replace")

    def _names(self, name: str, id_: int) -> bool:
        """Return True if `name` is a name of the id: its number, its piece, or the text of the piece."""
        text = self._text_of(id_)
        if name in (f"token_id:{id_}", str(id_), self._pieces.get(id_), text, repr(text)[1:-1]):
            return True
        if not _is_whole(text) and not name.isascii():  # bytes of a character, shown as the whole character
            return True
        text = text.replace("\ufffd", "")
        return _bare(name) in (_bare(text), _bare(self._pieces.get(id_, "")))

    def refusal(self, found: str, advice: str) -> RemoteAnswerError:
        """Return the error for a wrong response."""
        return RemoteAnswerError(f"{self._client.url} gave an answer {found}; {advice}")

    def _shown(self, value: Any, most: int = 80) -> str:
        """Return a value of the server for a message, with the API key masked, then cut."""
        return self._quoted(value, most) if isinstance(value, str) else self._client.shown(str(value), most)

    def _quoted(self, text: str, most: int = 80) -> str:
        return repr(self._client.shown(text, most))


def _is_whole(name: str) -> bool:
    """Return True for a name that is more than a space or a part of a character."""
    return bool(_bare(name)) and "\ufffd" not in name and not name.startswith("bytes:")


def _bare(name: str) -> str:
    return name.replace(WORD_MARK, " ").strip()

"""Client of a server that computes Reverse Reward at `/v1/reward`."""

import json
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from threading import Lock
from typing import Any

from megatron_ledom.errors import DataError
from megatron_ledom.inference.engines.completions_client import CompletionsClient
from megatron_ledom.inference.reverse_reward.reward import RewardSettings

Scored = tuple[float | None, str]
"""A reward, or None without one, and the reason if it is not finite."""
PARALLEL = 8
"""Largest number of requests at the same time; the server computes them together."""
MOST_ANSWERS, MOST_BYTES = 256, 1 << 20
"""Largest number of answers in a request, and of their bytes as JSON, unless one answer has more; servers limit both."""


class RewardServer:
    """Asks a server for rewards, with one request for each prompt and its answers."""

    def __init__(self, url: str, settings: RewardSettings, timeout_seconds: float, *, key_over_http: bool = False) -> None:
        self.url = url.rstrip("/").removesuffix("/v1/reward").removesuffix("/v1") + "/v1"
        self.settings, self._timeout, self._key_over_http = settings, timeout_seconds, key_over_http
        self._made: CompletionsClient | None = None
        self._lock = Lock()
        self._client()  # refuses an invalid address at once

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without the connection and the lock, which cannot be pickled."""
        return {**self.__dict__, "_made": None, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = Lock()

    def score(self, questions: Sequence[tuple[str, Sequence[str]]]) -> list[list[Scored]]:
        """Return the rewards in the order of the questions and answers."""
        parts = [(prompt, part) for prompt, answers in questions for part in parts_of(answers)]
        with ThreadPoolExecutor(min(PARALLEL, len(parts))) as pool:
            scored = iter([one for found in pool.map(self._ask, parts) for one in found])
        return [[next(scored) for _ in answers] for _, answers in questions]

    def _ask(self, question: tuple[str, Sequence[str]]) -> list[Scored]:
        prompt, answers = question
        client = self._client()
        asked = {"prompt": prompt, "candidates": list(answers), "too_long": "skip"}  # a text that is too long gets null
        answer = client.request({**asked, **asdict(self.settings)})
        rewards, results = answer.get("rewards"), answer.get("results")
        if not isinstance(rewards, list) or len(rewards) != len(answers):
            raise DataError(
                f"{client.url} answered with {client.shown(str(rewards))!r} under rewards, expected a list of {len(answers)} numbers;"
                " check that it is a reward server of this package"
            )
        details = results if isinstance(results, list) and len(results) == len(answers) else [{}] * len(answers)
        return [self._scored(client, reward, detail) for reward, detail in zip(rewards, details, strict=True)]

    def _scored(self, client: CompletionsClient, reward: Any, detail: Any) -> Scored:
        """Return a checked reward. JSON has no minus infinity: it is null, and listed in `minus_infinity` of the result."""
        fields = detail if isinstance(detail, dict) else {}
        if reward is None:
            if "reward" in (fields.get("minus_infinity") or []):
                return -math.inf, "a model gives it the probability 0"
            return None, client.shown(str(fields.get("skipped") or "the server gives none: it is empty or too long"))
        is_number = isinstance(reward, int | float) and not isinstance(reward, bool)
        if not is_number or not abs(reward) < 1e300:  # NaN compares as False
            raise DataError(
                f"{client.url} answered with the reward {client.shown(str(reward))}, expected a finite number; check the server's models"
            )
        return float(reward), ""

    def _client(self) -> CompletionsClient:
        with self._lock:
            if self._made is None:
                self._made = CompletionsClient(
                    self.url, endpoint="reward", timeout=self._timeout, key_over_http=self._key_over_http
                )
            return self._made


def parts_of(answers: Sequence[str]) -> list[list[str]]:
    """Divide answers into the lists of single requests, in their order."""
    parts: list[list[str]] = []
    num_bytes = 0
    for answer in answers:
        size = len(json.dumps(answer))  # clients write other letters than ASCII as \uXXXX
        if not parts or len(parts[-1]) == MOST_ANSWERS or num_bytes + size > MOST_BYTES:
            parts.append([])
            num_bytes = 0
        parts[-1].append(answer)
        num_bytes += size
    return parts

"""The next token of each row of a batch, chosen with the row's own settings and random numbers, so no row depends on the others.

Shapes: B rows, S positions, V ids of the logits.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import TYPE_CHECKING

import torch
from transformers import LogitsProcessor, LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

if TYPE_CHECKING:
    from megatron_ledom.inference.generation import Sampling, Writer


def uniform_draw(key: str, position: int) -> float:
    """Return the random number, uniform in [0, 1), that chooses the token at `position` of the text with this key."""
    digest = blake2b(f"{key}@{position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53


@dataclass(frozen=True, slots=True)
class RowSettings:
    """Settings of one row.

    key: of its random numbers. trimmed: the bytes that it must spell first (token healing). limit: the most new tokens.
    num_written_before: the tokens that an earlier call wrote. num_likeliest: the number of likeliest tokens to record at each step.
    """

    key: str
    trimmed: bytes
    limit: int
    sampling: "Sampling"
    num_written_before: int = 0
    num_likeliest: int = 0

    @property
    def filters(self) -> tuple[float, float, int]:
        """Temperature, top_p and top_k, which decide from which tokens the row chooses."""
        return self.sampling.temperature, self.sampling.top_p, self.sampling.top_k


@dataclass(frozen=True, slots=True)
class WrittenIds:
    """The ids that a row wrote, in model order and with eod.

    logprobs: the log-probabilities, without temperature, of those that belong to the new text. likeliest: for each of these the
    likeliest ids with their log-probabilities, if requested.
    """

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    likeliest: list[list[tuple[int, float]]] = field(default_factory=list)


class RowChoice(LogitsProcessor):  # type: ignore[misc]
    """Chooses the next token of each row with the row's own random numbers, and excludes all other tokens.

    new_ids: the ids that each row wrote in this call, up to its stop. logprobs: the log-probabilities, without temperature, of
    those that belong to the new text. likeliest: for each of these the likeliest ids with their log-probabilities, if requested.
    """

    def __init__(self, writer: "Writer", rows: Sequence[RowSettings], num_given: int) -> None:
        self.rows, self.writer = list(rows), writer
        self.new_ids: list[list[int]] = [[] for _ in rows]
        self.logprobs: list[list[float]] = [[] for _ in rows]
        self.likeliest: list[list[list[tuple[int, float]]]] = [[] for _ in rows]
        self.is_done = [False] * len(rows)
        self._healing = writer.healing_processor([row.trimmed for row in rows], num_given)
        self._groups: dict[tuple[float, float, int], list[int]] = {}
        for index, row in enumerate(rows):
            self._groups.setdefault(row.filters, []).append(index)

    def written(self, row: int) -> WrittenIds:
        """Return what a row wrote so far."""
        return WrittenIds(self.new_ids[row], self.logprobs[row], self.likeliest[row])

    def num_written(self, row: int) -> int:
        """Return the number of new tokens, with eod; those that repeat the edge of the given text (token healing) do not count."""
        return len(self.logprobs[row])

    def has_ended(self, row: int) -> bool:
        """Return True if a row wrote eod or reached its limit."""
        return self.num_written(row) >= self.rows[row].limit or self.new_ids[row][-1] in self.writer.stop_ids

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return scores [B, V] of 0 for the chosen id of each row and -inf for all others; input_ids [B, S], scores [B, V]."""
        logprobs_BV = torch.log_softmax(scores.float(), dim=-1)
        healed_BV = self._healing(input_ids, scores).float()
        chosen_B = torch.zeros(len(self.rows), dtype=torch.long, device=scores.device)
        for filters, members in self._groups.items():
            chosen_B[members] = self._chosen(filters, members, input_ids[members], healed_BV[members])
        values = logprobs_BV.gather(1, chosen_B[:, None])[:, 0].tolist()
        for row, (token, value) in enumerate(zip(chosen_B.tolist(), values, strict=True)):
            if not self.is_done[row]:
                self.new_ids[row].append(token)
                if self.writer.counts_as_new(self.new_ids[row], self.rows[row].trimmed):
                    self._record(row, value, logprobs_BV[row])
        return torch.full_like(scores, -torch.inf).scatter(1, chosen_B[:, None], 0.0)

    def _chosen(
        self, filters: tuple[float, float, int], members: list[int], input_ids: torch.Tensor, scores_BV: torch.Tensor
    ) -> torch.Tensor:
        """Return the chosen id [B] of rows with equal filters."""
        temperature, top_p, top_k = filters
        if temperature == 0:
            return scores_BV.argmax(dim=-1)
        warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
        warpers += [TopKLogitsWarper(top_k)] if top_k else []
        warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
        cumulated_BV = torch.softmax(warpers(input_ids, scores_BV), dim=-1).double().cumsum(dim=-1)
        draws = [
            uniform_draw(self.rows[row].key, self.rows[row].num_written_before + len(self.new_ids[row])) for row in members
        ]
        threshold_B1 = torch.tensor(draws, dtype=torch.double, device=scores_BV.device)[:, None] * cumulated_BV[:, -1:]
        return torch.searchsorted(cumulated_BV, threshold_B1, right=True)[:, 0].clamp(max=scores_BV.shape[1] - 1)

    def _record(self, row: int, logprob: float, logprobs_V: torch.Tensor) -> None:
        self.logprobs[row].append(logprob)
        if num := self.rows[row].num_likeliest:
            values, ids = logprobs_V.topk(min(num, len(logprobs_V)))
            self.likeliest[row].append(list(zip(ids.tolist(), values.tolist(), strict=True)))

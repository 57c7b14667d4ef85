"""The lines of a reranking file: reading, checking, and writing them as valid JSON."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ledom.errors import DataError
from megatron_ledom.inference.json_fields import long_integers, read_objects, text_of, writable
from megatron_ledom.inference.line_output import LineKind
from megatron_ledom.inference.reverse_reward.reward import Candidate

WRITTEN = ("greedy", "scores", "ranking", "best", "search", "num_skipped", "skipped")
"""Fields that ranking writes; it replaces those of an input that was ranked before."""
RANKED = LineKind(counts=("num_lines", "num_candidates", "num_skipped", "num_skipped_prompts"), written=WRITTEN, mark="ranking")

LEAST_MEAN = -100.0
"""Smallest plausible mean log-probability of a token; a given sum below it contains -9999 or -1e29 for minus infinity."""


@dataclass(frozen=True, slots=True)
class Record:
    """One line of a reranking file; `fields` are all its fields as read.

    problems: for each given candidate the reason why it gets no score, or None. prompt_problem: the reason why no answer can be
    written for the prompt. A line whose prompt an earlier reranking skipped has no candidates and stays skipped with its reason.
    """

    number: int
    where: str
    prompt: str
    candidates: list[Candidate] | None
    fields: dict[str, Any]
    problems: tuple[str | None, ...] = ()
    prompt_problem: str | None = None

    @property
    def was_skipped(self) -> bool:
        """True for a line that an earlier reranking skipped."""
        return self.candidates == []

    def own_fields(self) -> dict[str, Any]:
        """Return the fields without "num_skipped" and "skipped" of an earlier ranking, which not every ranking writes."""
        return {name: value for name, value in self.fields.items() if name not in ("num_skipped", "skipped")}


def read_records(path: Path, *, sampled: bool) -> Iterator[Record]:
    """Yield the checked lines of a reranking file, without blank lines. Raises DataError with the file and the line."""
    for index, where, fields in read_objects(path):
        with long_integers():
            record = _parse_record(fields, index, where, sampled)
        yield record


def _parse_record(fields: dict[str, Any], number: int, where: str, sampled: bool) -> Record:
    prompt = text_of(fields, "prompt", where)
    given = fields.get("candidates")
    if sampled:
        if given is not None:
            raise DataError(f"{where}: has candidates already; rank them without --sample and --beam, or remove the field")
        return Record(number, where, prompt, None, writable(fields, where))
    skipped = fields.get("skipped")
    if given == [] and isinstance(skipped, str):
        return Record(number, where, prompt, [], writable(fields, where), prompt_problem=skipped)
    if not isinstance(given, list) or not given:
        raise DataError(
            f'{where}: expected a list of at least one answer under "candidates"; add one, or pass --sample N to'
            " let the forward model write N"
        )
    candidates = [parse_candidate(item, f"{where}: candidate {i}") for i, item in enumerate(given)]
    return Record(number, where, prompt, candidates, writable(fields, where))


def parse_candidate(item: Any, where: str) -> Candidate:
    """Return a candidate, given as a text or as an object with its forward_logprob; raise DataError if it is neither."""
    if isinstance(item, str):
        return Candidate(item)
    if not isinstance(item, dict) or not isinstance(item.get("text"), str):
        raise DataError(f'{where}: expected a text, or an object with a text under "text"; write it as one of them')
    logprob, num_tokens = item.get("forward_logprob"), item.get("forward_tokens")
    if logprob is None:
        return Candidate(item["text"])
    if type(logprob) not in (int, float) or not -1e300 < logprob <= 0:  # an int may be too large for a float
        raise DataError(
            f"{where}: forward_logprob={repr(logprob)[:40]} is not the logarithm of a probability (a number up to 0); correct or remove it"
        )
    if num_tokens is not None and (type(num_tokens) is not int or not 0 <= num_tokens < 1 << 53):
        raise DataError(f"{where}: forward_tokens={repr(num_tokens)[:40]} is not a number of tokens; correct or remove it")
    most_tokens = len(item["text"].encode("utf-8", "replace")) if num_tokens is None else num_tokens
    if logprob <= -9999 and logprob < LEAST_MEAN * most_tokens:
        raise DataError(
            f"{where}: forward_logprob={repr(logprob)[:40]} for at most {most_tokens} tokens contains a placeholder for minus infinity;"
            " remove it, then the forward model scores the answer"
        )
    return Candidate(item["text"], float(logprob), num_tokens)

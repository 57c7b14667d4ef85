"""Texts of a reranking file that are too long for a model: found before anything is computed, then refused or skipped by name."""

import sys
from collections.abc import Sequence
from dataclasses import replace

from tqdm import tqdm

from megatron_ledom.errors import DataError, LedomError
from megatron_ledom.inference.engine import Engine
from megatron_ledom.inference.rerank_input import Record
from megatron_ledom.inference.rerank_settings import SKIP, RerankSettings
from megatron_ledom.inference.reverse_reward import candidate_faults

NUM_NAMED = 20
"""Skipped texts that are named on stderr; further ones are counted alone."""


class SkipLog:
    """Names skipped texts on stderr, the first ones of many."""

    def __init__(self) -> None:
        self._num = 0

    def add(self, where: str, faults: Sequence[str | None], item: str = "candidate") -> None:
        """Name those of a line's candidates, or its prompt, that have a fault."""
        for index, fault in enumerate(faults):
            if fault is None:
                continue
            self._num += 1
            name = f"{where}: {item} {index}" if len(faults) > 1 or item == "candidate" else f"{where}: {item}"
            if self._num <= NUM_NAMED:
                tqdm.write(f"skipped: {name}: {fault}", file=sys.stderr)
            elif self._num == NUM_NAMED + 1:
                tqdm.write('further skipped texts are counted only; the output has "skipped" where they are', file=sys.stderr)


def with_faults(
    windows: list[list[Record]], forward: Engine, reverse: Engine, settings: RerankSettings, skips: SkipLog
) -> list[list[Record]]:
    """Return the records, each with what of it is too long for a model; refuse or name these, as the settings say.

    DataError names the first of them with its line. A text that cannot be tokenised is refused in any case.
    """
    refused: list[str] = []
    found = []
    for window in windows:
        checked = [_checked(record, forward, reverse, settings) for record in window]
        for record in checked:
            if settings.too_long == SKIP or record.was_skipped:
                skips.add(record.where, record.faults)
                skips.add(record.where, [record.prompt_fault], "prompt")
                continue
            refused += [f"{record.where}: candidate {i}: {fault}" for i, fault in enumerate(record.faults) if fault]
            refused += [f"{record.where}: {record.prompt_fault}"] if record.prompt_fault else []
        found.append(checked)
    if refused:
        remedy = "shorten it" if settings.sampling is None else "shorten the prompt, lower --max-new-tokens"
        more = f" ({len(refused) - 1} more like it)" if len(refused) > 1 else ""
        raise DataError(f"{refused[0]}{more}; {remedy}, or pass --too-long skip")
    return found


def _checked(record: Record, forward: Engine, reverse: Engine, settings: RerankSettings) -> Record:
    try:
        if record.was_skipped:
            return record
        if record.candidates is not None:
            faults = candidate_faults(forward, reverse, record.prompt, record.candidates, settings.reward)
            return replace(record, faults=tuple(faults))
        return replace(record, prompt_fault=_prompt_fault(record.prompt, forward, reverse, settings))
    except LedomError as error:
        raise type(error)(f"{record.where}: {error}") from error


def _prompt_fault(prompt: str, forward: Engine, reverse: Engine, settings: RerankSettings) -> str | None:
    """Return why no answer can be written, or where such are refused, why one of `max_new_tokens` could not be scored."""
    if settings.sampling is None:
        return None
    num_new = settings.sampling.max_new_tokens
    if settings.too_long == SKIP:
        return forward.growth_fault(prompt, num_new)
    num_new += settings.reward.include_ends
    return forward.growth_fault(prompt, num_new) or reverse.growth_fault(prompt, num_new)

"""The protocol of a model that tasks are run with, and the model of a Hugging Face folder that has it."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from megatron_ledom.direction import Direction
from megatron_ledom.inference.language_model import ForwardLM, ReverseLM
from megatron_ledom.inference.model_folder import OptionNames, read_model_config
from megatron_ledom.inference.scoring import SpanScore, check_batch_size


class TaskModel(Protocol):
    """A language model of one direction. Texts are text order everywhere."""

    @property
    def direction(self) -> Direction:
        """The direction in which the model reads."""

    def score(self, pairs: Sequence[tuple[str, str]]) -> list[SpanScore]:
        """Of each (preceding, following): log P(following | preceding) of a forward model, log P(preceding | following) of a
        reverse one, as `Engine.score` does: both parts are tokenised as one text, an empty given part is the document's edge."""

    def write(self, given: Sequence[str], *, max_new_tokens: int, stop_strings: Sequence[str]) -> list[str]:
        """The likeliest text behind (forward) or in front of (reverse) each given one, up to eod, a stop string or the limit."""


class LanguageTaskModel:
    """A `ForwardLM` or `ReverseLM` in this process; at most `batch_size` sequences at once."""

    def __init__(self, language_model: ForwardLM | ReverseLM, batch_size: int = 16) -> None:
        check_batch_size(batch_size)
        self._lm, self._batch_size = language_model, batch_size

    @property
    def direction(self) -> Direction:
        """See `TaskModel.direction`."""
        return self._lm.direction

    def score(self, pairs: Sequence[tuple[str, str]]) -> list[SpanScore]:
        """See `TaskModel.score`."""
        return self._lm.span_scores(list(pairs), False, self._batch_size)

    def write(self, given: Sequence[str], *, max_new_tokens: int, stop_strings: Sequence[str]) -> list[str]:
        """See `TaskModel.write`."""
        options: dict[str, Any] = {
            "max_new_tokens": max_new_tokens,
            "stop_strings": stop_strings,
            "batch_size": self._batch_size,
        }
        if isinstance(self._lm, ReverseLM):
            return [written.preceding for written in self._lm.generate_preceding(list(given), **options)]
        return [written.following for written in self._lm.generate_following(list(given), **options)]


def direction_of(folder: Path, asked: str | None, option_names: OptionNames) -> Direction:
    """Return what is asked for, else what the folder records; of a folder that records none, forward, which is said.

    option_names: how the message names a direction.
    """
    recorded = read_model_config(folder).get("direction")
    if asked is None and recorded is None:
        print(
            f"{folder} records no direction and is judged as a forward model; for a reverse one give {option_names.reverse}",
            file=sys.stderr,
        )
    return Direction(asked or recorded or Direction.FORWARD)


def load_language_model(folder: Path, direction: Direction, asked: str | None, **loading: Any) -> ForwardLM | ReverseLM:
    """The model of a folder, which reads `direction`. asked: what the user gave; loading: as `LanguageModel.from_pretrained`."""
    kind = ReverseLM if direction is Direction.REVERSE else ForwardLM
    return kind.from_pretrained(folder, direction=asked, **loading)

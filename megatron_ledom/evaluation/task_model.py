"""The protocol of a model that can be evaluated, and its implementation for a Hugging Face folder."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from megatron_ledom.direction import BOTH, Direction
from megatron_ledom.errors import UsageError
from megatron_ledom.inference.language_model import ForwardLM, ReverseLM
from megatron_ledom.inference.model_folder import OptionNames, read_model_config
from megatron_ledom.inference.scoring import SpanScore, check_batch_size


class TaskModel(Protocol):
    """A language model of one direction. All texts are in text order."""

    @property
    def direction(self) -> Direction:
        """The direction in which the model reads."""

    def score(self, pairs: Sequence[tuple[str, str]]) -> list[SpanScore]:
        """Return log P(following | preceding) of each pair; a reverse model returns log P(preceding | following).

        As in `Engine.score`, both parts are tokenized as one text. An empty given part means the edge of the document.
        """

    def write(self, given: Sequence[str], *, max_new_tokens: int, stop_strings: Sequence[str]) -> list[str]:
        """Return the greedily decoded text after (forward) or before (reverse) each given text.

        It ends at eod, a stop string or the limit.
        """


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


def direction_of(folder: Path, requested: str | None, option_names: OptionNames) -> Direction:
    """Return the requested direction, else the recorded one; without either, forward, with a message.

    Raises UsageError without a request for a model that reads both.

    option_names: the option or argument that the message names.
    """
    recorded = read_model_config(folder).get("direction")
    if requested is not None and requested not in [*Direction, BOTH]:
        raise UsageError(f"the direction {requested!r} is not reverse or forward; correct it")
    if BOTH in (recorded, requested) and requested in (None, BOTH):
        raise UsageError(
            f"the model of {folder} reads both directions; choose one with {option_names.reverse} or {option_names.forward}"
        )
    if requested is None and recorded is None:
        print(
            f"{folder} records no direction and is evaluated as a forward model; for a reverse model give {option_names.reverse}",
            file=sys.stderr,
        )
    return Direction(requested or recorded or Direction.FORWARD)


def load_language_model(folder: Path, direction: Direction, requested: str | None, **loading: Any) -> ForwardLM | ReverseLM:
    """Load the model of a folder in `direction`.

    requested: the user's option; loading: arguments of `LanguageModel.from_pretrained`.
    """
    kind = ReverseLM if direction is Direction.REVERSE else ForwardLM
    return kind.from_pretrained(folder, direction=requested, **loading)

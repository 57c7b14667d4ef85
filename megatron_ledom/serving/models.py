"""The models of a server, and the computations that its thread does with them."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_ledom.direction import Direction
from megatron_ledom.errors import UsageError
from megatron_ledom.inference.engines.transformers_engine import TransformersEngine
from megatron_ledom.inference.language_model import ForwardLM, LanguageModel, ReverseLM
from megatron_ledom.inference.model_folder import COMMAND_OPTIONS, read_model_config
from megatron_ledom.serving.metrics import Metrics
from megatron_ledom.serving.settings import ServeSettings
from megatron_ledom.tokenizers.reader import read_tokenizer

SCORED_BATCHES = 8


class UnknownModel(UsageError):
    """A request names a model that the server does not have."""


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model with the name under which it is served."""

    name: str
    folder: Path
    language_model: LanguageModel
    engine: TransformersEngine
    tokenizer_sha256: str
    loaded_at: int

    @property
    def direction(self) -> Direction:
        """The direction of the model."""
        return self.language_model.direction

    def as_fields(self) -> dict[str, Any]:
        """Return the model's entry in `/v1/models`."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.loaded_at,
            "owned_by": "megatron_ledom",
            "direction": str(self.direction),
            "max_model_len": self.language_model.num_positions,
            "tokenizer_sha256": self.tokenizer_sha256,
        }


class ServedModels:
    """The reverse model and, if there is one, the forward model."""

    def __init__(self, reverse: ServedModel, forward: ServedModel | None, metrics: Metrics) -> None:
        self.reverse, self.forward, self._metrics = reverse, forward, metrics

    @classmethod
    def load(cls, settings: ServeSettings, metrics: Metrics) -> "ServedModels":
        """Load the folders of the settings, after checking both."""
        folders = [folder for folder in (settings.forward, settings.reverse) if folder is not None]
        for folder in folders:
            read_model_config(folder)
        names = {Direction.REVERSE: settings.reverse.resolve().name}
        if settings.forward is not None:
            names[Direction.FORWARD] = settings.forward.resolve().name
        if len(set(names.values())) < len(names):
            names = {direction: f"{name}-{direction}" for direction, name in names.items()}
        reverse_lm = ReverseLM.from_pretrained(
            settings.reverse, direction=settings.direction, eod_id=settings.eod_id, option_names=COMMAND_OPTIONS
        )
        reverse = _served(reverse_lm, names[Direction.REVERSE], settings.reverse, settings.batch_size)
        forward = None
        if settings.forward is not None:
            forward_lm = ForwardLM.from_pretrained(settings.forward)
            forward = _served(forward_lm, names[Direction.FORWARD], settings.forward, settings.batch_size)
        return cls(reverse, forward, metrics)

    @cached_property
    def special_tokens(self) -> list[str]:
        """The texts of the special tokens of all tokenizers, the longest first."""
        tokenizers = [model.language_model.tokenizer for model in self.all]
        names = {name for one in tokenizers for name, id_ in one.vocab.items() if id_ in one.special_ids and name}
        return sorted(names, key=len, reverse=True)

    @property
    def score_rows(self) -> int:
        """The most sequences to score in one call: several batches, so that rows of similar length share one."""
        return SCORED_BATCHES * self.reverse.engine.batch_size

    @property
    def all(self) -> list[ServedModel]:
        """All models, the reverse one first."""
        return [self.reverse, *([self.forward] if self.forward else [])]

    def named_or_refuse(self, name: str) -> ServedModel:
        """Return the model with a name, else the one of the direction with that name; raise UnknownModel if there is none."""
        known = {**{str(model.direction): model for model in self.all}, **{model.name: model for model in self.all}}
        if name in known:
            return known[name]
        raise UnknownModel(f"the model {name!a} is not served here; use one of: {', '.join(model.name for model in self.all)}")

    def forward_or_refuse(self, remedy: str) -> ServedModel:
        """Return the forward model; raise UsageError if the server has none."""
        if self.forward is None:
            raise UsageError(f"this server has no forward model; {remedy}, or start it with --forward DIR")
        return self.forward

    def count_tokens(self) -> None:
        """Add the tokens that the engines read since the last call to the metrics."""
        for model in self.all:
            usage = model.engine.usage
            self._metrics.tokens.labels(str(model.direction), "scored").inc(usage.tokens)
            usage.tokens = 0

    def count_written(self, direction: Direction, read: Sequence[int], written: Sequence[int]) -> None:
        """Add the tokens of written texts to the metrics."""
        self._metrics.tokens.labels(str(direction), "read").inc(sum(read))
        self._metrics.tokens.labels(str(direction), "written").inc(sum(written))


def _served(language_model: LanguageModel, name: str, folder: Path, batch_size: int) -> ServedModel:
    engine = TransformersEngine(language_model, batch_size)
    return ServedModel(name, folder, language_model, engine, read_tokenizer(str(folder)).sha256, int(time.time()))

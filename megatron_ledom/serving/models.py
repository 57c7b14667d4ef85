"""The models of a server: in a process of their own, or on an upstream."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from threading import Lock
from typing import Any

from megatron_ledom.direction import Direction
from megatron_ledom.errors import UsageError
from megatron_ledom.inference.engines.engine import Engine
from megatron_ledom.inference.engines.model_process import ModelProcess, ModelProcessLost
from megatron_ledom.inference.engines.process_engine import ProcessEngine
from megatron_ledom.inference.model_folder import read_model_config
from megatron_ledom.inference.row_generation import RowWriter
from megatron_ledom.serving.loading import load_model, unrecorded_reverse
from megatron_ledom.serving.metrics import Metrics
from megatron_ledom.serving.settings import ServeSettings
from megatron_ledom.serving.upstream import UpstreamEngine, connect
from megatron_ledom.serving.work_queue import LOCAL_LANE, SCORE_LANE, Lane
from megatron_ledom.tokenizers.reader import read_tokenizer

SCORED_BATCHES = 8
ONE_REQUEST = 1
"""`shared_rows` of an upstream: requests share no call, because the upstream makes the batches, and an error stays with its request."""


class UnknownModel(UsageError):
    """A request names a model that the server does not have."""


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model with the name under which it is served."""

    name: str
    folder: Path
    rows: RowWriter
    engine: Engine
    tokenizer_sha256: str
    loaded_at: int
    shared_rows: int
    """The most sequences of several requests that are written in one call."""

    @property
    def direction(self) -> Direction:
        """The direction of the model."""
        return self.engine.direction

    @property
    def is_upstream(self) -> bool:
        """True if the model runs on an upstream."""
        return isinstance(self.engine, UpstreamEngine)

    def as_fields(self) -> dict[str, Any]:
        """Return the model's entry in `/v1/models`."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.loaded_at,
            "owned_by": "megatron_ledom",
            "direction": str(self.direction),
            "max_model_len": self.rows.num_positions,
            "tokenizer_sha256": self.tokenizer_sha256,
        }


class ServedModels:
    """The reverse model and, if there is one, the forward model."""

    def __init__(
        self,
        reverse: ServedModel,
        forward: ServedModel | None,
        metrics: Metrics,
        settings: ServeSettings,
        process: ModelProcess | None,
    ) -> None:
        self.reverse, self.forward, self._metrics, self._settings = reverse, forward, metrics, settings
        self._process = process
        self._counted, self._lock = {model.direction: model.engine.usage.tokens for model in self.all}, Lock()

    @classmethod
    def load(cls, settings: ServeSettings, metrics: Metrics) -> "ServedModels":
        """Load the folders of the settings, after checking both. Upstreams are checked first, before a model is loaded."""
        folders = [folder for folder in (settings.forward, settings.reverse) if folder is not None]
        for folder in folders:
            read_model_config(folder)
        names = {Direction.REVERSE: settings.reverse.resolve().name}
        if settings.forward is not None:
            names[Direction.FORWARD] = settings.forward.resolve().name
        if len(set(names.values())) < len(names):
            names = {direction: f"{name}-{direction}" for direction, name in names.items()}
        given = {Direction.REVERSE: settings.reverse, Direction.FORWARD: settings.forward}
        urls = {Direction.REVERSE: settings.upstream, Direction.FORWARD: settings.forward_upstream}
        made: dict[Direction, ServedModel] = {}
        process = None
        if any(given[direction] and urls[direction] is None for direction in urls):  # now: the checks of an upstream use torch
            process = ModelProcess(partial(load_model, settings), settings.batch_size)
        for direction in sorted(urls, key=lambda direction: urls[direction] is None):
            if (place := given[direction]) is not None:
                make = _loaded if urls[direction] is None else _connected
                made[direction] = make(settings, direction, names[direction], place, process)
        return cls(made[Direction.REVERSE], made.get(Direction.FORWARD), metrics, settings, process)

    def watch(self, on_lost: Callable[[ModelProcessLost], None]) -> None:
        """Call `on_lost` in a thread if the process of the models ends by itself."""
        if self._process is not None:
            self._process.watch(on_lost)

    def end(self) -> None:
        """End the process of the models."""
        if self._process is not None:
            self._process.end()

    @cached_property
    def special_tokens(self) -> list[str]:
        """The texts of the special tokens of all tokenizers, the longest first."""
        tokenizers = [model.rows.tokenizer for model in self.all]
        names = {name for one in tokenizers for name, id_ in one.vocab.items() if id_ in one.special_ids and name}
        return sorted(names, key=len, reverse=True)

    @property
    def score_rows(self) -> int:
        """The most sequences of one request to score in one call: several batches, so that rows of similar length share one."""
        return SCORED_BATCHES * self._settings.batch_size

    def shared_rows(self, used: Sequence[ServedModel]) -> int:
        """Return the most sequences of several requests to score in one call with some models."""
        return ONE_REQUEST if any(model.is_upstream for model in used) else self.score_rows

    def lane(self, kind: str, used: Sequence[ServedModel]) -> Lane:
        """Return the lane of jobs that use some models."""
        if any(model.is_upstream for model in used):
            return Lane((kind, *(model.name for model in used)), self._settings.upstream_requests)
        return SCORE_LANE if kind == "score" else LOCAL_LANE

    @property
    def num_threads(self) -> int:
        """The threads that the server needs: as many as all lanes may have calls at once."""
        users = [(kind, [model]) for kind in ("write", "score") for model in self.all]
        return sum(
            lane.most_calls
            for lane in {self.lane(kind, used) for kind, used in [*users, ("score", self.all), ("write", self.all)]}
        )

    @property
    def all(self) -> list[ServedModel]:
        """All models, the reverse one first."""
        return [self.reverse, *([self.forward] if self.forward else [])]

    @property
    def joined_name(self) -> str:
        """The name of all models together, for a result that all of them computed."""
        return "+".join(model.name for model in self.all)

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
        with self._lock:
            for model in self.all:
                now = model.engine.usage.tokens
                self._metrics.tokens.labels(str(model.direction), "scored").inc(now - self._counted[model.direction])
                self._counted[model.direction] = now

    def count_written(self, direction: Direction, read: Sequence[int], written: Sequence[int]) -> None:
        """Add the tokens of written texts to the metrics."""
        self._metrics.tokens.labels(str(direction), "read").inc(sum(read))
        self._metrics.tokens.labels(str(direction), "written").inc(sum(written))


def _loaded(
    settings: ServeSettings, direction: Direction, name: str, folder: Path, process: ModelProcess | None
) -> ServedModel:
    """Load a model into the process of the models."""
    assert process is not None
    engine = ProcessEngine(process, folder, direction, unrecorded_reverse(settings, direction))
    return _served(name, folder, engine.rows, engine, settings.batch_size)


def _connected(
    settings: ServeSettings, direction: Direction, name: str, folder: Path, process: ModelProcess | None
) -> ServedModel:
    """Connect with the upstream of a model."""
    engine = connect(settings, direction, folder)
    return _served(name, folder, engine.rows, engine, ONE_REQUEST)


def _served(name: str, folder: Path, rows: RowWriter, engine: Engine, shared_rows: int) -> ServedModel:
    return ServedModel(name, folder, rows, engine, read_tokenizer(str(folder)).sha256, int(time.time()), shared_rows)

"""The inference engine whose model runs in a `ModelProcess`: texts and tokenizer are here, token ids go there."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Lock

from megatron_ledom.direction import Direction
from megatron_ledom.errors import UsageError
from megatron_ledom.inference.engines.engine import PartialAnswer
from megatron_ledom.inference.engines.model_process import ModelProcess
from megatron_ledom.inference.engines.remote_engine import RECORDED, RemoteEngine, RemoteRows, UnrecordedReverse
from megatron_ledom.inference.generation import Sampling
from megatron_ledom.inference.row_generation import IsWanted, OnEnd, OnStep, RowRequest, RowResult
from megatron_ledom.inference.scoring import Span, naming_text


class ProcessEngine(RemoteEngine):
    """Scores with a model of a `ModelProcess`, which loads it; `rows` writes with it.

    Raises the error of loading, such as MismatchError for a folder of the other direction.
    """

    def __init__(
        self, process: ModelProcess, folder: Path, direction: Direction, unrecorded: UnrecordedReverse = RECORDED
    ) -> None:
        loaded = process.load(direction, folder)
        super().__init__(folder, direction, unrecorded)
        self.num_positions, self.leading_ids, self.stop_ids = loaded.num_positions, loaded.leading_ids, loaded.stop_ids
        self._process, self._usage_lock = process, Lock()
        self.rows = ProcessRows(self, process)

    def _logprobs(self, spans: list[Span]) -> list[list[float]]:
        with self._computing(spans) as logprobs:
            return logprobs()

    @contextmanager
    def _computing(self, spans: list[Span]) -> Iterator[Callable[[], list[list[float]]]]:
        """Send the spans to the process at once: it computes both directions of a batch without waiting for this process in between."""
        with self._process.logprobs(self.direction, spans) as logprobs:

            def _counted() -> list[list[float]]:
                with naming_text(self.tokenizer, self.direction):
                    values = logprobs()
                num_read = sum(len(span.tokens) for span in spans if len(span.tokens) > span.num_context)
                with self._usage_lock:
                    self.usage.tokens += num_read
                return values

            yield _counted

    def _written(self, answers: list[PartialAnswer], sampling: Sampling) -> list[tuple[str, int]]:
        raise UsageError("this engine scores; `rows` writes")


class ProcessRows(RemoteRows):
    """Writes rows with a model of a `ModelProcess`. A `RowWriter`."""

    def __init__(self, engine: RemoteEngine, process: ModelProcess) -> None:
        super().__init__(engine)
        self._process = process

    def write_rows(
        self, requests: Sequence[RowRequest], on_step: OnStep, on_end: OnEnd, is_wanted: IsWanted
    ) -> list[RowResult]:
        """See `RowWriter.write_rows`."""
        return self._process.write_rows(self.direction, requests, on_step, on_end, is_wanted)

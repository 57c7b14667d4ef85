"""The process that owns the models of a program which does other work too, such as a server.

torch takes Python's lock between any two operations, so other threads of its process slow a model down. A process of its own has a
lock of its own. The caller keeps tokenizer and texts; token ids and requests go to the process, log-probabilities and rows come back.

The process is a fork, so it starts at once. It must be made before the caller uses torch's threads or a GPU, in the main thread. It ignores
the signals that end the caller, and ends when the caller does, however the caller ends.
"""

import atexit
import ctypes
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

from megatron_ledom.direction import Direction
from megatron_ledom.errors import LedomError, TransientError
from megatron_ledom.inference.freed_memory import keep_freed_memory
from megatron_ledom.inference.generation import Generation
from megatron_ledom.inference.language_model import LanguageModel
from megatron_ledom.inference.row_generation import IsWanted, OnEnd, OnStep, RowRequest, RowResult, write_rows
from megatron_ledom.inference.scoring import Span, score_spans

log = logging.getLogger(__name__)
Load = Callable[[Direction, Path], LanguageModel]
LOOK_SECONDS = 0.02
"""Time between two looks for rows that nobody wants any more."""
SET_PARENT_DEATH_SIGNAL = 1
"""prctl's number, from linux/prctl.h."""
END_SECONDS = 30.0
"""Time that the process gets to end its call."""


class ModelProcessLost(TransientError):
    """The process of the models ended by itself."""


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """Facts about a model in the process that its folder does not tell."""

    num_positions: int | None
    leading_ids: list[int]
    stop_ids: list[int]


class _Channel:
    """The caller's end of the connection to a process; every error of it is ModelProcessLost."""

    def __init__(self, connection: Connection, process: Any) -> None:
        self._connection, self._process = connection, process
        self._lock = threading.Lock()

    def send(self, *message: Any) -> None:
        """Send a message."""
        try:
            self._connection.send(message)
        except OSError:
            raise self.lost() from None

    def receive(self, seconds: float | None = None) -> tuple[Any, ...] | None:
        """Return the next message; None if none comes within some seconds."""
        try:
            if not self._connection.poll(seconds):
                return None
            message: tuple[Any, ...] = self._connection.recv()
        except (EOFError, OSError):
            raise self.lost() from None
        return message

    def lost(self) -> ModelProcessLost:
        """Return the error that says how the process ended."""
        code = self.wait(1)
        by = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
        advice = "; signal 9 often means that the memory was full" if code == -signal.SIGKILL else ""
        return ModelProcessLost(f"the process of the models ended by {by}{advice}; start the server again")

    def wait(self, seconds: float) -> int | None:
        """Wait for the end of the process; return its exit code, or None if it still runs. Of two threads at once, only one would get it."""
        with self._lock:
            self._process.join(seconds)
            code: int | None = self._process.exitcode
        return code

    def close(self) -> None:
        """Close the connection; the process ends after its call."""
        self._connection.close()


class ModelProcess:
    """See the top of this file. Calls of several threads run one after another.

    load: loads a model; called in the process. batch_size: most sequences at once.
    """

    def __init__(self, load: Load, batch_size: int) -> None:
        context = multiprocessing.get_context("fork")
        caller = os.getpid() if threading.current_thread() is threading.main_thread() else None
        ours, theirs = context.Pipe()
        self._process = context.Process(target=_run, args=(theirs, ours, caller, load, batch_size), name="models", daemon=True)
        self._channel, self._lock = _Channel(ours, self._process), threading.Lock()
        self._is_ended = self._is_interrupted = False
        self._process.start()
        theirs.close()
        atexit.register(self.end)

    @property
    def pid(self) -> int:
        """The id of the process."""
        return int(self._process.pid or 0)

    def load(self, direction: Direction, folder: Path) -> LoadedModel:
        """Load the model of a direction, and return facts about it. Raises the error of loading."""
        loaded: LoadedModel = self._call("load", direction, folder)
        return loaded

    def logprobs(self, direction: Direction, spans: list[Span]) -> list[list[float]]:
        """Return the log-probabilities of the scored tokens of spans, as `score_spans` does."""
        values: list[list[float]] = self._call("score", direction, spans)
        return values

    def write_rows(
        self, direction: Direction, requests: Sequence[RowRequest], on_step: OnStep, on_end: OnEnd, is_wanted: IsWanted
    ) -> list[RowResult]:
        """See `RowWriter.write_rows`."""
        with self._turn():
            self._channel.send("write", direction, list(requests))
            outcome = _GrowingRows(self._channel, len(requests), on_step, on_end, is_wanted).read()
        rows: dict[int, RowResult] = _result_of(*outcome)
        return [rows[index] for index in range(len(requests))]

    def watch(self, on_lost: Callable[[ModelProcessLost], None]) -> None:
        """Call `on_lost` in a thread if the process ends without `end`."""

        def _watch() -> None:
            wait([self._process.sentinel])
            if not self._is_ended:
                on_lost(self._channel.lost())

        threading.Thread(target=_watch, name="models-watch", daemon=True).start()

    def end(self) -> None:
        """End the process after its call; kill it if that takes too long, or if nobody reads the result of that call."""
        self._is_ended = True
        atexit.unregister(self.end)
        self._channel.close()
        if self._channel.wait(0 if self._is_interrupted else END_SECONDS) is None:
            self._process.kill()
            self._channel.wait(END_SECONDS)

    def _call(self, *message: Any) -> Any:
        with self._turn():
            self._channel.send(*message)
            outcome = self._channel.receive()
        return _result_of(*(outcome or ()))

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Let one thread make a call. After a call that was left early, its messages would answer the next one: then refuse all others."""
        with self._lock:
            if self._is_interrupted:
                raise ModelProcessLost("a call of the models was interrupted before its end; start the program again")
            try:
                yield
            except ModelProcessLost:
                raise
            except BaseException:
                self._is_interrupted = True
                raise


def _result_of(kind: str, content: Any) -> Any:
    """Return the content of a result; raise that of an error."""
    if kind == "error":
        raise content
    return content


class _GrowingRows:
    """Reads the messages of one call of `write_rows` in the caller's process."""

    def __init__(self, channel: _Channel, num: int, on_step: OnStep, on_end: OnEnd, is_wanted: IsWanted) -> None:
        self._channel, self._on_step, self._on_end, self._is_wanted = channel, on_step, on_end, is_wanted
        self._open, self._looked = set(range(num)), time.monotonic()
        self._results: dict[int, RowResult] = {}
        self._error: Exception | None = None

    def read(self) -> tuple[str, Any]:
        """Return the outcome. An error of the caller's own functions ends all rows; what they wrote until then is nobody's result."""
        while True:
            message = self._channel.receive(LOOK_SECONDS)
            if message is not None and message[0] in ("result", "error"):
                if self._error is not None:
                    return "error", self._error
                return message[0], message[1] if message[0] == "error" else self._results
            if self._error is not None:
                continue
            try:
                if message is not None:
                    self._handle(*message)
                if time.monotonic() - self._looked > LOOK_SECONDS:
                    self._look()
            except ModelProcessLost:
                raise
            except Exception as error:
                self._error = error
                self._drop(self._open)

    def _handle(self, kind: str, index: int, content: Any) -> None:
        if kind == "end":
            self._open.discard(index)
            self._results[index] = content
            self._on_end(index, content)
        elif not self._on_step(index, lambda: content):
            self._drop([index])

    def _look(self) -> None:
        self._looked = time.monotonic()
        self._drop([index for index in self._open if not self._is_wanted(index)])

    def _drop(self, indices: Iterable[int]) -> None:
        if dropped := self._open.intersection(indices):
            self._open -= dropped
            self._channel.send("drop", dropped)


def _run(connection: Connection, of_caller: Connection, caller: int | None, load: Load, batch_size: int) -> None:
    """Serve the calls of the caller until it closes the connection. The body of the process."""
    of_caller.close()
    _end_with(caller)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    keep_freed_memory()
    models: dict[Direction, LanguageModel] = {}
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            kind, *content = connection.recv()
            if kind != "drop":  # of a row that had ended
                connection.send(_outcome(connection, models, load, batch_size, kind, *content))
    os._exit(0)  # without the exit functions of the caller


def _end_with(caller: int | None) -> None:
    """Let Linux kill this process when the thread that forked it ends, even in the middle of a call."""
    if caller is not None:
        ctypes.CDLL(None, use_errno=True).prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
        if os.getppid() != caller:  # it ended before
            os._exit(0)


def _outcome(connection: Connection, *call: Any) -> tuple[str, Any]:
    try:
        return "result", _answer(connection, *call)
    except Exception as error:
        if isinstance(error, LedomError | OSError):
            with suppress(Exception):
                ForkingPickler.loads(ForkingPickler.dumps(error))
                return "error", error
        log.exception("an error in the process of the models")
        return "error", RuntimeError(f"{type(error).__name__}: {error}")  # others may not survive the way


def _answer(
    connection: Connection, models: dict[Direction, LanguageModel], load: Load, batch_size: int, kind: str, *content: Any
) -> Any:
    if kind == "load":
        direction, folder = content
        model = models[direction] = load(direction, folder)
        return LoadedModel(model.num_positions, model.leading_ids, model.stop_ids)
    direction, given = content
    if kind == "score":
        return score_spans(models[direction].model, given, batch_size)
    rows = _WrittenRows(connection, given)
    write_rows(models[direction], given, batch_size, rows.on_step, rows.on_end)
    return None  # each row was sent at its end


class _WrittenRows:
    """Sends the rows of a call while they grow, in the process of the models."""

    def __init__(self, connection: Connection, requests: Sequence[RowRequest]) -> None:
        self._connection, self._requests = connection, requests
        self._dropped, self._looked = set[int](), 0.0

    def on_step(self, index: int, read: Callable[[], Generation]) -> bool:
        """Send the text of a row that is shown while it grows; return False for a row that nobody wants."""
        if time.monotonic() - self._looked > LOOK_SECONDS:
            while self._connection.poll(0):
                kind, indices = self._connection.recv()
                assert kind == "drop", kind
                self._dropped |= indices
            self._looked = time.monotonic()
        if index in self._dropped:
            return False
        if self._requests[index].is_shown:
            self._connection.send(("step", index, read()))
        return True

    def on_end(self, index: int, result: RowResult) -> None:
        """Send the result of a row."""
        self._connection.send(("end", index, result))

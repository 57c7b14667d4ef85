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
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from queue import Empty, SimpleQueue
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
END, LOST = "end of the caller", "lost"
"""Kinds of messages: the caller ends; to the calls of this process, that the other one is lost."""
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


class _Call:
    """One call, in the caller's process: its number, and the messages that answer it."""

    def __init__(self, number: int, send: Callable[..., None]) -> None:
        self.answers: SimpleQueue[tuple[Any, ...]] = SimpleQueue()
        self._number, self._send = number, send

    def send(self, kind: str, *content: Any) -> None:
        """Send a message of this call."""
        self._send(self._number, kind, *content)

    def receive(self, seconds: float | None = None) -> tuple[Any, ...] | None:
        """Return the next answer; None if none comes within some seconds. Raises ModelProcessLost."""
        try:
            answer = self.answers.get(timeout=seconds)
        except Empty:
            return None
        if answer[0] == LOST:
            raise answer[1]
        return answer


class ModelProcess:
    """See the top of this file. The calls of several threads are computed in the order in which they were sent.

    load: loads a model; called in the process. batch_size: most sequences at once.
    """

    def __init__(self, load: Load, batch_size: int) -> None:
        context = multiprocessing.get_context("fork")
        caller = os.getpid() if threading.current_thread() is threading.main_thread() else None
        self._connection, theirs = context.Pipe()
        own = (theirs, self._connection, caller, load, batch_size)
        self._process = context.Process(target=_run, args=own, name="models", daemon=True)
        self._lock, self._send_lock, self._wait_lock = threading.Lock(), threading.Lock(), threading.Lock()
        self._numbers, self._calls = count(), dict[int, _Call]()
        self._lost: ModelProcessLost | None = None
        self._on_lost: Callable[[ModelProcessLost], None] | None = None
        self._is_ended = self._is_interrupted = False
        self._process.start()
        theirs.close()
        atexit.register(self.end)
        threading.Thread(target=self._read, name="models-reader", daemon=True).start()

    @property
    def pid(self) -> int:
        """The id of the process."""
        return int(self._process.pid or 0)

    def load(self, direction: Direction, folder: Path) -> LoadedModel:
        """Load the model of a direction, and return facts about it. Raises the error of loading."""
        with self._call("load", direction, folder) as call:
            loaded: LoadedModel = _result_of(call.receive())
        return loaded

    @contextmanager
    def logprobs(self, direction: Direction, spans: list[Span]) -> Iterator[Callable[[], list[list[float]]]]:
        """Send spans, and give the function that waits for the log-probabilities of their scored tokens, as `score_spans` returns them."""
        with self._call("score", direction, spans) as call:
            yield lambda: _result_of(call.receive())

    def write_rows(
        self, direction: Direction, requests: Sequence[RowRequest], on_step: OnStep, on_end: OnEnd, is_wanted: IsWanted
    ) -> list[RowResult]:
        """See `RowWriter.write_rows`."""
        with self._call("write", direction, list(requests)) as call:
            return _GrowingRows(call, len(requests), on_step, on_end, is_wanted).read()

    def watch(self, on_lost: Callable[[ModelProcessLost], None]) -> None:
        """Call `on_lost` in a thread if the process ends without `end`."""
        with self._lock:
            self._on_lost = on_lost
            lost = self._lost
        if lost is not None:
            on_lost(lost)

    def end(self) -> None:
        """End the process after its calls; kill it if that takes too long, or if the caller was interrupted in a call."""
        self._is_ended = True
        atexit.unregister(self.end)
        threading.Thread(target=self._send_end, name="models-end", daemon=True).start()  # a full pipe must not hold it up
        if self._wait(0 if self._is_interrupted else END_SECONDS) is None:
            self._process.kill()
            self._wait(END_SECONDS)

    def _send_end(self) -> None:
        with suppress(ModelProcessLost):
            self._send(-1, END)

    @contextmanager
    def _call(self, kind: str, *content: Any) -> Iterator[_Call]:
        """Send a call, and give its answers. Nobody gets the answers that come after the block."""
        number = next(self._numbers)
        call = _Call(number, self._send)
        with self._lock:
            if self._lost is not None:
                raise ModelProcessLost(str(self._lost))
            self._calls[number] = call
        try:
            call.send(kind, *content)
            yield call
        except BaseException as error:
            self._is_interrupted |= not isinstance(error, Exception)
            raise
        finally:
            with self._lock:
                self._calls.pop(number, None)

    def _send(self, *message: Any) -> None:
        try:
            with self._send_lock:
                self._connection.send(message)
        except OSError:
            raise self._how_it_ended() from None

    def _read(self) -> None:
        """Give each message to its call, until the process ends. The body of a thread."""
        try:
            while True:
                number, *answer = self._connection.recv()
                with self._lock:
                    call = self._calls.get(number)
                if call is not None:
                    call.answers.put(tuple(answer))
        except (EOFError, OSError):
            pass
        except Exception:
            log.exception("a message of the process of the models cannot be read")
            self._process.kill()
        lost = self._how_it_ended()
        with self._lock:
            self._lost, calls, on_lost = lost, [*self._calls.values()], self._on_lost
        for call in calls:
            call.answers.put((LOST, lost))
        if on_lost is not None and not self._is_ended:
            on_lost(lost)

    def _how_it_ended(self) -> ModelProcessLost:
        code = self._wait(1)
        by = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
        advice = "; signal 9 often means that the memory was full" if code == -signal.SIGKILL else ""
        return ModelProcessLost(f"the process of the models ended by {by}{advice}; start the server again")

    def _wait(self, seconds: float) -> int | None:
        """Wait for the end of the process; return its exit code, or None if it still runs. Of two threads at once, only one would get it."""
        with self._wait_lock:
            self._process.join(seconds)
            code: int | None = self._process.exitcode
        return code


def _result_of(answer: tuple[Any, ...] | None) -> Any:
    """Return the content of a result; raise that of an error."""
    assert answer is not None
    kind, content = answer
    if kind == "error":
        raise content
    return content


class _GrowingRows:
    """Reads the answers to one call of `write_rows` in the caller's process."""

    def __init__(self, call: _Call, num: int, on_step: OnStep, on_end: OnEnd, is_wanted: IsWanted) -> None:
        self._call, self._on_step, self._on_end, self._is_wanted = call, on_step, on_end, is_wanted
        self._num, self._open, self._looked = num, set(range(num)), time.monotonic()
        self._results: dict[int, RowResult] = {}

    def read(self) -> list[RowResult]:
        """Return the results. An error of the caller's own functions ends all rows; what they wrote until then is nobody's result."""
        try:
            while True:
                answer = self._call.receive(LOOK_SECONDS)
                if answer is not None and answer[0] in ("result", "error"):
                    _result_of(answer)
                    return [self._results[index] for index in range(self._num)]
                if answer is not None:
                    self._handle(*answer)
                if time.monotonic() - self._looked > LOOK_SECONDS:
                    self._look()
        except BaseException:
            with suppress(ModelProcessLost):
                self._drop(self._open)
            raise

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
            self._call.send("drop", dropped)


def _run(connection: Connection, of_caller: Connection, caller: int | None, load: Load, batch_size: int) -> None:
    """Answer the calls of the caller until it ends. The body of the process."""
    of_caller.close()
    _end_with(caller)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    keep_freed_memory()
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        _Models(connection, load, batch_size).run()
    os._exit(0)  # without the exit functions of the caller


def _end_with(caller: int | None) -> None:
    """Let Linux kill this process when the thread that forked it ends, even in the middle of a call."""
    if caller is not None:
        ctypes.CDLL(None, use_errno=True).prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
        if os.getppid() != caller:  # it ended before
            os._exit(0)


class _Models:
    """The models in their process. Calls that come during another one wait; only its drops are looked for meanwhile."""

    def __init__(self, connection: Connection, load: Load, batch_size: int) -> None:
        self._connection, self._load, self._batch_size = connection, load, batch_size
        self._models: dict[Direction, LanguageModel] = {}
        self._waiting: deque[tuple[Any, ...]] = deque()
        self._dropped: dict[int, set[int]] = {}
        self._looked = 0.0

    def run(self) -> None:
        """Answer calls until the caller sends END. Raises EOFError or OSError if the caller ends."""
        while True:
            number, kind, *content = self._waiting.popleft() if self._waiting else self._connection.recv()
            if kind == END:
                return
            if kind != "drop":  # of a row that had ended
                self._connection.send((number, *self._outcome(number, kind, *content)))
                self._dropped.pop(number, None)

    def _outcome(self, number: int, kind: str, *content: Any) -> tuple[str, Any]:
        try:
            return "result", self._answer(number, kind, *content)
        except Exception as error:
            if isinstance(error, LedomError | OSError):
                with suppress(Exception):
                    ForkingPickler.loads(ForkingPickler.dumps(error))
                    return "error", error
            log.exception("an error in the process of the models")
            return "error", RuntimeError(f"{type(error).__name__}: {error}")  # others may not survive the way

    def _answer(self, number: int, kind: str, direction: Direction, given: Any) -> Any:
        if kind == "load":
            model = self._models[direction] = self._load(direction, given)
            return LoadedModel(model.num_positions, model.leading_ids, model.stop_ids)
        if kind == "score":
            return score_spans(self._models[direction].model, given, self._batch_size)
        requests: list[RowRequest] = given

        def _on_step(index: int, read: Callable[[], Generation]) -> bool:
            """Send the text of a row that is shown while it grows; return False for a row that nobody wants."""
            if index in self._dropped_of(number):
                return False
            if requests[index].is_shown:
                self._connection.send((number, "step", index, read()))
            return True

        write_rows(
            self._models[direction],
            requests,
            self._batch_size,
            _on_step,
            lambda index, result: self._connection.send((number, "end", index, result)),
        )
        return None  # each row was sent at its end

    def _dropped_of(self, number: int) -> set[int]:
        """Return the rows of a call that nobody wants, after a look at the messages now and then."""
        if time.monotonic() - self._looked > LOOK_SECONDS:
            self._looked = time.monotonic()
            while self._connection.poll(0):
                message = self._connection.recv()
                if message[1] == "drop":
                    self._dropped.setdefault(message[0], set()).update(message[2])
                else:
                    self._waiting.append(message)
        return self._dropped.get(number, set())

"""Worker processes that end with their parent, and the parallel map `ordered_map`.

Workers of `ordered_map` are forked, so each inherits the function and its loaded data. Each has one socket pair to the parent, and
they share no lock. If a worker dies, its end of the pair closes and the parent notices at once; if the parent dies, the workers end.
"""

import ctypes
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

from megatron_ledom.errors import LedomError

PR_SET_PDEATHSIG = 1  # from linux/prctl.h
SIGEV_THREAD = 2  # from bits/sigevent-consts.h
# looked up at import: in a forked child the look-up could wait for ever for the loader's lock, if another thread of the parent
# held that lock during the fork
_prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None
JOB_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
"""Signals that a batch system or a terminal sends to all processes of a job."""


def die_with_the_parent(parent: int) -> None:
    """Let Linux end this process when its parent is killed; otherwise it would continue to write during the next start."""
    if _prctl is not None:
        _prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))
        if os.getppid() != parent:  # the parent was killed before this line
            os._exit(1)


def leave_signals_to_the_parent() -> None:
    """Ignore the job's signals in this process: its parent reacts to them."""
    for number in JOB_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class _SignalEvent(ctypes.Structure):
    """`struct sigevent` of signal.h on 64-bit Linux, 64 bytes; only a thread's function and argument are set."""

    _fields_ = (
        ("argument", ctypes.c_int64),
        ("signo", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("function", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("pad", ctypes.c_char * 32),
    )


class _TimerSpec(ctypes.Structure):
    """`struct itimerspec`: interval and remaining time, each in seconds and nanoseconds."""

    _fields_ = (
        ("interval", ctypes.c_int64),
        ("interval_ns", ctypes.c_int64),
        ("seconds", ctypes.c_int64),
        ("nanoseconds", ctypes.c_int64),
    )


class ExitTimer:
    """Ends this process with an exit code after a time that can be extended, even if its interpreter is blocked.

    A thread of a system timer calls the C library's `_exit`, so no Python code runs. Raises OSError without such timers.
    """

    def __init__(self, exit_code: int) -> None:
        if sys.platform != "linux":
            raise OSError("only Linux has timers that start a thread")
        libc = ctypes.CDLL(None, use_errno=True)
        self._library = libc if hasattr(libc, "timer_create") else ctypes.CDLL("librt.so.1", use_errno=True)
        ends = ctypes.cast(libc._exit, ctypes.c_void_p)
        event = _SignalEvent(argument=exit_code, notify=SIGEV_THREAD, function=ends)
        self._timer = ctypes.c_void_p()
        if self._library.timer_create(time.CLOCK_MONOTONIC, ctypes.byref(event), ctypes.byref(self._timer)) != 0:
            raise OSError(ctypes.get_errno(), "timer_create")

    def set(self, seconds: float) -> None:
        """End the process `seconds` from now, instead of at the time set before; 0 cancels the timer."""
        whole = int(seconds)
        spec = _TimerSpec(seconds=whole, nanoseconds=int(1e9 * (seconds - whole)))
        if self._library.timer_settime(self._timer, 0, ctypes.byref(spec), None) != 0:
            raise OSError(ctypes.get_errno(), "timer_settime")


POLL_SECONDS = 0.2

Item = TypeVar("Item")
Result = TypeVar("Result")


def ordered_map(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    num_workers: int,
    describe: Callable[[Item], str],
    while_waiting: Callable[[], None] = lambda: None,
) -> Iterator[Result]:
    """Yield `function` of each item, in the order of the items, computed by `num_workers` processes.

    A LedomError of `function` is raised unchanged; any other exception, and the death of a worker, becomes a LedomError that
    names the item by `describe`. No worker outlives the iteration. `while_waiting` is called several times a second. Results
    should be small: each stays in memory until all results before it are yielded.
    """
    if not items:
        return
    pool = _Pool(function, min(num_workers, len(items)))
    results: dict[int, Result] = {}
    given, returned = 0, 0
    try:
        while returned < len(items):
            while pool.idle and given < len(items):
                pool.send(given, items[given], describe(items[given]))
                given += 1
            for number, result in pool.receive(while_waiting):
                results[number] = result
            while returned in results:
                yield results.pop(returned)
                returned += 1
    finally:
        pool.close()


class _Pool:
    def __init__(self, function: Callable[[Any], Any], num_workers: int) -> None:
        context = get_context("fork")
        self.connections: list[Connection] = []
        self.processes: list[BaseProcess] = []
        self.busy: dict[Connection, tuple[int, str]] = {}
        """Number and description of the item of each busy worker."""
        for _ in range(num_workers):
            mine, theirs = context.Pipe(duplex=True)
            self.connections.append(mine)
            process = context.Process(target=_work, args=(function, theirs, list(self.connections), os.getpid()), daemon=True)
            process.start()
            theirs.close()  # otherwise the death of the worker would not close it
            self.processes.append(process)
        self.idle = list(reversed(self.connections))

    def send(self, number: int, item: Any, what: str) -> None:
        """Give an idle worker an item; `what` describes it in the error if the worker has died."""
        connection = self.idle.pop()
        self.busy[connection] = (number, what)
        try:
            connection.send(item)
        except OSError as error:
            raise self._death(connection) from error

    def receive(self, while_waiting: Callable[[], None]) -> list[tuple[int, Any]]:
        """Wait for results and return (number, result) of each. Raises a worker's error, or a LedomError if it died."""
        while not (ready := wait(list(self.busy), timeout=POLL_SECONDS)):
            while_waiting()
        while_waiting()
        return [self._result(connection) for connection in ready if isinstance(connection, Connection)]

    def _result(self, connection: Connection) -> tuple[int, Any]:
        number, what = self.busy[connection]
        try:
            result, error = connection.recv()
        except (EOFError, OSError) as closed:
            raise self._death(connection) from closed
        if isinstance(error, LedomError):
            raise error
        if error is not None:
            raise LedomError(f"a worker failed on {what}; this is an error of this package or of the tokenizer:\n{error}")
        del self.busy[connection]
        self.idle.append(connection)
        return number, result

    def _death(self, connection: Connection) -> LedomError:
        process = self.processes[self.connections.index(connection)]
        process.join(timeout=10)
        code = process.exitcode
        how = f"was killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"ended with code {code}"
        what = self.busy[connection][1]
        return LedomError(
            f"a worker process {how} at {what}; the usual cause is too little memory: use fewer --workers or more memory"
        )

    def close(self) -> None:
        """End all workers now."""
        for connection in self.connections:
            connection.close()
        for process in self.processes:
            process.kill()
            process.join()


def _work(function: Callable[[Any], Any], connection: Connection, parents_ends: list[Connection], parent: int) -> None:
    """Run a worker: send the result or error of each received item, until the parent closes the connection."""
    die_with_the_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent reacts to Ctrl-C
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for inherited in parents_ends:
        inherited.close()
    while True:
        try:
            item = connection.recv()
        except (EOFError, OSError):
            return
        answer: tuple[Any, LedomError | str | None]
        try:
            answer = (function(item), None)
        except LedomError as error:
            answer = (None, error)
        except Exception:
            answer = (None, traceback.format_exc())
        try:
            connection.send(answer)
        except OSError:
            return  # the parent has ended or needs no more results

"""Processes that help another one: they die with it, leave the job's signals to it, and map a function over items for it.

Workers of `ordered_map` are forked, so each inherits the function and what that has loaded. A worker talks over one socket pair and
no lock is shared: when a worker dies its end closes and the parent notices at once; when the parent dies the workers die with it.
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

PR_SET_PDEATHSIG = 1  # of linux/prctl.h
SIGEV_THREAD = 2  # of bits/sigevent-consts.h
# found here, not where it is needed: a forked child may wait for ever for the loader's lock, which a thread that it does not
# have held when it was forked
_prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None
JOB_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
"""What a batch system or a terminal sends to every process of a job at once."""


def die_with_the_parent(parent: int) -> None:
    """Linux ends this process when its parent is killed: else it would go on writing beside the next start."""
    if _prctl is not None:
        _prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))
        if os.getppid() != parent:  # it was killed before this line
            os._exit(1)


def leave_signals_to_the_parent() -> None:
    """A job's signals do not end this process: the parent decides what they mean."""
    for number in JOB_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class _SignalEvent(ctypes.Structure):
    """`struct sigevent` of signal.h on 64-bit Linux, 64 bytes; a thread's entry and its argument are all that is set."""

    _fields_ = (
        ("argument", ctypes.c_int64),
        ("signo", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("function", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("pad", ctypes.c_char * 32),
    )


class _TimerSpec(ctypes.Structure):
    """`struct itimerspec`: interval and time to the end, each in seconds and nanoseconds."""

    _fields_ = (
        ("interval", ctypes.c_int64),
        ("interval_ns", ctypes.c_int64),
        ("seconds", ctypes.c_int64),
        ("nanoseconds", ctypes.c_int64),
    )


class ExitTimer:
    """Ends this process with an exit code at a time that can be put off, though its interpreter be blocked.

    A timer of the system, whose thread calls the C library's `_exit`: no line of Python is run. Raises OSError if there is none.
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
        """End so many seconds from now, and not when it was told before; 0: not at all."""
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
    """`function` of each item, in the order of the items, by `num_workers` processes; a free worker takes the next item.

    A LedomError raised by `function` is raised here as it is; another exception, and the death of a worker, as a
    LedomError that names the item by `describe`. Whatever ends the iteration, no worker outlives it. `while_waiting` is called
    several times a second. Results that come early are kept, so they should be small.
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
        """The item each busy worker has, by number and in words."""
        for _ in range(num_workers):
            mine, theirs = context.Pipe(duplex=True)
            self.connections.append(mine)
            process = context.Process(target=_work, args=(function, theirs, list(self.connections), os.getpid()), daemon=True)
            process.start()
            theirs.close()  # else the death of the worker would not close it
            self.processes.append(process)
        self.idle = list(reversed(self.connections))

    def send(self, number: int, item: Any, what: str) -> None:
        """Give an idle worker an item; `what` names it in the error when the worker is dead."""
        connection = self.idle.pop()
        self.busy[connection] = (number, what)
        try:
            connection.send(item)
        except OSError as error:
            raise self._death(connection) from error

    def receive(self, while_waiting: Callable[[], None]) -> list[tuple[int, Any]]:
        """(number, result) of all that is ready, once something is; raises a worker's error, or tells how it died."""
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
            raise LedomError(f"a worker failed on {what}; this is a fault of this package or of the tokenizer:\n{error}")
        del self.busy[connection]
        self.idle.append(connection)
        return number, result

    def _death(self, connection: Connection) -> LedomError:
        process = self.processes[self.connections.index(connection)]
        process.join(timeout=10)
        code = process.exitcode
        how = f"was killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"ended with code {code}"
        what = self.busy[connection][1]
        return LedomError(f"a worker process {how} at {what}; often memory ran out: use fewer --workers or more memory")

    def close(self) -> None:
        """End all workers now."""
        for connection in self.connections:
            connection.close()
        for process in self.processes:
            process.kill()
            process.join()


def _work(function: Callable[[Any], Any], connection: Connection, parents_ends: list[Connection], parent: int) -> None:
    """A worker's life: results, or errors, of the items it is sent, until the parent closes the connection."""
    die_with_the_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C means
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
            return  # the parent is gone or has had enough

"""Worker processes that map a function over a stream: results in the order of the stream, bounded memory, and no hanging.

Each worker is forked, so it inherits the function and what that has loaded. It talks over one socket pair and no lock is
shared: when a worker dies its end closes, the parent notices at once; when the parent dies the workers end by themselves.
"""

import queue
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

from megatron_ledom.errors import LedomError

AHEAD = 2  # items a worker has been given at any time

Item = TypeVar("Item")
Result = TypeVar("Result")


def ordered_map(
    function: Callable[[Item], Result], items: Iterable[Item], num_workers: int, describe: Callable[[Item], str]
) -> Iterator[Result]:
    """`function` of each item, in the order of the items, by `num_workers` processes (1: in this process).

    A LedomError raised by `function` is raised here as it is; another exception, and the death of a worker, as a
    LedomError that names the item by `describe`. Whatever ends the iteration, no worker outlives it.
    """
    if num_workers == 1:
        yield from map(function, items)
        return
    pool = _Pool(function, num_workers)
    waiting: deque[tuple[int, Item]] = deque()
    try:
        for number, item in enumerate(items):
            if len(waiting) == AHEAD * num_workers:
                yield pool.receive(*_next(waiting, describe))
            worker = number % num_workers
            pool.send(worker, item, describe(item))
            waiting.append((worker, item))
        while waiting:
            yield pool.receive(*_next(waiting, describe))
    finally:
        pool.close()


def _next(waiting: deque[tuple[int, Item]], describe: Callable[[Item], str]) -> tuple[int, str]:
    worker, item = waiting.popleft()
    return worker, describe(item)


class _Pool:
    def __init__(self, function: Callable[[Any], Any], num_workers: int) -> None:
        context = get_context("fork")
        self.connections: list[Connection] = []
        self.processes: list[BaseProcess] = []
        for _ in range(num_workers):
            mine, theirs = context.Pipe(duplex=True)
            self.connections.append(mine)
            process = context.Process(target=_work, args=(function, theirs, list(self.connections)), daemon=True)
            process.start()
            theirs.close()  # else the death of the worker would not close it
            self.processes.append(process)

    def send(self, worker: int, item: Any, what: str) -> None:
        """Give a worker an item; `what` names it in the error when the worker is dead."""
        try:
            self.connections[worker].send(item)
        except OSError as error:
            raise self._death(worker, what) from error

    def receive(self, worker: int, what: str) -> Any:
        """A worker's next result; raises its error, or tells how it died at `what`."""
        try:
            result, error = self.connections[worker].recv()
        except (EOFError, OSError) as closed:
            raise self._death(worker, what) from closed
        if isinstance(error, LedomError):
            raise error
        if error is not None:
            raise LedomError(f"a worker failed on {what}; this is a fault of this package or of the tokenizer:\n{error}")
        return result

    def _death(self, worker: int, what: str) -> LedomError:
        self.processes[worker].join(timeout=10)
        code = self.processes[worker].exitcode
        how = f"was killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"ended with code {code}"
        return LedomError(f"a worker process {how} at {what}; often memory ran out: use fewer --workers or more memory")

    def close(self) -> None:
        """End all workers now."""
        for connection in self.connections:
            connection.close()
        for process in self.processes:
            process.kill()
            process.join()


def _work(function: Callable[[Any], Any], connection: Connection, parents_ends: list[Connection]) -> None:
    """A worker's life: results, or errors, of the items it is sent, until the parent closes the connection."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C means
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for inherited in parents_ends:
        inherited.close()
    items: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_take, args=(connection, items), daemon=True).start()
    while (item := items.get()) is not None:
        answer: tuple[Any, LedomError | str | None]
        try:
            answer = (function(item[0]), None)
        except LedomError as error:
            answer = (None, error)
        except Exception:
            answer = (None, traceback.format_exc())
        try:
            connection.send(answer)
        except OSError:
            return  # the parent is gone or has had enough


def _take(connection: Connection, items: "queue.SimpleQueue[Any]") -> None:
    """Empty the connection at once, so that the parent never waits to send while this worker waits to send."""
    try:
        while True:
            items.put((connection.recv(),))
    except (EOFError, OSError):
        items.put(None)

"""Worker processes that map a function over items: results in the order of the items, no idle worker, and no hanging.

Each worker is forked, so it inherits the function and what that has loaded. It talks over one socket pair and no lock is
shared: when a worker dies its end closes and the parent notices at once; when the parent dies the workers die with it.
"""

import os
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

from megatron_ledom.errors import LedomError
from megatron_ledom.platform.processes import die_with_the_parent

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

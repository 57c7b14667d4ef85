"""A log of another program on a server: a thread sends the records, so that a server that is slow or away delays no step."""

import atexit
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol
from urllib.parse import unquote

from megatron_ledom.data.readers.remote import without_secrets
from megatron_ledom.storage.records import Record
from megatron_ledom.training.log_guard import GuardedLog

log = logging.getLogger(__name__)

MOST_WAITING = 2000
"""Records that wait for a server that is away; of more, the oldest are dropped and counted."""
AT_ONCE = 50
"""Records that are sent together, after a server was away."""
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 1.0, 60.0
CLOSE_SECONDS = 10.0
"""Longest wait at the end of training for the records that are not sent yet."""
SECRET_VARIABLES = (
    *("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "DATABRICKS_TOKEN"),
    *("OTEL_EXPORTER_OTLP_HEADERS", "OTEL_EXPORTER_OTLP_METRICS_HEADERS"),
)
"""Variables with which the client libraries identify themselves; a list of headers has `name=value` after `name=value`."""
SHORTEST_SECRET = 4


class RejectedError(Exception):
    """The server has refused these records and would refuse them again."""


@dataclass(frozen=True, slots=True)
class TimedRecord:
    """A record and the time of its iteration, in nanoseconds since 1970."""

    record: Record
    time_ns: int


class Tracker(Protocol):
    """A connection to another program. Every method may block, and raises an exception if the server is away."""

    def send(self, records: Sequence[TimedRecord]) -> None:
        """Send records in order. After an error the same ones come again."""

    def close(self, is_complete: bool) -> None:
        """Report the end of this launch, and of the run if `is_complete`."""


class BackgroundLog(GuardedLog):
    """Sends records from a thread of its own. A server that is away is tried again, with longer and longer pauses."""

    def __init__(self, where: str, connect: Callable[[], Tracker]) -> None:
        """connect: returns the connection; called in the thread, again after an error."""
        super().__init__(where)
        self._connect = connect
        self._tracker: Tracker | None = None
        self._waiting: deque[TimedRecord] = deque()
        self._sending: list[TimedRecord] = []
        self._changed = threading.Condition()
        self._is_closing = self._is_complete = self._is_away = False
        self._has_dropped = self._has_refused = False
        self._pause = FIRST_PAUSE_SECONDS
        self._thread = threading.Thread(target=self._run, name=f"records for {where}", daemon=True)
        self._thread.start()
        atexit.register(self.close)  # an error that ends the run sends its last records too

    def write(self, record: Record) -> None:
        """Take one record; the thread sends it. Does not wait."""
        with self._changed:
            if len(self._waiting) == MOST_WAITING:
                self._waiting.popleft()
                self.lost += 1
                is_first, self._has_dropped = not self._has_dropped, True
            else:
                is_first = False
            self._waiting.append(TimedRecord(record, time.time_ns()))
            self._changed.notify_all()
        if is_first:
            log.warning("%s: %s records wait; the oldest are dropped from now on", self.where, f"{MOST_WAITING:,}")

    def close(self, is_complete: bool = False) -> None:
        """Send what is waiting, for CLOSE_SECONDS at most, and log how many records were lost."""
        atexit.unregister(self.close)
        with self._changed:
            self._is_closing, self._is_complete = True, is_complete
            self._changed.notify_all()
        self._thread.join(CLOSE_SECONDS)
        with self._changed:
            self.lost += len(self._waiting) + len(self._sending)
            self._waiting.clear()
            self._sending = []
        self.report_lost()

    def _run(self) -> None:
        while not self._try(self._connected):
            if not self._may_try_again():
                return
        while self._take():
            if not self._try(self._send) and not self._may_try_again():
                return
        self._try(lambda: self._connected().close(self._is_complete))

    def _connected(self) -> Tracker:
        if self._tracker is None:
            self._tracker = self._connect()
        return self._tracker

    def _take(self) -> bool:
        """Wait for records, and move the first ones to `_sending`. Returns False at the end."""
        with self._changed:
            while not (self._sending or self._waiting or self._is_closing):
                self._changed.wait()
            while self._waiting and len(self._sending) < AT_ONCE:
                self._sending.append(self._waiting.popleft())
            return bool(self._sending)

    def _send(self) -> None:
        """Send the records of `_sending`. If they are refused, they are sent one by one, so that only refused ones are lost."""
        size = len(self._sending)
        while self._sending:
            try:
                self._connected().send(self._sending[:size])
            except RejectedError as error:
                if size > 1:
                    size = 1
                    continue
                self._count_refused(error)
            with self._changed:
                del self._sending[:size]

    def _count_refused(self, error: RejectedError) -> None:
        with self._changed:
            self.lost += 1
        if not self._has_refused:
            log.warning("%s refuses a record: %s; training continues without such records", self.where, _reason(error))
        self._has_refused = True

    def _try(self, work: Callable[[], object]) -> bool:
        """Call `work`; returns False if the server is away. The next try connects again."""
        try:
            work()
        except Exception as error:
            self._tracker = None
            if not self._is_away:
                log.warning(
                    "%s does not take the records (%s): training continues, and the last %s are kept and sent later",
                    self.where,
                    _reason(error),
                    f"{MOST_WAITING:,}",
                )
            self._is_away = True
            return False
        if self._is_away:
            log.info("%s takes the records again", self.where)
        self._is_away, self._pause = False, FIRST_PAUSE_SECONDS
        return True

    def _may_try_again(self) -> bool:
        """Wait before the next try; the end of training cuts this short. Returns False if training had ended before."""
        with self._changed:
            if self._is_closing:
                return False
            self._changed.wait_for(lambda: self._is_closing, self._pause)
        self._pause = min(2 * self._pause, LONGEST_PAUSE_SECONDS)
        return True


def _reason(error: Exception) -> str:
    """Return the first line of an error, without secrets."""
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    for name in filter(os.environ.get, SECRET_VARIABLES):
        for part in os.environ[name].split(","):
            given = part.partition("=")[2] if name.endswith("HEADERS") else os.environ[name]
            for value in (given.strip(), unquote(given.strip())):
                for secret in (value, value.rpartition("%20")[2], value.rpartition(" ")[2], repr(value)[1:-1]):
                    text = text.replace(secret, "***") if len(secret) >= SHORTEST_SECRET else text
    return without_secrets(text)[:300]


def flatten(record: Record) -> dict[str, float]:
    """Return the numbers of a record and of its inner dicts, by their names joined with slashes."""
    flat: dict[str, float] = {}
    for name, value in record.items():
        if isinstance(value, dict):
            flat |= {f"{name}/{inner}": number for inner, number in flatten(value).items()}
        elif isinstance(value, int | float):
            flat[name] = value
    return flat

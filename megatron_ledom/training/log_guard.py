"""A log of a run may fail, as on a full disk, and the training goes on: what is not written is counted and said."""

import atexit
import logging
from collections.abc import Callable
from typing import Any

from megatron_ledom.errors import LedomError
from megatron_ledom.storage.lines import LineFile
from megatron_ledom.storage.records import Record, as_line, drop_after

log = logging.getLogger(__name__)


class GuardedLog:
    """Does the writing to one log, and counts what could not be written."""

    def __init__(self, where: str, lost: int = 0, failures: type[Exception] = OSError) -> None:
        self.where, self.lost = where, lost
        self._failures = failures
        self._said, self._told = False, 0

    def attempt(self, work: Callable[[], object], num_records: int = 1) -> bool:
        """Do `work`, which writes `num_records`; False when it failed. The first failure is logged."""
        try:
            work()
        except LedomError:
            raise
        except self._failures as error:
            self.lost += num_records
            if not self._said:
                self._said = True
                atexit.register(self.report_lost)  # also where an error ends the run
                log.error(
                    "%s cannot be written (%s): training goes on without it and counts the records that are lost; make room, or"
                    " look after the disk",
                    self.where,
                    getattr(error, "strerror", None) or f"{type(error).__name__}: {error}",
                )
            return False
        return True

    def report_lost(self) -> None:
        """Log how many records are not in it, if any are not. At the end; once."""
        lost, self._told = self.lost - self._told, self.lost
        if lost:
            log.warning("%s lacks %d records that could not be written", self.where, self.lost)


class RecordLog(GuardedLog):
    """A file of records behind an iteration. It is opened again with each record until it can be."""

    def __init__(self, path: str, iteration: int, lost: int = 0) -> None:
        super().__init__(path, lost)
        self._iteration = iteration
        self._file: LineFile | None = None
        self.attempt(self._opened, 0)

    def write(self, record: Record) -> None:
        """One line more."""
        self.attempt(lambda: self._opened().append(as_line(record)))

    def sync(self) -> None:
        """Bring the lines to disk."""
        if self._file is not None:
            self.attempt(self._file.sync, 0)

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self.attempt(self._file.close, 0)
            self._file = None

    def _opened(self) -> LineFile:
        if self._file is None:
            drop_after(self.where, self._iteration)
            self._file = LineFile(self.where)
        return self._file


class Sink(GuardedLog):
    """Another program's log. After its first failure it gets no more records; they are counted."""

    def __init__(self, where: str, start: Callable[[], Any], lost: int = 0) -> None:
        super().__init__(where, lost, Exception)
        self._target: Any = None
        self.attempt(lambda: self._take(start()), 0)

    def _take(self, target: Any) -> None:
        self._target = target

    def write(self, send: Callable[[Any], object]) -> None:
        """Give one record to `send`, which gets what `start` returned."""
        if self._target is None:
            self.lost += 1
        elif not self.attempt(lambda: send(self._target)):
            self.close(lambda _: None)

    def close(self, end: Callable[[Any], object]) -> None:
        """End it by `end`, unless it has failed."""
        if self._target is not None:
            target, self._target = self._target, None
            self.attempt(lambda: end(target), 0)

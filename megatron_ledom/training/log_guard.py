"""Logs whose failure, such as a full disk, does not end the training: lost records are counted and reported."""

import atexit
import logging
from collections.abc import Callable
from typing import Any

from megatron_ledom.errors import LedomError
from megatron_ledom.storage.lines import LineFile
from megatron_ledom.storage.records import Record, as_line, drop_after

log = logging.getLogger(__name__)


class GuardedLog:
    """One log whose failed writes are counted and reported."""

    def __init__(self, where: str, lost: int = 0, failures: type[Exception] = OSError) -> None:
        self.where, self.lost = where, lost
        self._failures = failures
        self._has_reported, self._num_reported = False, 0

    def attempt(self, work: Callable[[], object], num_records: int = 1) -> bool:
        """Call `work`, which writes `num_records`. Returns False if it failed and logs the first failure; a LedomError is raised."""
        try:
            work()
        except LedomError:
            raise
        except self._failures as error:
            self.lost += num_records
            if not self._has_reported:
                self._has_reported = True
                atexit.register(self.report_lost)  # also reports if an error ends the run
                log.error(
                    "%s cannot be written (%s): training continues and counts the lost records; free some space, or check the"
                    " disk",
                    self.where,
                    getattr(error, "strerror", None) or f"{type(error).__name__}: {error}",
                )
            return False
        return True

    def report_lost(self) -> None:
        """Log the number of lost records, if any were lost since the last report."""
        lost, self._num_reported = self.lost - self._num_reported, self.lost
        if lost:
            log.warning("%s lacks %d records that could not be written", self.where, self.lost)


class RecordLog(GuardedLog):
    """A file of records, from which those after a given iteration are dropped. If it cannot be opened, each record tries again."""

    def __init__(self, path: str, iteration: int, lost: int = 0) -> None:
        super().__init__(path, lost)
        self._iteration = iteration
        self._file: LineFile | None = None
        self.attempt(self._opened, 0)

    def write(self, record: Record) -> None:
        """Append one record."""
        self.attempt(lambda: self._opened().append(as_line(record)))

    def sync(self) -> None:
        """Force the lines to disk."""
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
    """The log of another program. After its first failure it gets no more records; the lost ones are counted."""

    def __init__(self, where: str, start: Callable[[], Any], lost: int = 0) -> None:
        super().__init__(where, lost, Exception)
        self._target: Any = None
        self.attempt(lambda: self._take(start()), 0)

    def _take(self, target: Any) -> None:
        self._target = target

    def write(self, send: Callable[[Any], object]) -> None:
        """Call `send` with the object that `start` returned, to send one record."""
        if self._target is None:
            self.lost += 1
        elif not self.attempt(lambda: send(self._target)):
            self.close(lambda _: None)

    def close(self, end: Callable[[Any], object]) -> None:
        """Call `end` with the object that `start` returned, unless the log has failed."""
        if self._target is not None:
            target, self._target = self._target, None
            self.attempt(lambda: end(target), 0)

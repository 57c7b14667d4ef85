"""Watch runs and send a message for each event, until a signal ends the watcher."""

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_ledom.errors import visible
from megatron_ledom.monitoring.alert_channels import Channel, RefusedError, SendError
from megatron_ledom.monitoring.alert_events import Event, Known, find_events, message
from megatron_ledom.monitoring.alert_state import AlertState, Pending
from megatron_ledom.monitoring.fields import RunStatus
from megatron_ledom.monitoring.runs import RunReader
from megatron_ledom.monitoring.state import State

log = logging.getLogger(__name__)

FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 5.0, 300.0
"""Pauses after a message that could not be sent; each is twice the one before."""
NOTE_SECONDS = 0.5
"""Seconds between two looks for the launcher's note."""
LAST_POLL_SECONDS = 0.5
"""Seconds between two looks at runs that are about to end."""
BUSY = (State.RUNNING, State.STALLED)


@dataclass(slots=True)
class _Retry:
    """The pause of one channel."""

    pause: float = 0.0
    at: float = 0.0
    """Monotonic time of the next try."""


@dataclass(slots=True, kw_only=True)
class Watcher:
    """Reads the status of runs at intervals and delivers messages."""

    open_reader: Callable[[int | None], RunReader]
    """Returns the reader of the runs, from the exit code of their launch if it has ended."""
    channels: Sequence[Channel]
    state: AlertState
    interval_seconds: float
    end_seconds: float
    """Longest time from the request to end until the end."""
    may_be_missing: bool = False
    exit_note: str | None = None
    """File that ends the watcher, as `ending` does: the exit code of the ranks and, in a second line, what the launcher does next."""
    ending: threading.Event = field(default_factory=threading.Event)
    """Set it to end the watcher after the last messages."""
    _retries: dict[str, _Retry] = field(default_factory=dict)
    _reader: RunReader | None = None
    _code: int | None = None
    _has_told_failure: bool = False
    """True if the failure of the launch that this watcher watches has been told."""

    def watch(self) -> bool:
        """Watch until the end, and then until the runs have ended, for `end_seconds` at most. Returns False if messages are left.

        The end is the exit note; without one, `ending`. With one, `ending` only asks for a look now: the ranks may still be saving.
        """
        next_poll = 0.0
        while self._ended()[0] is None:
            if self.ending.is_set() and self.exit_note is None:
                break
            if self.ending.is_set():
                self.ending.clear()
                next_poll = 0.0
            if time.monotonic() >= next_poll:
                next_poll = time.monotonic() + self.interval_seconds
                self.poll()
            self.deliver()
            seconds = max(0.05, min([next_poll, *self._next_tries()]) - time.monotonic())
            self.ending.wait(seconds if self.exit_note is None else min(seconds, NOTE_SECONDS))
        return self._finish(until_ended=True)

    def look_once(self) -> bool:
        """Look once and send. Returns False if messages are left after `end_seconds`."""
        self.poll()
        return self._finish(until_ended=False)

    def _finish(self, *, until_ended: bool) -> bool:
        """Send all messages; with `until_ended` also look until no run is running. Returns False if messages are left at the end."""
        end = time.monotonic() + self.end_seconds
        while True:
            self._retries.clear()
            states = self.poll() if until_ended else []
            self.deliver()
            is_over = not self.state.pending and not any(state in BUSY for state in states)
            if is_over or time.monotonic() > end:
                break
            time.sleep(LAST_POLL_SECONDS)
        for each in self.state.pending:
            log.warning("not delivered to %s: %s", ", ".join(each.channels), visible(each.message["text"]))
        return not self.state.pending

    def poll(self) -> list[str]:
        """Read the status of each run once and note its events. Returns the states."""
        now, (code, note) = time.time(), self._ended()
        if self._reader is None or code != self._code:
            self._reader, self._code = self.open_reader(code), code
        found = self._reader.read()
        for status in found:
            self._note(status, now, note)
        if code and not self._has_told_failure:
            self._note_failure(found, now, note)
        self.state.save()
        return [str(status.state) for status in found]

    def _note(self, status: RunStatus, now: float, note: str) -> None:
        known = self.state.of(status.run)
        before = replace(known)
        for event in find_events(known, status, now, may_be_missing=self.may_be_missing):
            self._add(message(event, status, before, now, note))
            is_of_launch = before.condition in (Event.RECOVERED, Event.STALLED) or (
                status.state is State.LOST and bool(self._code)
            )
            self._has_told_failure |= event is Event.FAILED and is_of_launch

    def _note_failure(self, found: Sequence[RunStatus], now: float, note: str) -> None:
        """Tell of a launch that failed before its run could report anything."""
        begun = [status for status in found if status.state not in (State.NEW, State.COMPLETE)]
        status = replace((begun or list(found))[-1], reason=f"the launch ended with code {self._code}; see the log of the job")
        self._add(message(Event.FAILED, status, self.state.of(status.run), now, note))
        self._has_told_failure = True

    def _add(self, new: dict[str, Any]) -> None:
        log.info("%s", visible(new["text"]))
        self.state.pending.append(Pending(new, [channel.name for channel in self.channels]))

    def _ended(self) -> tuple[int | None, str]:
        """Return the exit code of the ranks and the launcher's sentence, if there are any."""
        if self.exit_note is None:
            return None, ""
        try:
            with open(self.exit_note, encoding="utf-8") as file:
                code, _, note = file.read().partition("\n")
            return int(code), " ".join(note.split())
        except (OSError, ValueError):
            return None, ""

    def deliver(self) -> None:
        """Send the pending messages, in order for each channel, except to channels that pause after a failure."""
        for channel in self.channels:
            retry = self._retries.setdefault(channel.name, _Retry())
            for each in [each for each in self.state.pending if channel.name in each.channels]:
                if time.monotonic() < retry.at or not self._sent(channel, each, retry):
                    break
        names = {channel.name for channel in self.channels}
        left = [each for each in self.state.pending if names & set(each.channels)]
        if len(left) < len(self.state.pending):
            self.state.pending = left
            self.state.save()

    def _sent(self, channel: Channel, each: Pending, retry: _Retry) -> bool:
        try:
            channel.send(each.message)
        except RefusedError as error:  # it would be refused again, and must not keep the later ones
            log.error("the %s refuses a message for good (%s): %s", channel.name, error, visible(each.message["text"]))
        except SendError as error:
            retry.pause = min(max(FIRST_PAUSE_SECONDS, 2 * retry.pause), LONGEST_PAUSE_SECONDS)
            retry.at = time.monotonic() + retry.pause
            log.warning("the %s did not take a message (%s); next try in %.0f s", channel.name, error, retry.pause)
            return False
        retry.pause, retry.at = 0.0, 0.0
        each.channels.remove(channel.name)
        self.state.save()
        return True

    def _next_tries(self) -> list[float]:
        waiting = {name for each in self.state.pending for name in each.channels}
        return [retry.at for name, retry in self._retries.items() if name in waiting]


def send_test(channels: Sequence[Channel]) -> int:
    """Send a test message to each channel. Returns 1 if one did not take it."""
    status = RunStatus(os.getcwd(), state=State.NEW)
    new = message(Event.TEST, status, Known(), time.time())
    failed = 0
    for channel in channels:
        try:
            channel.send(new)
            log.info("the %s took the test message", channel.name)
        except SendError as error:
            failed = 1
            log.error("the %s did not take the test message (%s)", channel.name, error)
    return failed

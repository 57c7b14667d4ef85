"""Rendezvous of the launched ranks. Signals are noticed while a rank waits, and messages name the missing ranks.

torch's own rendezvous waits inside one C++ call, which no Python signal handler interrupts. After the timeout of a collective it
reports only the number of ranks. Here each rank sets a key in the store and polls for the decision, which one rank makes for
all: start, stop because of a signal, or give up.
"""

import logging
import os
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from megatron_ledom.errors import StoppedWaiting, TransientError
from megatron_ledom.platform.launch import Launch, torchrun_has_store

log = logging.getLogger(__name__)

FIRST_POLL_SECONDS, LONGEST_POLL_SECONDS = 0.01, 0.5
CONNECT_SECONDS = 5.0
"""Timeout of one attempt to connect to the store."""
REPORT_SECONDS = 30.0
PATIENCE_SECONDS = {"SIGTERM": 2.0}
OTHER_PATIENCE_SECONDS = 15.0
"""Time that a rank still waits after a signal. SIGTERM ends a job soon; the other signals only warn of its end. A job whose time
limit is shorter than its warning must still make a step at each start."""
LEAVE_SECONDS = 3.0
"""Time that the rank with the store gives the others to read why nothing starts."""
MOST_NAMED = 16
"""Most missing ranks that a message names."""
START, STOP, GIVE_UP = "start", "stop", "give up"
StopSignal = Callable[[], str | None]
"""Returns the name of the stop signal that this rank received, or None."""


class Rendezvous:
    """Makes one rank wait for all others."""

    def __init__(self, launch: Launch, timeout: timedelta, stop: StopSignal) -> None:
        self.launch, self.timeout, self.stop = launch, timeout, stop
        self.host, self.port = launch.address()
        self.end = time.monotonic() + timeout.total_seconds()
        self.first_noticed: float | None = None
        """Time at which a signal was first noticed."""
        self.is_host = launch.rank == 0 and not torchrun_has_store()
        """True if this rank has the store; otherwise rank 0 or torchrun's agent has it."""

    def store(self) -> Any:
        """Return the store when all ranks have joined. Raises StoppedWaiting after a signal, TransientError if ranks are missing."""
        self.base = self._host_store() if self.is_host else self._reach_store()
        rank = self.launch.rank
        restart = f"rendezvous/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"  # torchrun's store survives a restart
        count = self.base.add(f"{restart}/starts/{rank}", 1)
        marks = dist.PrefixStore(f"{restart}/{count}", self.base)  # type: ignore[attr-defined]
        try:
            decision = self._decision(marks)
        except RuntimeError as error:  # the rank with the store has ended
            if (signal := self.stop()) is not None:
                raise StoppedWaiting(f"rank {rank} got {signal}, and the rank with the store has ended") from error
            raise TransientError(
                f"rank {rank} lost the store at {self.host}:{self.port} while it waited for the other ranks ({_first_line(error)}):"
                " rank 0 has ended; look for its error in the log"
            ) from error
        kind, _, text = decision.partition(": ")
        if kind == START:
            self.base.set_timeout(self.timeout)
            return dist.PrefixStore("ranks", marks)  # type: ignore[attr-defined]
        self._leave(marks)
        raise StoppedWaiting(text) if kind == STOP else TransientError(text)

    def _host_store(self) -> Any:
        try:
            return self._connected(is_master=True)
        except RuntimeError as error:
            raise TransientError(
                f"rank 0 cannot listen on port {self.port} ({_first_line(error)}); if another process has it, set MASTER_PORT to a"
                " free one"
            ) from error

    def _connected(self, *, is_master: bool) -> Any:
        store = dist.TCPStore  # type: ignore[attr-defined]
        return store(
            self.host,
            self.port,
            self.launch.world_size,
            is_master,
            timedelta(seconds=CONNECT_SECONDS),
            wait_for_workers=False,
            multi_tenant=True,
        )

    def _reach_store(self) -> Any:
        """Connect to the store as soon as rank 0 has it."""
        poll, reported = FIRST_POLL_SECONDS, time.monotonic()
        while True:
            try:
                socket.create_connection((self.host, self.port), timeout=1.0).close()
                return self._connected(is_master=False)
            except (OSError, RuntimeError) as error:
                reason = _first_line(error)
            self._raise_if_stopped("rank 0")
            now = time.monotonic()
            if now > self.end:
                raise TransientError(
                    f"rank {self.launch.rank} of {self.launch.world_size}: rank 0 is missing: it has not answered at"
                    f" {self.host}:{self.port} for {self._waited()} ({reason}); look for its error in the log, and check whether"
                    f" {socket.gethostname()} can reach that address"
                )
            if now - reported > REPORT_SECONDS:
                reported = now
                log.warning("rank %d waits for rank 0 at %s:%d (%s)", self.launch.rank, self.host, self.port, reason)
            time.sleep(poll)
            poll = min(2 * poll, LONGEST_POLL_SECONDS)

    def _decision(self, marks: Any) -> str:
        """Wait for the decision and return it; every rank gets the same text."""
        rank, world_size = self.launch.rank, self.launch.world_size
        marks.set(f"here/{rank}", socket.gethostname())
        if marks.add("arrived", 1) == world_size:
            self._decide(marks, START)
        poll, reported = FIRST_POLL_SECONDS, time.monotonic()
        while not marks.check(["decision"]):
            now = time.monotonic()
            if (signal := self._stopped_by()) is not None:
                self._decide(marks, f"{STOP}: rank {rank} got {signal} while {self._missing(marks)}: nothing starts")
            elif now > self.end:
                self._decide(marks, f"{GIVE_UP}: {self._missing(marks)} for {self._waited()}; look for their errors in the log")
            elif now - reported > REPORT_SECONDS:
                reported = now
                log.log(logging.WARNING if rank == 0 else logging.INFO, "waiting: %s", self._missing(marks))
            time.sleep(poll)
            poll = min(2 * poll, LONGEST_POLL_SECONDS)
        return bytes(marks.get("decision")).decode()

    def _decide(self, marks: Any, decision: str) -> None:
        """Set the decision for all ranks, unless another rank has set it."""
        marks.compare_set("decision", "", decision)

    def _missing(self, marks: Any) -> str:
        ranks = [rank for rank in range(self.launch.world_size) if not marks.check([f"here/{rank}"])]
        return f"{_named(ranks)} of {self.launch.world_size} {'was' if len(ranks) == 1 else 'were'} missing"

    def _raise_if_stopped(self, missing: str) -> None:
        if (signal := self._stopped_by()) is not None:
            raise StoppedWaiting(f"rank {self.launch.rank} got {signal} while {missing} was missing: nothing starts")

    def _stopped_by(self) -> str | None:
        """Return the name of a received signal once the time to wait after it is over; None before."""
        signal, now = self.stop(), time.monotonic()
        if signal is None:
            return None
        self.first_noticed = self.first_noticed or now
        return signal if now - self.first_noticed >= PATIENCE_SECONDS.get(signal, OTHER_PATIENCE_SECONDS) else None

    def _waited(self) -> str:
        return f"{self.timeout.total_seconds():,.0f} s (parallel.distributed_timeout_minutes)"

    def _leave(self, marks: Any) -> None:
        """Leave; the rank with the store leaves last."""
        end = time.monotonic() + LEAVE_SECONDS
        try:
            left = marks.add("left", 1)
            while self.is_host and left < marks.add("arrived", 0) and time.monotonic() < end:
                time.sleep(FIRST_POLL_SECONDS)
                left = marks.add("left", 0)
        except RuntimeError:  # the store has ended: nothing is left to read
            return


def _named(ranks: list[int]) -> str:
    """Return `rank 3` or `ranks 1, 2, 5`, shortened if there are many."""
    more = f" and {len(ranks) - MOST_NAMED} more" if len(ranks) > MOST_NAMED else ""
    return f"rank{'' if len(ranks) == 1 else 's'} {', '.join(map(str, ranks[:MOST_NAMED]))}{more}"


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]

"""Where the launched ranks meet before they are a process group: waits so short that a signal is heard, and missing ranks are named.

torch's own meeting waits inside one call of C++, which no signal handler of Python interrupts, for as long as a collective may
take, and then says only how many ranks came. Here each rank leaves its mark in the store and looks now and then for the
decision, which is made once for all: start, stop because a signal came, or give up.
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
from megatron_ledom.platform.launch import Launch

log = logging.getLogger(__name__)

FIRST_POLL_SECONDS, LONGEST_POLL_SECONDS = 0.01, 0.5
CONNECT_SECONDS = 5.0
"""For one attempt to reach the store."""
REPORT_SECONDS = 30.0
PATIENCE_SECONDS = {"SIGTERM": 2.0}
OTHER_PATIENCE_SECONDS = 15.0
"""How long a rank that got a signal still waits: SIGTERM is the end of a job, the others warn of it, and a job whose time limit is
shorter than its warning has to come a step further at each start."""
LEAVE_SECONDS = 3.0
"""How long the rank that holds the store lets the others read why nothing starts."""
MOST_NAMED = 16
"""Missing ranks that a message names one by one."""
START, STOP, GIVE_UP = "start", "stop", "give up"
StopSignal = Callable[[], str | None]
"""Name of the signal that asks this rank to stop, if one came."""


class Rendezvous:
    """One rank's wait for all others."""

    def __init__(self, launch: Launch, timeout: timedelta, stop: StopSignal) -> None:
        self.launch, self.timeout, self.stop = launch, timeout, stop
        self.host, self.port = launch.address()
        self.end = time.monotonic() + timeout.total_seconds()
        self.heard: float | None = None
        """When a signal was seen first."""
        self.is_host = launch.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True)
        """Else rank 0, or torchrun's agent, holds the store."""

    def store(self) -> Any:
        """The store of the ranks, once all are there. Raises StoppedWaiting, or TransientError when some did not come."""
        self.base = self._host_store() if self.is_host else self._reach_store()
        rank = self.launch.rank
        restart = f"meeting/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"  # torchrun's store outlives a start
        count = self.base.add(f"{restart}/starts/{rank}", 1)
        marks = dist.PrefixStore(f"{restart}/{count}", self.base)  # type: ignore[attr-defined]
        try:
            decision = self._decision(marks)
        except RuntimeError as error:  # the rank that holds the store has gone
            if (signal := self.stop()) is not None:
                raise StoppedWaiting(f"rank {rank} got {signal}, and the rank that holds the store has left") from error
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
        """Connect to it as soon as it is there."""
        poll, told = FIRST_POLL_SECONDS, time.monotonic()
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
                    f"rank {self.launch.rank} of {self.launch.world_size}: missing is rank 0, which has not answered at"
                    f" {self.host}:{self.port} for {self._waited()} ({reason}); look for its error in the log, and whether"
                    f" {socket.gethostname()} reaches that address"
                )
            if now - told > REPORT_SECONDS:
                told = now
                log.warning("rank %d waits for rank 0 at %s:%d (%s)", self.launch.rank, self.host, self.port, reason)
            time.sleep(poll)
            poll = min(2 * poll, LONGEST_POLL_SECONDS)

    def _decision(self, marks: Any) -> str:
        """The same text on every rank."""
        rank, world_size = self.launch.rank, self.launch.world_size
        marks.set(f"here/{rank}", socket.gethostname())
        if marks.add("arrived", 1) == world_size:
            self._decide(marks, START)
        poll, told = FIRST_POLL_SECONDS, time.monotonic()
        while not marks.check(["decision"]):
            now = time.monotonic()
            if (signal := self._stopped_by()) is not None:
                self._decide(marks, f"{STOP}: rank {rank} got {signal} while {self._missing(marks)}: nothing starts")
            elif now > self.end:
                self._decide(marks, f"{GIVE_UP}: {self._missing(marks)} for {self._waited()}; look for their errors in the log")
            elif now - told > REPORT_SECONDS:
                told = now
                log.log(logging.WARNING if rank == 0 else logging.INFO, "waiting: %s", self._missing(marks))
            time.sleep(poll)
            poll = min(2 * poll, LONGEST_POLL_SECONDS)
        return bytes(marks.get("decision")).decode()

    def _decide(self, marks: Any, decision: str) -> None:
        """Set it for all, unless another rank has."""
        marks.compare_set("decision", "", decision)

    def _missing(self, marks: Any) -> str:
        ranks = [rank for rank in range(self.launch.world_size) if not marks.check([f"here/{rank}"])]
        return f"{_named(ranks)} of {self.launch.world_size} {'was' if len(ranks) == 1 else 'were'} missing"

    def _raise_if_stopped(self, missing: str) -> None:
        if (signal := self._stopped_by()) is not None:
            raise StoppedWaiting(f"rank {self.launch.rank} got {signal} while {missing} was missing: nothing starts")

    def _stopped_by(self) -> str | None:
        """The signal that came, once it has been waited for the missing ranks a little longer."""
        signal, now = self.stop(), time.monotonic()
        if signal is None:
            return None
        self.heard = self.heard or now
        return signal if now - self.heard >= PATIENCE_SECONDS.get(signal, OTHER_PATIENCE_SECONDS) else None

    def _waited(self) -> str:
        return f"{self.timeout.total_seconds():,.0f} s (parallel.distributed_timeout_minutes)"

    def _leave(self, marks: Any) -> None:
        """The rank that holds the store goes last."""
        end = time.monotonic() + LEAVE_SECONDS
        try:
            left = marks.add("left", 1)
            while self.is_host and left < marks.add("arrived", 0) and time.monotonic() < end:
                time.sleep(FIRST_POLL_SECONDS)
                left = marks.add("left", 0)
        except RuntimeError:  # it has gone: nobody has anything more to read
            return


def _named(ranks: list[int]) -> str:
    """`rank 3`, `ranks 1, 2, 5`; the first of many."""
    more = f" and {len(ranks) - MOST_NAMED} more" if len(ranks) > MOST_NAMED else ""
    return f"rank{'' if len(ranks) == 1 else 's'} {', '.join(map(str, ranks[:MOST_NAMED]))}{more}"


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]

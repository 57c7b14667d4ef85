"""Copy the finished checkpoints of a run to its mirror in a process of its own, while training continues. Used on the first rank.

The newest checkpoint is copied first. One that is being copied is not deleted by `checkpoint.keep_last` until its copy ends; one that
waits may be, and is then skipped with a warning. If the mirror does not answer, the copy is tried again with longer and longer waits.
Nothing here stops or delays the training.
"""

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import megatron_ledom
from megatron_ledom.checkpoint.folder import checkpoint_name, finished_checkpoints, latest_name, outdated
from megatron_ledom.config.derived import checkpoint_folder
from megatron_ledom.config.load import to_dict
from megatron_ledom.config.schema import RunConfig
from megatron_ledom.data.readers.remote import without_secrets
from megatron_ledom.mirror.contents import Claim, number
from megatron_ledom.mirror.copying import mirror_retention
from megatron_ledom.mirror.store import KEY, address_of

log = logging.getLogger(__name__)

FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 5.0, 300.0
LONGEST_LAST_WAIT_SECONDS = 5.0
"""Longest wait between two tries at the end of a run."""
LONG_SECONDS = 1800.0
"""A copy that takes longer, and longer than three of the longest so far, is reported, and again after the same time."""
POLL_SECONDS = 0.05
CLOSE_SECONDS = 5.0
MIB = 1 << 20


class Uploader:
    """Decides what is copied, and gives it to the process that copies. No method waits for the mirror, except `finish`."""

    def __init__(self, config: RunConfig, claim: Claim) -> None:
        self.folder, self.address = checkpoint_folder(config), address_of(config)
        self.shown = without_secrets(self.address)
        self.settings = mirror_retention(config.checkpoint)
        self._task_settings = {
            "address": self.address,
            "claim": asdict(claim),
            "checkpoint": to_dict(config)["checkpoint"],
        }
        self.replayed: list[int] = []
        """Iterations to replay: the copy before each is not deleted."""
        self.mirrored: set[int] = set()
        self._damaged: set[int] = set()
        """Checkpoints that were not copied because they are damaged."""
        self.longest_seconds = 0.0
        """Longest copy so far."""
        self._pending: set[int] = set()
        self._busy: int | None = None
        self._begun = self._warn_at = 0.0
        self._process: subprocess.Popen[bytes] | None = None
        self._received = b""
        self._has_taken = False
        """True after a copy: another launch that takes the mirror later is then not pushed aside by a new process."""
        self._wait, self._next_try, self._is_refused = FIRST_WAIT_SECONDS, 0.0, False

    def __enter__(self) -> "Uploader":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @property
    def held(self) -> set[int]:
        """Iterations of the checkpoints that must not be deleted now."""
        return set() if self._busy is None else {self._busy}

    def seconds_to_copy(self) -> float:
        """Return the estimated seconds to copy a checkpoint that is saved now: the rest of the present copy and a new one."""
        passed = time.monotonic() - self._begun if self._busy is not None else 0.0
        whole = max(self.longest_seconds, passed)
        return whole + (whole - passed if self._busy is not None else 0.0)

    def add(self, iterations: Iterable[int]) -> None:
        """Copy the checkpoints of these iterations, if the mirror keeps them."""
        self._pending |= set(iterations) - self.mirrored - self.held
        known = sorted(self._pending | self.mirrored | self.held)
        if known:
            self._pending -= set(outdated(known, known[-1], self.settings, self.replayed))

    def poll(self) -> None:
        """Take the answer of the process, if there is one, and give it the next checkpoint."""
        if self._busy is not None:
            self._receive()
        if self._busy is not None and time.monotonic() >= self._warn_at:
            minutes = (time.monotonic() - self._begun) / 60
            log.warning("the copy of %s to %s takes %.0f minutes so far", checkpoint_name(self._busy), self.shown, minutes)
            self._warn_at = time.monotonic() + max(LONG_SECONDS, 3 * self.longest_seconds)
        if self._busy is None and self._pending and not self._is_refused and time.monotonic() >= self._next_try:
            self._send_next()

    def _send_next(self) -> None:
        try:
            there, latest = finished_checkpoints(self.folder), latest_name(self.folder)
        except OSError as error:
            self._failed(f"{self.folder} cannot be listed ({error.strerror})")
            return
        gone = sorted(iteration for iteration in self._pending if iteration not in there)
        if gone:
            names = ", ".join(map(checkpoint_name, gone))
            log.warning("%s: deleted by checkpoint.keep_last before it was copied to %s; skipped", names, self.shown)
            self._pending -= set(gone)
        if not self._pending:
            return
        iteration = max(self._pending)
        task = {
            "iteration": iteration,
            "replayed": self.replayed,
            "waiting": sorted(self._pending),
            "local_latest": None if latest is None else number(latest),
            "has_taken": self._has_taken,
        }
        self._begun = time.monotonic()
        self._warn_at = self._begun + max(LONG_SECONDS, 3 * self.longest_seconds)
        try:
            if self._process is None:
                self._process = self._start()
                self._write(self._task_settings)
            self._write(task)
        except OSError as error:
            self._end_process(0)  # the next try starts another one
            self._failed(f"the process that copies does not run ({error.strerror})")
            return
        self._pending.discard(iteration)
        self._busy = iteration

    def _start(self) -> subprocess.Popen[bytes]:
        package = str(Path(megatron_ledom.__file__).parents[1])
        paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
        process = subprocess.Popen(
            [sys.executable, "-m", "megatron_ledom.mirror.process", str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )
        assert process.stdout is not None
        os.set_blocking(process.stdout.fileno(), False)
        self._received = b""
        return process

    def _write(self, value: dict[str, Any]) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(value).encode() + b"\n")
        self._process.stdin.flush()

    def _receive(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        assert self._busy is not None
        try:
            new = os.read(self._process.stdout.fileno(), 1 << 16)
        except BlockingIOError:
            return
        self._received += new
        if not new:
            code = self._process.wait()
            self._process.stdout.close()
            self._process = None
            self._failed(f"the process that copies ended with code {code}")
        elif self._received.endswith(b"\n"):
            answer = json.loads(self._received)
            self._received = b""
            self._take(answer)

    def _take(self, answer: dict[str, Any]) -> None:
        """Log an answer, and remember what is copied."""
        iteration, self._busy = self._busy, None
        assert iteration is not None
        name = checkpoint_name(iteration)
        if "done" in answer:
            self._has_taken = True
            self.mirrored.add(iteration)
            self._wait, self._next_try = FIRST_WAIT_SECONDS, 0.0
            self.longest_seconds = max(self.longest_seconds, answer["seconds"])
            speed = answer["bytes"] / MIB / max(answer["seconds"], 1e-3)
            if answer["bytes"]:
                size = f"{answer['bytes'] / MIB:,.1f}"
                log.info("copied %s to %s (%s MiB in %.1f s, %.0f MiB/s)", name, self.shown, size, answer["seconds"], speed)
            if "not_deleted" in answer:
                log.warning("outdated checkpoints in %s could not be deleted: %s", self.shown, answer["not_deleted"])
        elif "refused" in answer:
            self._is_refused = True
            self._pending.add(iteration)
            log.error("%s. Training continues without the mirror", answer["refused"])
        elif "damaged" in answer:
            self._damaged.add(iteration)
            log.error("%s was not copied to %s: %s", name, self.shown, answer["damaged"])
        else:
            self._busy = iteration
            self._failed(answer["failed"])

    def _failed(self, reason: str) -> None:
        """Log why a copy failed, and try again later."""
        if self._busy is not None:
            iteration, self._busy = self._busy, None
            self.add([iteration])
        self._next_try = time.monotonic() + self._wait
        log.warning("nothing can be copied to %s: %s; next try in %.0f s, training continues", self.shown, reason, self._wait)
        self._wait = min(2 * self._wait, LONGEST_WAIT_SECONDS)

    def finish(self, seconds: Callable[[], float]) -> None:
        """Wait until everything is copied, but no longer than `seconds`, which is asked again and again."""
        started = time.monotonic()
        limit = seconds()
        if self._is_open() and limit > 0:
            log.info("waiting up to %.0f s for the copy of the last checkpoint to %s", limit, self.shown)
        while self._is_open() and time.monotonic() - started < min(limit, seconds()):
            self._next_try = min(self._next_try, time.monotonic() + LONGEST_LAST_WAIT_SECONDS)
            self.poll()
            time.sleep(POLL_SECONDS)

    def _is_open(self) -> bool:
        return not self._is_refused and (self._busy is not None or bool(self._pending))

    def close(self) -> None:
        """End the process, and log which checkpoints are not on the mirror."""
        missing = sorted(self._pending | self.held | self._damaged)
        if missing:
            names = ", ".join(map(checkpoint_name, missing))
            log.warning("NOT copied to %s=%s: %s; the next start of the run copies what is still there", KEY, self.shown, names)
        is_copying = self._busy is not None
        self._pending, self._busy = set(), None
        self._end_process(0 if is_copying else CLOSE_SECONDS)

    def _end_process(self, seconds: float) -> None:
        """End the process that copies; kill it if it does not end by itself within some seconds."""
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        assert process.stdout is not None
        with suppress(OSError):  # what it did not read any more
            process.stdin.close()
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            with suppress(subprocess.TimeoutExpired):  # a process that waits for a disk ends later
                process.wait(CLOSE_SECONDS)
        process.stdout.close()

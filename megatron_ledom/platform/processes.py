"""Ends of processes: one that helps another dies with it, and leaves the signals of the job to it; one that hangs ends itself."""

import ctypes
import os
import signal
import sys
import time

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

"""What a process that helps another has to arrange for: it dies with it, and leaves the signals of the job to it."""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # of linux/prctl.h
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

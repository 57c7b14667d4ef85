"""Memory that a process has freed and will use again."""

import ctypes

MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1
"""glibc's numbers of two settings of `malloc`."""
KEPT_BYTES = 1 << 29


def keep_freed_memory() -> None:
    """Let glibc keep up to 512 MiB of freed memory, which the next batch uses again.

    Otherwise it returns large tensors to the system, and each batch asks for them page by page: up to a fifth of its time.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:  # another libc has none
        set_option(MMAP_THRESHOLD, KEPT_BYTES)
        set_option(TRIM_THRESHOLD, KEPT_BYTES)

"""Print the status of runs again and again."""

import sys
import time

from megatron_ledom.monitoring.runs import RunReader
from megatron_ledom.monitoring.table import as_table

CLEAR = "\x1b[H\x1b[2J\x1b[3J"
"""Moves a terminal to its first line and clears it."""


def watch(reader: RunReader, seconds: float) -> int:
    """Print the table every `seconds`, on a terminal in place, until Ctrl-C. Returns the exit code for the last table."""
    is_healthy = True
    try:
        while True:
            found = reader.read()
            is_healthy = all(run.is_healthy for run in found)
            clear = CLEAR if sys.stdout.isatty() else ""
            print(f"{clear}{time.strftime('%Y-%m-%d %H:%M:%S')}\n{as_table(found)}\n", flush=True)
            time.sleep(seconds)
    except KeyboardInterrupt:
        return 0 if is_healthy else 1

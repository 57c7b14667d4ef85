"""How the process that writes a checkpoint tells its rank what it wrote."""

import os
import pickle
import queue
import tempfile
from typing import IO, Any


class SaveResults:
    """One value from a writer process to the rank that forked it, kept in memory that outlives the process.

    It stands in for the queue that megatron-core's writer makes, which is served by a process of its own: a SIGTERM to all
    processes of a job, as batch systems send it, ends that process, and the next save then hangs for ever. A pipe would not do
    either: a writer with much to tell would wait for a reader, who waits for its end.
    """

    def __init__(self) -> None:
        in_memory = hasattr(os, "memfd_create")  # on Linux
        file = open(os.memfd_create("save_results"), "r+b") if in_memory else tempfile.TemporaryFile()  # noqa: SIM115
        self._file: IO[bytes] = file

    def put(self, value: Any) -> None:
        """Leave the value. Call once, in either process."""
        pickle.dump(value, self._file)
        self._file.flush()

    def get_nowait(self) -> Any:
        """The value, once the process that puts it has ended. Raises queue.Empty when it ended before it had put all of it."""
        self._file.seek(0)
        try:
            return pickle.Unpickler(self._file).load()  # written by a process that this one forked
        except (EOFError, pickle.UnpicklingError) as error:
            raise queue.Empty from error
